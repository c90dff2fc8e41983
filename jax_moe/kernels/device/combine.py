"""The ordered combine: adds up each token's contributions in slot order, in fp32, rounded once."""

import cutlass
from cutlass import Float32, Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device import entry, ptx
from jax_moe.kernels.device.entry import array

VALUES_PER_THREAD = 4
SLOTS_AT_ONCE = 8


class Combine(entry.Kernel):
    """One thread for each four values of the output; see the module."""

    @cute.kernel
    def kernel(self, given):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        K = given.top_k
        vectors = given.hidden_size // VALUES_PER_THREAD
        index = cta * self.spec.threads + tid
        if index < given.num_tokens * vectors:
            token = index // vectors
            vector = index - token * vectors
            ids, first = array(given.expert_ids), array(given.expert_offset)[0]
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
                        if expert >= 0 and expert < given.local_experts:
                            wanted = Int32(1)
                    address = Int64(given.contributions.toint()) + (Int64(route) * vectors + vector) * 16
                    batch.append(ptx.load_global_f32x4(address, wanted))
                for values in batch:
                    sums = [total + value for total, value in zip(sums, values, strict=True)]
            position = Int64(index) * VALUES_PER_THREAD
            if cutlass.const_expr(self.spec.out_dtype == "bfloat16"):
                words = (ptx.pack_bf16x2(sums[0], sums[1]), ptx.pack_bf16x2(sums[2], sums[3]))
                ptx.store_global(Int64(given.out.toint()) + position * 2, words)
            else:
                ptx.store_global_f32x4(Int64(given.out.toint()) + position * 4, sums)
