"""A kernel that keeps an array on its stack, for tests/test_compile_cache.py; needs the DSL."""

import dataclasses

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32
import cutlass.cute as cute

from jax_moe.kernels.common.memory import array, pointer

VALUES = 32
_THREADS = 128


class _Spilling:
    @cute.jit
    def launch(self, values: cute.Pointer, steps: Int32, stream: cuda.CUstream):
        self.kernel(values, steps).launch(grid=(1, 1, 1), block=(_THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, values: cute.Pointer, steps: Int32):
        tid, _, _ = cute.arch.thread_idx()
        mine, all_values = cute.make_rmem_tensor(VALUES, Float32), array(values)
        for i in cutlass.range_constexpr(VALUES):
            mine[i] = all_values[i * _THREADS + tid]
        for step in cutlass.range(0, steps, unroll=1):
            mine[step * 7 % VALUES] = mine[step * 7 % VALUES] + mine[step * 13 % VALUES]
        for i in cutlass.range_constexpr(VALUES):
            all_values[i * _THREADS + tid] = mine[i]


@dataclasses.dataclass(frozen=True)
class Spec:
    """As ``jax_moe.kernels.compile`` wants one."""

    name = "spilling"

    def entry(self):
        return _Spilling().launch, (pointer(Float32), Int32(1), cuda.CUstream(0))
