"""A functional emulator of the PTX that our kernels emit: a test instrument, never a way to run them.

``run`` executes launches one after the other, or overlapping as they ask to, on a machine that chooses by a seed what
the model of PTX leaves open: which warp is next, and when asynchronous work takes effect. What nobody has written is
poison. README.md says what is modelled and what is not.
"""

from collections.abc import Mapping, Sequence
import ctypes
import dataclasses
import functools
from typing import Any, Literal

import numpy as np
from ptx import parser

from emulator import build
from emulator.encode import Encoder

Order = Literal["eager", "random", "starved"]
ORDERS: tuple[Order, ...] = ("eager", "random", "starved")


class EmulatorError(Exception):
    """What the machine found wrong with the kernels; the message names kernel, CTA, warp, line and instruction."""


class Array:
    """A buffer in global memory, in an address range of its own."""

    def __init__(self, data: np.ndarray, marks: np.ndarray, name: str, strict: bool):
        self._data, self._marks = data, marks  # marks: u8 for each byte, 1 where nothing was written
        self.name, self.strict = name, strict

    def read(self, *, partial: bool = False) -> np.ndarray:
        """A copy of the contents.

        Args:
          partial: do not mind elements that were never written; :attr:`written` says which they are.

        Raises:
          EmulatorError: an element was never written, or written with poison.
        """
        if not partial and not self.written.all():
            index = tuple(map(int, np.argwhere(~self.written)[0]))
            raise EmulatorError(f"{self.name}[{', '.join(map(str, index))}] of {self._data.shape} was never written")
        return self._data.copy()

    @property
    def written(self) -> np.ndarray:
        """bool, of the array's shape: whether all bytes of an element were written."""
        size = self._data.dtype.itemsize
        return (self._marks == 0).reshape(*self._data.shape, size).all(-1)


class Memory:
    """Global memory: arrays that outlive runs."""

    def __init__(self):
        self.arrays: list[Array] = []

    def array(self, values: Any, name: str | None = None, *, strict: bool = False) -> Array:
        """A buffer that holds ``values``. ``strict``: storing poison to it is an error, as for an output."""
        data = np.array(values, order="C")
        return self._add(data, np.zeros(data.nbytes, np.uint8), name, strict)

    def poisoned(self, shape: Sequence[int], dtype: Any, name: str | None = None, *, strict: bool = False) -> Array:
        """A buffer that nobody has written."""
        data = np.zeros(shape, dtype)
        data.reshape(-1).view(np.uint8).fill(0xC5)
        return self._add(data, np.ones(data.nbytes, np.uint8), name, strict)

    def _add(self, data: np.ndarray, marks: np.ndarray, name: str | None, strict: bool) -> Array:
        self.arrays.append(Array(data, marks, name or f"array {len(self.arrays)}", strict))
        return self.arrays[-1]


class Kernel:
    """A kernel from PTX; messages call it ``name``.

    Raises:
      ptx.parser.PTXError: the parser does not know the text.
      EmulatorError: the machine does not know an instruction.
    """

    def __init__(self, text: str, name: str | None = None):
        self.parsed = parser.parse(text)
        self.name = name or self.parsed.name
        self.parsed = dataclasses.replace(self.parsed, name=self.name)
        encoder = Encoder(self.parsed)
        self.parameter_bytes = encoder.parameter_bytes
        texts = b"".join(each.encode() + b"\0" for each in encoder.texts)
        self._program = _library().EmulatorProgram(
            encoder.words.ctypes.data, len(encoder.words), texts, len(encoder.texts)
        )
        if not self._program:
            raise EmulatorError(_last_error())

    def __del__(self):
        if getattr(self, "_program", None):
            _library().EmulatorFreeProgram(self._program)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
      kernel: what is launched.
      grid: CTAs.
      threads: of a CTA; None: those that the kernel was compiled for.
      cluster: CTAs of a cluster.
      shared_bytes: dynamic shared memory of a CTA.
      overlap: may start before the launch in front of it has ended (programmatic dependent launch).
      arguments: arrays, None for a null pointer, and integers.
      ctas_per_multiprocessor: most that are resident at once; None: as many as shared memory and threads allow.
    """

    kernel: Kernel
    grid: int
    arguments: Sequence[Array | int | None]
    threads: int | None = None
    cluster: int = 1
    shared_bytes: int = 0
    overlap: bool = False
    ctas_per_multiprocessor: int | None = None


class Counts:
    """How often warps executed the instructions of a launch.

    Attributes:
      kernel: as parsed.
      by_instruction: i64[instructions, warps of a CTA], summed over CTAs.
    """

    def __init__(self, kernel: parser.Kernel, by_instruction: np.ndarray):
        self.kernel, self.by_instruction = kernel, by_instruction

    def __int__(self) -> int:
        return int(self.by_instruction.sum())

    def by_operation(self, warps: slice | int = slice(None)) -> Mapping[str, int]:
        """Executed warp instructions by operation, of all warps of a CTA or of some of them."""
        counts: dict[str, int] = {}
        sums = self.by_instruction[:, warps].reshape(len(self.by_instruction), -1).sum(1)
        for instruction, count in zip(self.kernel.instructions, sums, strict=True):
            if count:
                counts[instruction.operation] = counts.get(instruction.operation, 0) + int(count)
        return counts


def run(
    launches: Sequence[Launch], memory: Memory, *, seed: int = 0, order: Order = "random", multiprocessors: int = 2,
    most_instructions: int = 500_000_000, check: bool = True, lanes: bool = True, written: bool = False,
) -> list[Counts]:  # fmt: skip
    """Runs launches in order, as one stream does.

    Args:
      launches: in order.
      memory: that holds their arrays.
      seed: of all that is left open.
      order: when asynchronous work takes effect: "eager" at once, "starved" only when no warp can go on, or "random".
      multiprocessors: of the machine.
      most_instructions: executed by all warps together.
      check: look for accesses that are not ordered (races), too.
      written: reading a byte of an array that nobody has written is an error, also where nothing comes of it.
      lanes: among them those of a warp's lanes for which another lane arrives at an mbarrier without a bar.warp.sync.

    Returns:
      for each launch what was executed.

    Raises:
      EmulatorError: an access outside of any buffer, a decision from poison, a race, a deadlock, ...
    """
    library = _library()
    call = library.EmulatorCall()
    try:
        addresses = {}
        for array in memory.arrays:
            data, marks = array._data, array._marks
            addresses[id(array)] = library.EmulatorBuffer(
                call, array.name.encode(), data.ctypes.data, marks.ctypes.data, data.nbytes, array.strict
            )
        counts = []
        for launch in launches:
            kernel = launch.kernel
            parameters = _parameters(kernel.parsed, launch.arguments, addresses)
            threads = launch.threads or kernel.parsed.threads or 0
            if kernel.parsed.threads not in (None, threads):
                raise ValueError(f"{kernel.name} was compiled for {kernel.parsed.threads} threads, not {threads}")
            if launch.grid % launch.cluster:
                raise ValueError(f"a grid of {launch.grid} CTAs has no clusters of {launch.cluster}")
            library.EmulatorGrid(
                call, kernel._program, launch.grid, threads, launch.cluster, launch.shared_bytes, launch.overlap,
                launch.ctas_per_multiprocessor or 0, parameters, len(parameters),
            )  # fmt: skip
            counts.append(np.zeros((len(kernel.parsed.instructions), -(-threads // 32)), np.int64))
        checks = check * (1 + lanes)
        failed = library.EmulatorRun(
            call, seed, ORDERS.index(order), multiprocessors, most_instructions, checks, written
        )
        if failed:
            raise EmulatorError(_last_error())
        for i, count in enumerate(counts):
            library.EmulatorCounts(call, i, count.ctypes.data)
        return [Counts(launch.kernel.parsed, count) for launch, count in zip(launches, counts, strict=True)]
    finally:
        library.EmulatorFreeCall(call)


def operations() -> list[str]:
    """All operations that the machine knows."""
    return _library().EmulatorOperations().decode().split()


def _parameters(kernel: parser.Kernel, arguments: Sequence[Array | int | None], addresses: Mapping[int, int]) -> bytes:
    if len(arguments) != len(kernel.parameters):
        raise ValueError(f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(arguments)}")
    table = bytearray()
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        table += bytes(parameter.offset - len(table))
        size = parser.TYPE_BYTES[parameter.type]
        value = addresses[id(argument)] if isinstance(argument, Array) else int(argument or 0)
        table += (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(table)


def _last_error() -> str:
    return _library().EmulatorLastError().decode(errors="replace")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.library()))
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.EmulatorLastError.restype = ctypes.c_char_p
    library.EmulatorOperations.restype = ctypes.c_char_p
    library.EmulatorProgram.argtypes = [pointer, i64, ctypes.c_char_p, i64]
    library.EmulatorProgram.restype = pointer
    library.EmulatorFreeProgram.argtypes = [pointer]
    library.EmulatorCall.restype = pointer
    library.EmulatorFreeCall.argtypes = [pointer]
    library.EmulatorBuffer.argtypes = [pointer, ctypes.c_char_p, pointer, pointer, i64, i32]
    library.EmulatorBuffer.restype = ctypes.c_uint64
    library.EmulatorGrid.argtypes = [pointer, pointer, i32, i32, i32, i64, i32, i32, ctypes.c_char_p, i64]
    library.EmulatorGrid.restype = None
    library.EmulatorRun.argtypes = [pointer, ctypes.c_uint64, i32, i32, i64, i32, i32]
    library.EmulatorCounts.argtypes = [pointer, i32, pointer]
    library.EmulatorCounts.restype = None
    return library
