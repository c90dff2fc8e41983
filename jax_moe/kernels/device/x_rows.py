"""The pass over x that makes the rows GEMM1 multiplies, where those are not x itself (``kernels/README.md``).

A thread takes one block of 16 values: 32 bytes in, 32 bytes out.
"""

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device import entry, epilogue
from jax_moe.kernels.device.entry import array

_BLOCK = 16  # as nvfp4.BLOCK_SIZE, which is host code


class XRows(entry.Kernel):
    """x, weighted and quantised as the spec says.

    ``row_divisor``: row r comes from token r / row_divisor; ``row_blocks``: H / 16.
    """

    @cute.kernel
    def kernel(self, given):
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        index = cta * self.spec.threads + tid
        is_mine = index < given.num_rows * given.row_blocks
        if not is_mine:
            index = Int32(0)  # whole warps stay together: the rounding exchanges values between lanes
        row = index // given.row_blocks
        column = index - row * given.row_blocks
        source = self._block(given.x, (row // given.row_divisor) * given.row_blocks + column)
        loaded = cute.make_rmem_tensor(_BLOCK, BFloat16)
        cute.autovec_copy(source, loaded)
        values = [Float32(loaded[i]) for i in range(_BLOCK)]
        if cutlass.const_expr(self.spec.per_route):
            weight = array(given.routing_weights)[row]
            # Rounded to bf16 also where it is quantised next: that is what GEMM1 sees without quantisation.
            values = [Float32(BFloat16(value * weight)) for value in values]
        if cutlass.const_expr(self.spec.quantise):
            (values,) = epilogue.round_blocks([values], array(given.input_scale)[0], lane=Int32(0), lanes=1, stride=1)
        for i in cutlass.range_constexpr(_BLOCK):
            loaded[i] = BFloat16(values[i])
        if is_mine:
            cute.autovec_copy(loaded, self._block(given.x_rows, index))

    def _block(self, base: cute.Pointer, index):
        """16 values as a tensor; aligned to 16 bytes like ``base``."""
        return cute.make_tensor((base + Int64(index) * _BLOCK).align(16), cute.make_layout(_BLOCK))
