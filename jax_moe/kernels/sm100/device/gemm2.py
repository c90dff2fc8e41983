"""GEMM2 of sm_100f: the intermediate times down -> out (atomic) or contributions (ordered)."""

import cutlass
from cutlass import Float32, Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device import outputs, ptx
from jax_moe.kernels.device.bf16_weights import BLOCK_ROWS
from jax_moe.kernels.sm100.device import mainloop
from jax_moe.kernels.sm100.device.mainloop import WARPGROUP
from jax_moe.kernels.sm100.device.weight_block import ROW_BYTES


class Gemm2(mainloop.Gemm):
    """Multiplies the intermediate with down and adds (atomic) or stores (ordered) the weighted rows."""

    arrays = ("row_route", "row_weight", "tile_expert", "expert_tiles", "global_scale", "input_scale", "bias")
    counter = 1
    early_weights = True  # the tile map is complete when GEMM2 starts, but GEMM1 has not ended: it is read early, too

    def _gather_warps(self):
        return 0

    def _allocate_rows(self, smem):
        return self._array(smem, Int32, self.n), self._array(smem, Float32, self.n)

    # -- loads: GEMM1 has stored its result in the order of shared memory ----------------------------------------

    def _token_bytes_loaded(self, unit):
        return unit.width // self.group * ROW_BYTES + self.token_scale_bytes

    @cute.jit
    def _copy_tokens(self, op, shared, slot, unit, k_block):
        full = Int32((shared.barriers + self.full + slot).toint())
        bytes_per_block = self.tile_bytes + self.token_scale_bytes
        source = Int64(op.h.toint()) + (Int64(unit.token_tile) * op.h_blocks + k_block) * bytes_per_block
        num_bytes = unit.width // self.group * ROW_BYTES
        first = Int64(shared.rank) * num_bytes
        place = shared.tokens + slot * (self.blocks * self.token_bytes)
        for _ in cutlass.range(self._count(op, k_block), unroll=1):
            ptx.bulk_copy(place, source + first, num_bytes, full)
            if cutlass.const_expr(self.is_fp4):  # a stage is one block
                scales = shared.token_scales + slot * self.token_scale_bytes
                ptx.bulk_copy(scales, source + self.tile_bytes, self.token_scale_bytes, full)
            place, source = place + self.token_bytes, source + bytes_per_block

    # -- epilogue -------------------------------------------------------------------------------------------------

    @cute.jit
    def _prepare_rows(self, op, shared, unit, tid):
        """Output rows and weights of the unit's tokens, while the products run."""
        rows = [tid + first for first in range(0, self.n, WARPGROUP)]
        loaded = [self._load_row(op, unit, row) for row in rows]
        cute.arch.barrier(barrier_id=mainloop.ROWS, number_of_threads=WARPGROUP)  # the unit before has been stored
        for i in cutlass.range_constexpr(len(rows)):
            if rows[i] < self.n:
                shared.rows[0][rows[i]] = loaded[i][0]
                shared.rows[1][rows[i]] = loaded[i][1]
        cute.arch.barrier(barrier_id=mainloop.ROWS, number_of_threads=WARPGROUP)

    @cute.jit
    def _load_row(self, op, unit, row):
        out_row, weight = Int32(-1), Float32(0.0)
        if row < unit.width:
            route = self.read(op.row_route, unit.token_tile * self.n + row)
            if route >= 0:
                out_row = route // op.row_divisor
                weight = self.read(op.row_weight, unit.token_tile * self.n + row)
        return out_row, weight

    @cute.jit
    def _store_unit(self, op, shared, sums, unit, tid):
        warp, group, quad = tid // 32, tid % 32 // 4, tid % 4
        feature = unit.m_block * BLOCK_ROWS + 32 * warp + 4 * group
        inside = feature < op.hidden_size
        if not inside:  # the whole warp loads sums together; what is outside is not stored
            feature = Int32(0)
        made = outputs.contribution(op, self.spec, unit.expert, feature, op.hidden_size, self.unscale)
        whole = unit.width // 32 * 32
        if cutlass.const_expr(self.n >= 32):
            for column in cutlass.range(0, whole, 32, unroll=1):
                self._store_columns(shared, made, sums, column, inside, quad, 4)
        for column in cutlass.range(whole, unit.width, 8, unroll=1):
            self._store_columns(shared, made, sums, column, inside, quad, 1)

    @cute.jit
    def _store_columns(self, shared, made, sums, column, inside, quad, blocks: cutlass.Constexpr):
        fragments = self._fragments(sums, column, blocks)
        for j in cutlass.range_constexpr(blocks):
            for c in cutlass.range_constexpr(2):
                row = column + 8 * j + 2 * quad + c
                out_row, weight = shared.rows[0][row], shared.rows[1][row]
                if not inside:
                    out_row = Int32(-1)
                outputs.store_contribution(self.spec, made, fragments, j, c, out_row, weight)
