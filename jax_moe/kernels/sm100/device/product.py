"""The grouped product of sm_100f: x rows, gathered as GEMM1 does, times the matrices of their groups -> out."""

import cutlass
from cutlass import Int32
import cutlass.cute as cute

from jax_moe.kernels.device import outputs
from jax_moe.kernels.device.bf16_weights import BLOCK_ROWS
from jax_moe.kernels.device.entry import named
from jax_moe.kernels.sm100.device import gemm1


class Product(gemm1.Gemm1):
    """GEMM1's loads, with an epilogue that stores each row of the output once."""

    arrays = ("row_route", "tile_expert", "expert_tiles", "group_ends", "global_scale", "input_scale", "bias")

    def _operands(self, given):
        """With the names that GEMM1 gives x's rows: a row comes from the row of its own number."""
        return named(hidden_size=given.in_features, row_divisor=Int32(1), **super()._operands(given)._asdict())

    # The loads wait for the kernels in front. Who gathers and who stores reads what these wrote, too: each waits for
    # itself (kernels/README.md, Order).

    @cute.jit
    def _gather_all(self, op, shared, tid):
        cute.arch.griddepcontrol_wait()
        gemm1.Gemm1._gather_all(self, op, shared, tid)

    @cute.jit
    def _store_all(self, op, shared, base, tid):
        cute.arch.griddepcontrol_wait()
        gemm1.Gemm1._store_all(self, op, shared, base, tid)

    @cute.jit
    def _store_unit(self, op, shared, sums, unit, tid):
        warp, group, quad = tid // 32, tid % 32 // 4, tid % 4
        feature = unit.m_block * BLOCK_ROWS + 32 * warp + 4 * group
        # Rows of a group are neighbours: where the tile's first comes from says where all its rows go.
        first, end = op.row_route[unit.token_tile * self.n] + 2 * quad, op.group_ends[unit.expert]
        if feature >= op.out_features:  # the whole warp loads sums together; what is outside is not stored
            feature, end = Int32(0), Int32(0)
        made = outputs.contribution(op, self.spec, unit.expert, feature, op.out_features, self.unscale)
        whole = unit.width // 32 * 32
        if cutlass.const_expr(self.n >= 32):
            for column in cutlass.range(0, whole, 32, unroll=1):
                self._store_rows(made, sums, column, first, end, 4)
        for column in cutlass.range(whole, unit.width, 8, unroll=1):
            self._store_rows(made, sums, column, first, end, 1)

    def _store_rows(self, made, sums, column, first, end, blocks):
        fragments = self._fragments(sums, column, blocks)
        for j in range(blocks):
            for c in range(2):
                outputs.store_product(self.spec, made, fragments, j, c, first + column + 8 * j + c, end)
