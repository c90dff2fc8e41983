"""What a cubin says of its kernel. A cubin is an ELF file with one kernel, which the compiler names.

What it notes of a kernel is in a section of tagged values (EIATTR): format u8, tag u8, then a u16 value or, for format
4, a u16 size and as many bytes.
"""

from collections.abc import Iterator
import hashlib
import struct
from typing import Any

_SIZED = 4
_REGISTERS, _THREADS, _PARAMETER, _STACK = 0x2F, 0x10, 0x17, 0x12
_NO_BITS = 8  # a section type that takes no room in the file


def facts(image: bytes, symbol: str) -> dict[str, Any]:
    """``threads``, ``parameter_bytes``, ``registers`` and ``stack_bytes`` of a kernel, from its cubin.

    Raises:
      ValueError: ``image`` is no cubin, or does not say.
    """
    sections = _sections(image)
    try:
        own, all_kernels = sections[f".nv.info.{symbol}"], sections[".nv.info"]
    except KeyError:
        raise ValueError(f"image: a cubin without notes on {symbol}") from None
    parameters, threads = {}, None
    for tag, value in _notes(own):
        if tag == _PARAMETER:  # u32 index, u16 ordinal, u16 offset, u32 with the size in bits 18..31
            ordinal, packed = struct.unpack_from("<4xH2xI", value)
            parameters[ordinal] = packed >> 18
        elif tag == _THREADS:
            x, y, z = struct.unpack("<III", value)
            threads = x * y * z
    if threads is None:
        raise ValueError(f"image: {symbol} was not compiled for a fixed number of threads")
    # These two name the function by its symbol's index first; there is one kernel in a cubin of ours.
    totals = {tag: struct.unpack("<II", value)[1] for tag, value in _notes(all_kernels) if tag in (_REGISTERS, _STACK)}
    return dict(
        threads=threads,
        parameter_bytes=tuple(parameters[i] for i in range(len(parameters))),
        registers=totals[_REGISTERS],
        stack_bytes=totals.get(_STACK, 0),
    )


def instructions(image: bytes, symbol: str) -> bytes:
    """The kernel's machine code."""
    return _sections(image)[f".text.{symbol}"]


def code_digest(image: bytes, symbol: str) -> str:
    """SHA-256 of all that runs: instructions, constants, initialised memory, and the notes that a launch heeds.

    Not of names: the symbol holds those of the kernel's module and class, and moving one changes no instruction.
    """
    digest = hashlib.sha256()
    for name, content in sorted(_sections(image).items()):
        if name.startswith((".text.", ".nv.constant", ".nv.info", ".nv.global", ".nv.shared")):
            digest.update(f"{name.replace(symbol, '')} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _notes(section: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(section):
        form, tag, value = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == _SIZED:
            yield tag, section[at : at + value]
            at += value


def _sections(image: bytes) -> dict[str, bytes]:
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("image: not a 64-bit little-endian ELF file")
    (headers,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    table = [struct.unpack_from("<II8x8xQQ", image, headers + i * size) for i in range(count)]
    text = table[names]

    def name(offset: int) -> str:
        start = text[2] + offset
        return image[start : image.index(b"\0", start)].decode()

    return {name(entry[0]): image[entry[2] : entry[2] + entry[3]] for entry in table if entry[1] != _NO_BITS}
