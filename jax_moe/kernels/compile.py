"""CuTe DSL kernels to cubins, kept on disk.

A kernel is described by a spec: a frozen dataclass that says everything that specialises it, with
``entry() -> (jit function, example arguments)`` for the compiler (``ABI.md``). Compiling needs the DSL but no
GPU. What comes out needs neither: the handler loads the cubin with the CUDA driver.

The cache is a folder of JSON files, one a kernel, written whole and then renamed into place, so that processes
may share it, over a network file system too. A file's name holds what the kernel depends on: the target, the
spec, the source of this package and the compiler.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import struct
import tempfile
import threading
from typing import Any, Protocol
import warnings

import platformdirs

TARGETS = ("sm_90a",)
"""GPU targets that kernels exist for."""

COMPILER = "nvidia-cutlass-dsl"
"""The package that compiles kernels: CuTe DSL."""

_lock = threading.Lock()  # the DSL keeps its state in globals; and whoever waited finds the kernel on disk


MOST_STACK_BYTES = 32
"""Of a thread of our kernels: a unit's start and end may keep a few words there; a loop that spills needs far more."""


class Spec(Protocol):
    """What describes a kernel; hashable, and its ``repr`` tells two of them apart."""

    @property
    def name(self) -> str: ...

    def entry(self) -> tuple[Any, tuple]: ...


class MissingKernelError(RuntimeError):
    """A kernel is not in the cache, and the DSL that could compile it is not installed."""


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A cubin with one kernel, and what a launch needs to know of it.

    Attributes:
      image: the cubin.
      symbol: the kernel's name in it.
      threads: of a block; the kernel was compiled for just that many.
      shared_bytes: dynamic shared memory of a block.
      parameter_bytes: sizes of the parameters, in order.
      registers: of a thread, as the block starts.
      stack_bytes: of a thread; more than 0 means local arrays or spilled registers.
      tensor_core_instructions: ``wgmma`` in the PTX.
    """

    image: bytes = dataclasses.field(repr=False)
    symbol: str
    threads: int
    shared_bytes: int
    parameter_bytes: tuple[int, ...]
    registers: int
    stack_bytes: int
    tensor_core_instructions: int


def cache_folder() -> pathlib.Path:
    """Where kernels are kept: ``$JAX_MOE_CACHE_DIR/kernels``, or in the user's cache folder."""
    root = os.environ.get("JAX_MOE_CACHE_DIR") or platformdirs.user_cache_dir("jax_moe")
    return pathlib.Path(root) / "kernels"


def compiled(spec: Spec, target: str) -> CompiledKernel:
    """The kernel of ``spec`` for ``target``: from memory, from disk, or compiled now.

    Args:
      spec: the kernel.
      target: one of :data:`TARGETS`.

    Raises:
      ValueError: no such target.
      MissingKernelError: it would have to be compiled, and the DSL is not installed.
    """
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}, needs one of {', '.join(TARGETS)}")
    return _compiled(spec, target, cache_folder())


@functools.cache
def _compiled(spec: Spec, target: str, folder: pathlib.Path) -> CompiledKernel:
    compiler = _compiler()
    with _lock:
        for path in _candidates(spec, target, folder, compiler):
            if (found := _read(path)) is not None:
                return found
        if compiler is None:
            raise MissingKernelError(
                f"jax_moe: kernel {spec.name} for {target} is not in {folder}, and {COMPILER} is not installed to "
                "compile it."
            )
        kernel = _compile(spec, target)
        try:
            _write(folder / _file_name(spec, target, compiler), kernel)
        except OSError as error:
            warnings.warn(f"jax_moe: kernel {spec.name} was compiled, but not kept: {error}", stacklevel=2)
    return kernel


def _compiler() -> str | None:
    """The installed DSL, as part of a file name: its version, and a digest of its settings: some change its output."""
    try:
        version = importlib.metadata.version(COMPILER)
    except importlib.metadata.PackageNotFoundError:
        return None
    settings = sorted(item for item in os.environ.items() if item[0].startswith("CUTE_DSL_"))
    return f"{version}-{_digest(repr(settings).encode())[:8]}" if settings else version


@functools.cache
def _source_digest() -> str:
    """Of every source file of this package: a kernel may import any of them."""
    folder = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_name(spec: Spec, target: str, compiler: str) -> str:
    return f"{_prefix(spec, target)}.{compiler}.json"


def _prefix(spec: Spec, target: str) -> str:
    key = "\n".join([target, _source_digest(), repr(spec)])
    return f"{target}.{_digest(key.encode())[:32]}"


def _candidates(spec: Spec, target: str, folder: pathlib.Path, compiler: str | None) -> list[pathlib.Path]:
    """Files that may hold the kernel. Without a compiler of our own, any version's will do.

    Released versions without settings come first, and among them the newest.
    """
    if compiler is not None:
        return [folder / _file_name(spec, target, compiler)]
    prefix, suffix = _prefix(spec, target) + ".", ".json"

    def rank(path: pathlib.Path) -> tuple[bool, list[int]]:
        version = path.name[len(prefix) : -len(suffix)]
        return re.fullmatch(r"[0-9.]+", version) is not None, [int(n) for n in re.findall(r"\d+", version)]

    return sorted(folder.glob(f"{prefix}*{suffix}"), key=rank, reverse=True)


def _read(path: pathlib.Path) -> CompiledKernel | None:
    """The kernel in a file; None if there is none, or a damaged one, which is then compiled anew."""
    try:
        fields = json.loads(path.read_text())
        if fields.pop("sha256") != _digest_of(fields):
            return None
        image = base64.b64decode(fields.pop("image"), validate=True)
        return CompiledKernel(image=image, **{**fields, "parameter_bytes": tuple(fields["parameter_bytes"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest_of(fields: dict[str, Any]) -> str:
    return _digest(json.dumps(fields, sort_keys=True).encode())


def _write(path: pathlib.Path, kernel: CompiledKernel) -> None:
    fields = dataclasses.asdict(kernel)
    fields["image"] = base64.b64encode(kernel.image).decode()
    fields["sha256"] = _digest_of(fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own first: whoever reads meanwhile sees the whole file or none.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
        try:
            json.dump(fields, file)
            file.flush()
            os.chmod(file.name, 0o644)  # a shared folder's other users read it too
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _compile(spec: Spec, target: str) -> CompiledKernel:
    import cutlass.cute as cute

    with tempfile.TemporaryDirectory() as dump:
        function, arguments = spec.entry()
        options = f"--gpu-arch {target} --keep-cubin --keep-ptx --dump-dir {dump}"
        result = cute.compile(function, *arguments, options=options)
        image, ptx = result.__cubin__, "".join(p.read_text() for p in pathlib.Path(dump).glob("*.ptx"))
        (symbol,) = result.kernel_info
        host_code = result.ir_module.operation.get_asm()
    facts = _read_cubin(image, symbol)
    return CompiledKernel(
        image=image,
        symbol=symbol,
        shared_bytes=_dynamic_shared_bytes(host_code, spec.name),
        tensor_core_instructions=len(re.findall(r"wgmma\.mma_async", ptx)),
        **facts,
    )


def _dynamic_shared_bytes(host_code: str, name: str) -> int:
    """What the entry passes to the launch as shared memory: the cubin does not say.

    Read from the entry's LLVM code, where the launch configuration is a struct whose third field it is.
    """
    config = re.escape("!llvm.struct<(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32)>")
    field = re.search(rf"(%\d+) = llvm\.getelementptr %\d+\[0, 2\] : \(!llvm\.ptr\) -> !llvm\.ptr, {config}", host_code)
    store = field and re.compile(rf"llvm\.store (%\d+), {field[1]} : i64").search(host_code, field.end())
    constants = []
    if store:  # names are those of a function: of the constants of that name the last one before the store is meant
        constant = rf"{store[1]} = llvm\.mlir\.constant\((\d+) : i64\)"
        constants = re.findall(constant, host_code[: store.start()])
    if not constants:
        raise RuntimeError(
            f"jax_moe: cannot tell how much shared memory {name} is launched with; this {COMPILER} is new"
        )
    return int(constants[-1])


# The cubin is an ELF file; what the compiler notes of a kernel is in a section of tagged values (EIATTR), of which
# these are read. An entry is format u8, tag u8, then a u16 value or, for format 4, a u16 size and as many bytes.
_SIZED = 4
_REGISTERS, _THREADS, _PARAMETER, _STACK = 0x2F, 0x10, 0x17, 0x12


def _read_cubin(image: bytes, symbol: str) -> dict[str, Any]:
    """``threads``, ``parameter_bytes``, ``registers`` and ``stack_bytes`` of a kernel, from its cubin.

    Raises:
      ValueError: ``image`` is no cubin, or does not say.
    """
    sections = _elf_sections(image)
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


def _notes(section: bytes):
    at = 0
    while at < len(section):
        form, tag, value = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == _SIZED:
            yield tag, section[at : at + value]
            at += value


def _elf_sections(image: bytes) -> dict[str, bytes]:
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("image: not a 64-bit little-endian ELF file")
    (headers,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    table = [struct.unpack_from("<II8x8xQQ", image, headers + i * size) for i in range(count)]
    text = table[names]

    def name(offset: int) -> str:
        start = text[2] + offset
        return image[start : image.index(b"\0", start)].decode()

    no_bits = 8  # a section type that takes no room in the file
    return {name(entry[0]): image[entry[2] : entry[2] + entry[3]] for entry in table if entry[1] != no_bits}
