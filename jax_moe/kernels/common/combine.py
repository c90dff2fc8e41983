"""The ordered combine: adds up each token's contributions in slot order, in fp32, rounded once."""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import BFloat16, Float32, Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.common import ptx
from jax_moe.kernels.common.memory import array, pointer

VALUES_PER_THREAD = 4
SLOTS_AT_ONCE = 8


def entry(spec):
    """``(jit function, example arguments)`` of a ``CombineSpec``."""
    out = BFloat16 if spec.out_dtype == "bfloat16" else Float32
    i32 = Int32(0)
    arguments = (pointer(Float32), pointer(Int32), pointer(Int32), pointer(out), i32, i32, i32, i32, cuda.CUstream(0))
    return _Combine(spec).launch, arguments


class _Combine:
    def __init__(self, spec):
        self.bf16 = spec.out_dtype == "bfloat16"
        self.threads = spec.threads

    @cute.jit
    def launch(
        self, contributions: cute.Pointer, expert_ids: cute.Pointer, expert_offset: cute.Pointer, out: cute.Pointer,
        T: Int32, K: Int32, H: Int32, local_experts: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        blocks = (T * (H // VALUES_PER_THREAD) + self.threads - 1) // self.threads
        self.kernel(contributions, expert_ids, expert_offset, out, T, K, H, local_experts).launch(
            grid=(blocks, 1, 1), block=(self.threads, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self, contributions: cute.Pointer, expert_ids: cute.Pointer, expert_offset: cute.Pointer, out: cute.Pointer,
        T: Int32, K: Int32, H: Int32, local_experts: Int32,
    ):  # fmt: skip
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        vectors = H // VALUES_PER_THREAD
        index = block * self.threads + tid
        if index < T * vectors:
            token = index // vectors
            vector = index - token * vectors
            ids, first = array(expert_ids), array(expert_offset)[0]
            sums = [Float32(0.0) for _ in range(VALUES_PER_THREAD)]
            # All loads of a batch are issued before the first is used; a slot that is not local adds nothing.
            for first_slot in cutlass.range(0, K, SLOTS_AT_ONCE, unroll=1):
                batch = []
                for i in cutlass.range_constexpr(SLOTS_AT_ONCE):
                    slot = first_slot + i
                    route = token * K + slot
                    wanted = Int32(0)
                    if slot < K:
                        expert = Int64(ids[route]) - Int64(first)
                        if expert >= 0 and expert < local_experts:
                            wanted = Int32(1)
                    address = Int64(contributions.toint()) + (Int64(route) * vectors + vector) * 16
                    batch.append(ptx.load_global_f32x4(address, wanted))
                for values in batch:
                    sums = [total + value for total, value in zip(sums, values, strict=True)]
            position = Int64(index) * VALUES_PER_THREAD
            if cutlass.const_expr(self.bf16):
                words = (ptx.pack_bf16x2(sums[0], sums[1]), ptx.pack_bf16x2(sums[2], sums[3]))
                ptx.store_global(Int64(out.toint()) + position * 2, words)
            else:
                ptx.store_global_f32x4(Int64(out.toint()) + position * 4, sums)
