"""The pass over x that makes the rows GEMM1 multiplies, where those are not x itself (``kernels/README.md``).

A thread takes one block of 16 values: 32 bytes in, and 32 bytes, or 8 of codes and one scale, out.
"""

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
import cutlass.cute as cute

from jax_moe.kernels.device import entry, epilogue, ptx
from jax_moe.kernels.device.entry import array

_BLOCK = 16  # as nvfp4.BLOCK_SIZE, which is host code


class Pass(entry.Kernel):
    """``row_divisor``: row r comes from token r / row_divisor; ``row_blocks``: H / 16."""

    def _place(self):
        """Index of this thread."""
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        return cta * self.spec.threads + tid

    def _load(self, given, row, column):
        """A block of x, weighted as the spec says: the 16 bf16 values as they were loaded, and what they are now."""
        source = self._block(given.x, (row // given.row_divisor) * given.row_blocks + column)
        loaded = cute.make_rmem_tensor(_BLOCK, BFloat16)
        cute.autovec_copy(source, loaded)
        values = [Float32(loaded[i]) for i in range(_BLOCK)]
        if self.spec.per_route:
            weight = array(given.routing_weights)[row]
            # Rounded to bf16 also where it is quantised next: that is what GEMM1 sees without quantisation.
            values = [Float32(BFloat16(value * weight)) for value in values]
        return loaded, values

    def _block(self, base: cute.Pointer, index):
        """16 values as a tensor; aligned to 16 bytes like ``base``."""
        return cute.make_tensor((base + Int64(index) * _BLOCK).align(16), cute.make_layout(_BLOCK))


class XRows(Pass):
    """x, weighted and quantised as the spec says, as bf16."""

    @cute.kernel
    def kernel(self, given):
        index = self._place()
        is_mine = index < given.num_rows * given.row_blocks
        if not is_mine:
            index = Int32(0)  # whole warps stay together: the rounding exchanges values between lanes
        row = index // given.row_blocks
        loaded, values = self._load(given, row, index - row * given.row_blocks)
        group = Int32(0)
        if cutlass.const_expr(self.spec.per_group):
            group = array(given.row_group)[row]
            if group < 0:  # nobody multiplies this row
                group, is_mine = Int32(0), False
        if cutlass.const_expr(self.spec.quantise):
            scale = array(given.input_scale)[group]
            (values,) = epilogue.round_blocks([values], scale, lane=Int32(0), lanes=1, stride=1)
        for i in cutlass.range_constexpr(_BLOCK):
            loaded[i] = BFloat16(values[i])
        if is_mine:
            cute.autovec_copy(loaded, self._block(given.x_rows, index))


class XCodes(Pass):
    """x, weighted as the spec says, as NVFP4: u8[rows, 8 * padded_blocks] codes and u8[rows, padded_blocks] scales.

    ``padded_blocks``: blocks of a row of these; those behind ``row_blocks`` are zeros.
    """

    @cute.kernel
    def kernel(self, given):
        cute.arch.griddepcontrol_launch_dependents()
        if cutlass.const_expr(self.spec.per_group):
            cute.arch.griddepcontrol_wait()  # the kernel in front says which group a row is of
        index = self._place()
        if index < given.num_rows * given.padded_blocks:
            row = index // given.padded_blocks
            column = index - row * given.padded_blocks
            self._store(given, index, row, column)
        if cutlass.const_expr(not self.spec.per_group):
            cute.arch.griddepcontrol_wait()  # nothing here needs the sort, but who waits for this kernel does

    @cute.jit
    def _store(self, given, index, row, column):
        group = Int32(0)
        if cutlass.const_expr(self.spec.per_group):
            group = array(given.row_group)[row]
        if group >= 0:  # nobody multiplies other rows
            low, high, scale = Uint32(0), Uint32(0), Uint32(0)
            if column < given.row_blocks:
                low, high, scale = self._quantised(given, row, column, group)
            ptx.store_global(Int64(given.x_codes.toint()) + Int64(index) * (_BLOCK // 2), (low, high))
            ptx.store_global_bytes(Int64(given.x_scales.toint()) + Int64(index), scale, 1)

    def _quantised(self, given, row, column, group):
        _, values = self._load(given, row, column)
        return epilogue.quantise_block(values, array(given.input_scale)[group])
