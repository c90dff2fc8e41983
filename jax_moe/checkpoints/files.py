"""Reading safetensors files that nobody has checked yet: headers, index files and tensors by memory map.

The format (huggingface/safetensors, README): 8 bytes of little-endian header length, a JSON header that maps each
name to ``dtype``, ``shape`` and ``data_offsets`` relative to the end of the header, then the tensors' bytes, in
order, without holes. The library's own numpy and flax readers refuse ``F8_E4M3``, hence this one; every number in
a header is checked against the file's size before anything is mapped.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import json
import math
import mmap
import os
from pathlib import Path, PurePosixPath
import shlex
import stat
from typing import Any, BinaryIO, TypeGuard

import ml_dtypes
import numpy as np

MAX_JSON_BYTES = 64 * 2**20
"""Largest header or index file that is parsed. The largest published ones are below 30 MiB."""

_PIECE = 2**24  # bytes that are read at a time
_WILL_NEED = 2**17  # bytes that the kernel is asked for at a time: of more it may forget the rest

TEMPORARY_SUFFIX = ".tmp"
"""Of a file that is being written; one found later was left by a process that died."""

_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F64": np.dtype(np.float64),
}


FLOATS = ("F32", "BF16", "F16")
"""What biases, scalars and unquantised weights are stored in."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file, the tensor, what was found and expected."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes are. ``dtype`` is the format's own name for it ("U8", "F8_E4M3", ...)."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """None for a dtype that numpy lacks (packed 4- and 6-bit floats, or an unknown one)."""
        return _DTYPES.get(self.dtype)

    @property
    def summary(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks the header of a safetensors file.

    Returns:
      The tensors by name, and the file's own metadata.

    Raises:
      CheckpointError: the file is missing, not a regular file, or its header does not describe it exactly.
    """
    size = _regular_file_size(path)
    if size < 8:
        raise CheckpointError(
            f"{path}: found {size} bytes, expected a safetensors file (at least 8 bytes of header length)"
        )
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # else what follows the header is read ahead
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_JSON_BYTES):
            raise CheckpointError(
                f"{path}: found a header length of {length} bytes, expected at most {min(size - 8, MAX_JSON_BYTES)} "
                f"in a file of {size} bytes; it is truncated or not a safetensors file"
            )
        header = parse_json_object(file.read(length), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__: found {brief(metadata)}, expected an object of strings")
    _check_names(path, header)
    start = 8 + length
    tensors = {name: _tensor_info(path, name, entry, start, size) for name, entry in header.items()}
    _check_coverage(path, tensors, start, size)
    return tensors, metadata


def read_rows(info: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Maps rows ``start:stop`` of a tensor's first axis (all of it for a scalar), read-only.

    From storage comes what is mapped and not what lies around it, for the kernel to read while this returns: several
    processes that each load their part of a layer read it once. Its pages leave the process with the last reference.

    Raises:
      CheckpointError: the file has changed since its header was read, or its dtype has no numpy equivalent.
    """
    dtype = info.numpy_dtype
    if dtype is None:
        raise CheckpointError(f"{info}: found dtype {info.dtype!r}, expected one of {', '.join(_DTYPES)}")
    shape = info.shape
    offset = info.offset
    if shape:
        stop = shape[0] if stop is None else stop
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        shape = (stop - start, *shape[1:])
        offset += start * row_bytes
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    try:
        return _map(info.file, offset, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{info}: found a file that no longer holds the tensor ({error})") from error


def _map(file: Path, offset: int, nbytes: int) -> np.ndarray:
    """Bytes of a file, as uint8; asked for as a whole, else each page fault would bring megabytes around it."""
    start = offset % mmap.ALLOCATIONGRANULARITY
    with open(file, "rb") as opened:
        pages = mmap.mmap(opened.fileno(), start + nbytes, access=mmap.ACCESS_READ, offset=offset - start)
    with contextlib.suppress(OSError):  # advice: where the kernel takes none, the bytes are the same
        pages.madvise(mmap.MADV_RANDOM)  # else what somebody else reads ahead in this file goes on from here
        for piece in range(0, len(pages), _WILL_NEED):
            pages.madvise(mmap.MADV_WILLNEED, piece, min(_WILL_NEED, len(pages) - piece))
    return np.frombuffer(pages, np.uint8, nbytes, start)


def read_floats(info: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of a tensor of floats, as :func:`read_rows`, but in float32.

    Raises:
      CheckpointError: one is NaN or infinite, or see :func:`read_rows`.
    """
    # A value that float32 does not have is in no dtype of FLOATS, so the cast makes no infinity.
    values = read_rows(info, start, stop).astype(np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{info}: found {values[~np.isfinite(values)].flat[0]}, expected finite numbers")
    return values


def read_bytes(info: TensorInfo) -> Iterator[bytes]:
    """A tensor's bytes, in pieces.

    Raises:
      CheckpointError: the file has changed since its header was read.
    """
    try:
        with open(info.file, "rb") as file:
            file.seek(info.offset)
            for start in range(0, info.nbytes, _PIECE):
                yield file.read(min(_PIECE, info.nbytes - start))
    except OSError as error:
        raise CheckpointError(f"{info}: found a file that no longer holds the tensor ({error})") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Creates ``path`` whole or not at all, also if the process or the machine dies meanwhile."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_tensors(file: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, each tensor straight from its buffer."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, array in tensors.items():
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        position = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # the first tensor starts aligned
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for array in tensors.values():
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class Files:
    """The tensors of a checkpoint directory, over all its shards. Headers are read when first needed."""

    def __init__(self, directory: str | os.PathLike):
        """Opens ``directory``: ``model.safetensors.index.json`` if it has one, else every ``*.safetensors`` in it.

        "~" at its start is the home directory.

        Raises:
          CheckpointError: there is no such directory, no safetensors file, or the index is malformed or points
            outside the directory.
        """
        self.directory = expand_home(directory)
        if not self.directory.is_dir():
            found = "a file" if self.directory.is_file() else "no directory"
            raise CheckpointError(
                f"{self.directory}: found {found}, expected a directory with a checkpoint; "
                f"{how_to_download(self.directory)}"
            )
        self._headers: dict[Path, tuple[dict[str, TensorInfo], dict[str, str]]] = {}
        self._json: dict[str, dict[str, Any] | None] = {}
        self._sorted: list[str] | None = None
        index = self.directory / "model.safetensors.index.json"
        self._shard_of = self._read_index(index) if index.exists() else self._read_all_headers()

    def names(self) -> Mapping[str, Path]:
        """Every tensor's name, and the shard that should hold it."""
        return self._shard_of

    def under(self, prefix: str) -> set[str]:
        """The names that start with ``prefix``; found fast, for it is asked for each module of thousands."""
        if self._sorted is None:
            self._sorted = sorted(self._shard_of)
        start, end = (bisect.bisect_left(self._sorted, bound) for bound in (prefix, prefix + chr(0x10FFFF)))
        return set(self._sorted[start:end])

    def info(self, name: str) -> TensorInfo:
        """Looks a tensor up in its shard's header.

        Raises:
          CheckpointError: no shard has it, or its shard is missing or malformed.
        """
        shard = self._shard_of.get(name)
        if shard is None:
            raise CheckpointError(f"{self.directory}: {name}: found no such tensor, expected it in a shard")
        header, _ = self._header(shard)
        if name not in header:
            raise CheckpointError(f"{shard}: {name}: found no such tensor, but the index says that it is in this file")
        return header[name]

    def metadata(self, name: str) -> dict[str, str]:
        """The metadata of the file that holds a tensor; errors as :meth:`info`."""
        return self._header(self.info(name).file)[1]

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in the file ``name`` of the directory, or None if there is no such file.

        Raises:
          CheckpointError: the file holds something else.
        """
        if name not in self._json:
            path = self.directory / name
            self._json[name] = read_json(path) if path.exists() else None
        return self._json[name]

    def _header(self, shard: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        if shard not in self._headers:
            self._headers[shard] = read_header(shard)
        return self._headers[shard]

    def _read_all_headers(self) -> dict[str, Path]:
        single = self.directory / "model.safetensors"
        shards = [single] if single.exists() else sorted(self.directory.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(
                f"{self.directory}: found no *.safetensors file, expected a checkpoint; "
                f"{how_to_download(self.directory)}"
            )
        shard_of: dict[str, Path] = {}
        for shard in shards:
            for name in self._header(shard)[0]:
                if name in shard_of:
                    raise CheckpointError(
                        f"{shard}: {name}: found this tensor in {shard_of[name].name} too, expected it once"
                    )
                shard_of[name] = shard
        return shard_of

    def _read_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(entry, str) for entry in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map: found {brief(weight_map)}, expected an object of file names")
        _check_names(index, weight_map)
        shards = {entry: self._shard(index, entry) for entry in set(weight_map.values())}
        return {name: shards[entry] for name, entry in weight_map.items()}

    def _shard(self, index: Path, entry: str) -> Path:
        # The file itself may be a symbolic link: a Hugging Face cache links each to ../../blobs/<hash>. The
        # *entry*, which came with the download, may not lead anywhere else: not by "..", not by a linked folder.
        relative = PurePosixPath(entry)
        if not entry or "\0" in entry or "\\" in entry or relative.is_absolute() or ".." in relative.parts:
            raise CheckpointError(f"{index}: found the file name {brief(entry)}, expected one inside {self.directory}")
        shard = self.directory / relative
        root = self.directory.resolve()
        if shard == self.directory or not shard.parent.resolve().is_relative_to(root):
            raise CheckpointError(f"{index}: found the file name {brief(entry)}, which leads outside {self.directory}")
        return shard


def expand_home(path: str | os.PathLike[str]) -> Path:
    """The path, "~" at its start being the home directory: a shell expands it in few places, Python nowhere."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # "~somebody" of nobody
        raise CheckpointError(f"{path}: found no such home directory ({error}), expected a path") from None


def how_to_download(directory: Path) -> str:
    """What to do about a checkpoint that is not there, or not whole."""
    return (
        "`pip install huggingface_hub`, then `hf download OWNER/MODEL --local-dir "
        f"{shlex.quote(str(directory))}` downloads a published one (config.json, *.safetensors and its tokenizer)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      CheckpointError: it is missing, too large, or something else.
    """
    size = _regular_file_size(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: found {size} bytes, expected at most {MAX_JSON_BYTES}")
    return parse_json_object(path.read_bytes(), str(path))


def parse_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parses a JSON object without repeated keys; :class:`CheckpointError`, naming ``what``, for anything else."""
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a repeated key, a huge integer
        raise CheckpointError(
            f"{what}: found something that is not JSON ({brief(str(error))}), expected an object"
        ) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{what}: found {brief(parsed)}, expected a JSON object")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} repeats")
    return result


def _regular_file_size(path: Path) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: found no such file ({error}), expected it in the checkpoint; if its download is not complete, "
            f"{how_to_download(path.parent)}"
        ) from None
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would hang
        raise CheckpointError(f"{path}: found something that is not a regular file")
    return status.st_size


def _check_names(path: Path, names: Iterable[str]) -> None:
    for name in names:
        # Names end up in messages, on terminals.
        if len(name) > 512 or not name.isprintable():
            raise CheckpointError(
                f"{path}: found the tensor name {brief(name)}, expected up to 512 printable characters"
            )


def _tensor_info(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(
            f"{path}: {name}: found {brief(entry)}, expected a dtype, a shape and two data_offsets of integers >= 0"
        )
    begin, end = offsets
    if not begin <= end <= size - start:
        raise CheckpointError(
            f"{path}: {name}: found data_offsets {brief(offsets)}, expected them in order within {size - start} bytes "
            "of data; the file is truncated or its header is wrong"
        )
    if dtype in _DTYPES:
        expected = math.prod(shape) * _DTYPES[dtype].itemsize
        if end - begin != expected:
            raise CheckpointError(
                f"{path}: {name}: found {end - begin} bytes, expected {brief(expected)} for {dtype} {brief(shape)}"
            )
    return TensorInfo(path, name, dtype, tuple(shape), start + begin, end - begin)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    # At most 8 axes: the product of a hostile million of them would itself take the memory of one.
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_coverage(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    position, previous = start, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            relation = "overlaps" if info.offset < position else "leaves a hole after"
            raise CheckpointError(
                f"{path}: {info.name}: found its data at byte {info.offset}, which {relation} {previous}, "
                f"expected byte {position}"
            )
        position, previous = info.offset + info.nbytes, info.name
    if position != size:
        raise CheckpointError(
            f"{path}: found {size} bytes, expected {position}: the last tensor, {previous}, ends there"
        )


def brief(value: Any) -> str:
    """``repr`` for a message: a hostile file must not make a message of megabytes."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, or deep nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."
