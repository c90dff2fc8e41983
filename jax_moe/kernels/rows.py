"""The pass over x that makes the rows GEMM1 multiplies, where those are not x itself (``ABI.md``, ``x_rows``).

A thread takes one block of 16 values: 32 bytes in, 32 bytes out.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import BFloat16, Float32, Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels import specs
from jax_moe.kernels.common import epilogue
from jax_moe.kernels.common.memory import array, pointer

_BLOCK = 16  # as nvfp4.BLOCK_SIZE; not imported, because the kernel cache is keyed by the sources of this package alone


class Rows:
    """x, weighted and quantised as the spec says."""

    def __init__(self, spec: specs.RowsSpec):
        self.spec = spec

    def entry(self):
        arguments = (
            pointer(BFloat16), pointer(Float32), pointer(Float32), pointer(BFloat16), Int32(1), Int32(1), Int32(1),
            Int32(1), cuda.CUstream(0),
        )  # fmt: skip
        return self.launch, arguments

    @cute.jit
    def launch(
        self, x: cute.Pointer, routing_weights: cute.Pointer, input_scale: cute.Pointer, x_rows: cute.Pointer,
        num_rows: Int32, row_divisor: Int32, row_blocks: Int32, grid: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        """``row_divisor``: row r comes from token r / row_divisor; ``row_blocks``: H / 16."""
        self.kernel(x, routing_weights, input_scale, x_rows, num_rows, row_divisor, row_blocks).launch(
            grid=(grid, 1, 1), block=(self.spec.threads, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self, x: cute.Pointer, routing_weights: cute.Pointer, input_scale: cute.Pointer, x_rows: cute.Pointer,
        num_rows: Int32, row_divisor: Int32, row_blocks: Int32,
    ):  # fmt: skip
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        index = cta * self.spec.threads + tid
        is_mine = index < num_rows * row_blocks
        if not is_mine:
            index = Int32(0)  # whole warps stay together: the rounding exchanges values between lanes
        row = index // row_blocks
        column = index - row * row_blocks
        source = self._block(x, (row // row_divisor) * row_blocks + column)
        loaded = cute.make_rmem_tensor(_BLOCK, BFloat16)
        cute.autovec_copy(source, loaded)
        values = [Float32(loaded[i]) for i in range(_BLOCK)]
        if cutlass.const_expr(self.spec.per_route):
            weight = array(routing_weights)[row]
            # Rounded to bf16 also where it is quantised next: that is what GEMM1 sees without quantisation.
            values = [Float32(BFloat16(value * weight)) for value in values]
        if cutlass.const_expr(self.spec.quantise):
            (values,) = epilogue.round_blocks([values], array(input_scale)[0], lane=Int32(0), lanes=1, stride=1)
        for i in cutlass.range_constexpr(_BLOCK):
            loaded[i] = BFloat16(values[i])
        if is_mine:
            cute.autovec_copy(loaded, self._block(x_rows, index))

    def _block(self, base: cute.Pointer, index):
        """16 values as a tensor; aligned to 16 bytes like ``base``."""
        return cute.make_tensor((base + Int64(index) * _BLOCK).align(16), cute.make_layout(_BLOCK))
