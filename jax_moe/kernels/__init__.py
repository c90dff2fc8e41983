"""The GPU kernels: their specs, their compilation and what a call launches (``ABI.md``)."""

import ctypes
from typing import NamedTuple


class Counters(NamedTuple):
    """Calls that the CUDA handler has enqueued since the library was loaded, on all devices.

    A replay of a command buffer is no call: nobody calls the handler then. Programs of fewer than five operations that
    may be captured stay eager (``xla_gpu_graph_min_graph_size``), and so do all while a profiler is active.

    Attributes:
      eager: on a stream, in order.
      captured: recorded by XLA into a command buffer.
      forked: of those captured, the ones whose zeroing became a branch of its own, beside GEMM1.
    """

    eager: int
    captured: int
    forked: int


def counters() -> Counters:
    """What the handler has done so far; tells whether calls are captured and the zeroing is overlapped."""
    from jax_moe import ffi

    values = (ctypes.c_int64 * len(Counters._fields))()
    ffi.library().JaxMoeCudaCounters(values)
    return Counters(*values)
