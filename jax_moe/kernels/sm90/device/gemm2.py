"""GEMM2 of sm_90a: the intermediate times down -> out (atomic) or contributions (ordered)."""

import cutlass
from cutlass import Float32, Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device import bf16_weights, outputs, ptx
from jax_moe.kernels.sm90.device import mainloop
from jax_moe.kernels.sm90.device.mainloop import EPILOGUE, TOKEN_ROW_BYTES, WARPGROUP


class Gemm2(mainloop.Gemm):
    """Multiplies the intermediate with down and adds (atomic) or stores (ordered) the weighted rows."""

    arrays = (*mainloop.TILE_MAP, "row_weight", "routing_weights", "global_scale", "input_scale", "bias")
    reads_early = True  # GEMM1 has waited for the sort, but has not ended: nor do the consumers ever wait

    def _full_arrivals(self):
        return 1

    def _allocate_rows(self, smem):
        size = self.config.m_warpgroups * self.n
        return self._array(smem, Int32, size), self._array(smem, Float32, size)

    def _prefetch_epilogue(self, op, unit, tid):
        """Routes and weights of token rows ``tid``, ``tid + 128``; used after the main loop has hidden the loads."""
        return tuple(self._load_row(op, unit, first + tid) for first in range(0, self.n, WARPGROUP))

    @cute.jit
    def _load_row(self, op, unit, row):
        route, weight = Int32(-1), Float32(0.0)
        if row < self.n:
            route = self._route(op, unit.token_tile, row)
            weight = self._weight(op, unit.token_tile, row, route)
        return route, weight

    @cute.jit
    def _weight(self, op, token_tile, row, route):
        weight = Float32(1.0)
        if cutlass.const_expr(not self.spec.maps_routes):
            weight = self.read(op.row_weight, token_tile * self.n + row)
        elif cutlass.const_expr(self.spec.weighted):
            if route >= 0:
                weight = op.routing_weights[route]
        return weight

    @cute.jit
    def _share_row(self, op, shared, me, row, route, weight):
        """Gives this warpgroup's threads the output row and weight of a token row."""
        if row < self.n:
            out_row = Int32(-1)
            if route >= 0:
                out_row = route // op.row_divisor
            shared.rows[0][me.m_warpgroup * self.n + row] = out_row
            shared.rows[1][me.m_warpgroup * self.n + row] = weight

    @cute.jit
    def _produce(self, op, shared, tid):
        """One thread: everything is a bulk copy, because GEMM1 stored its result as tiles in shared-memory order."""
        index, ctas = self._first_unit()
        first, end = self._part(op)
        if tid == 0:
            slot, phase = Int32(0), Int32(1)
            units = self._num_units(op)
            early = Int32(0)  # end of the first unit's blocks whose weights are asked for before GEMM1 has ended
            if index < units:
                early = min(end, first + self.stages * self.blocks)
                unit = self._unit(op, index)
                width = self._width(op, unit)
                for k_block in cutlass.range(first, early, self.blocks, unroll=1):
                    self._begin_stage(op, shared, (k_block - first) // self.blocks, unit, width, k_block, first, end)
            cute.arch.griddepcontrol_wait()
            while index < units:
                unit = self._unit(op, index)
                width = self._width(op, unit)
                taken = self._take(op, index, 1, ctas)
                for k_block in cutlass.range(first, end, self.blocks, unroll=1):
                    cute.arch.mbarrier_wait(shared.barriers + self.stages + slot, phase)
                    if k_block >= early:
                        self._begin_stage(op, shared, slot, unit, width, k_block, first, end)
                    self._copy_tokens(op, shared, slot, unit, width, k_block, end)
                    slot, phase = self._next(slot, phase)
                index, early = taken, Int32(0)
            self._finish(shared, slot, phase, tid)

    @cute.jit
    def _begin_stage(self, op, shared, slot, unit, width, k_block, first, end):
        """Announces a stage, and with a unit's first one the unit; copies its weights."""
        if k_block == first:
            self._tell(shared, slot, (unit.expert, unit.m_tile, unit.token_tile, width))
        count = min(end - k_block, self.blocks)
        self._copy_weights(op, shared, slot, unit, k_block, count, width * TOKEN_ROW_BYTES)

    @cute.jit
    def _copy_tokens(self, op, shared, slot, unit, width, k_block, end):
        """The first ``width`` rows of each block: nobody has written those behind, and nobody multiplies them."""
        count = min(end - k_block, self.blocks)
        source = Int64(op.h.toint()) + (Int64(unit.token_tile) * op.h_blocks + k_block) * self.token_bytes
        place = Int32(shared.tokens.iterator.toint()) + slot * (self.blocks * self.token_bytes)
        full = Int32((shared.barriers + slot).toint())
        if width == self.n:  # the blocks are neighbours
            ptx.bulk_copy(place, source, count * self.token_bytes, full)
        else:
            for i in cutlass.range(count, unroll=1):
                start = i * self.token_bytes
                ptx.bulk_copy(place + start, source + start, width * TOKEN_ROW_BYTES, full)

    @cute.jit
    def _epilogue(self, op, shared, me, unit, prefetched, accumulators, width: cutlass.Constexpr):
        warp, group, quad = me.tid // 32, me.tid % 32 // 4, me.tid % 4
        row_block = unit.m_tile * self.config.m_warpgroups + me.m_warpgroup
        mine = me.m_warpgroup * self.n
        barrier = me.m_warpgroup + EPILOGUE
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)  # the unit before this one has been stored
        for i in cutlass.range_constexpr(len(prefetched)):
            self._share_row(op, shared, me, i * WARPGROUP + me.tid, *prefetched[i])
        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP)
        feature = row_block * bf16_weights.BLOCK_ROWS + 32 * warp + 4 * group
        if feature < op.hidden_size:
            self._store(op, shared, unit, mine + 2 * quad, feature, accumulators, width)

    def _store(self, op, shared, unit, first_row, feature, accumulators, width):
        unscale = 2.0**-bf16_weights.WEIGHT_LOG2
        made = outputs.contribution(op, self.spec, unit.expert, feature, op.hidden_size, unscale)
        for j in range(width // 8):
            for c in range(2):
                row = first_row + 8 * j + c
                out_row, weight = shared.rows[0][row], shared.rows[1][row]
                outputs.store_contribution(self.spec, made, accumulators, j, c, out_row, weight)
