"""A kernel that keeps an array on its stack, for tests/test_compile_cache.py; only the class needs the DSL."""

import dataclasses
from typing import ClassVar

try:
    import cutlass
    from cutlass import Float32
    import cutlass.cute as cute

    from jax_moe.kernels.device import entry
except ImportError:
    pass

VALUES = 32


@dataclasses.dataclass(frozen=True)
class Spec:
    """As ``jax_moe.kernels.specs.Spec`` says."""

    name = "spilling"
    implementation = "spilling_kernel:Spilling"
    parameters: ClassVar[dict[str, str]] = {"values": "f32*", "steps": "i32"}
    threads = 128
    cluster = 1
    overlap = False
    tensor_core_ptx = None


if "entry" in globals():

    class Spilling(entry.Kernel):
        @cute.kernel
        def kernel(self, given):
            tid, _, _ = cute.arch.thread_idx()
            mine, values = cute.make_rmem_tensor(VALUES, Float32), entry.array(given.values)
            for i in cutlass.range_constexpr(VALUES):
                mine[i] = values[i * self.spec.threads + tid]
            for step in cutlass.range(0, given.steps, unroll=1):
                mine[step * 7 % VALUES] = mine[step * 7 % VALUES] + mine[step * 13 % VALUES]
            for i in cutlass.range_constexpr(VALUES):
                values[i * self.spec.threads + tid] = mine[i]
