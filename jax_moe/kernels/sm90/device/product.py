"""The grouped product of sm_90a: x rows, gathered as GEMM1 does, times the matrices of their groups -> out."""

from cutlass import Float32, Int32
import cutlass.cute as cute

from jax_moe.kernels.device import bf16_weights, outputs
from jax_moe.kernels.device.entry import named
from jax_moe.kernels.sm90.device import gemm1


class Product(gemm1.Gemm1):
    """GEMM1's producer, with an epilogue that stores each row of the output once."""

    arrays = ("row_route", "tile_expert", "expert_tiles", "group_ends", "global_scale", "input_scale", "bias")

    consumers_wait = True  # they read the tile map too

    def _operands(self, given):
        """With the names that GEMM1 gives x's rows: a row comes from the row of its own number."""
        return named(hidden_size=given.in_features, row_divisor=Int32(1), **super()._operands(given)._asdict())

    def _allocate_rows(self, smem):
        return None

    def _prefetch_epilogue(self, op, unit, tid):
        """The first row of the tile, and the one behind its group's last: rows of a group are neighbours."""
        return op.row_route[unit.token_tile * self.n], op.group_ends[unit.expert]

    @cute.jit
    def _epilogue(self, op, shared, me, unit, prefetched, accumulators, width):
        warp, group, quad = me.tid // 32, me.tid % 32 // 4, me.tid % 4
        row_block = unit.m_tile * self.config.m_warpgroups + me.m_warpgroup
        feature = row_block * bf16_weights.BLOCK_ROWS + 32 * warp + 4 * group
        if feature < op.out_features:
            first, end = prefetched
            self._store(op, unit, first + 2 * quad, end, feature, accumulators, width)

    def _store(self, op, unit, first, end, feature, accumulators, width):
        unscale = 2.0**-bf16_weights.WEIGHT_LOG2
        made = outputs.contribution(op, self.spec, unit.expert, feature, op.out_features, unscale)
        for j in range(width // 8):
            for c in range(2):
                row = first + 8 * j + c
                scale = self._row_scale(op, row, end) if self.is_dynamic else None
                outputs.store_product(self.spec, made, accumulators, j, c, row, end, scale)

    @cute.jit
    def _row_scale(self, op, row, end) -> Float32:
        scale = Float32(0.0)
        if row < end:
            scale = op.input_scale[row]
        return scale
