"""The product with one matrix: x rows times the matrix -> out, without a kernel in front of it.

Rows are in tiles by their numbers, so that there is no tile map: the units are known, and alike. Where they are few,
the CTAs of a cluster share one (``spec.split``): each sums a part of the contraction, and then gives each of the others
the sums of the tokens which that one stores. A cluster has one unit. Who waits for whom, beyond ``mainloop.py``'s
table:

    the cluster's barrier, once    all threads: stages are read no more, and sums may be written where they were
    the cluster's barrier, again   all threads: the sums are there
"""

import cutlass
from cutlass import Float32, Int32
import cutlass.cute as cute

from jax_moe.kernels.device import bf16_weights, outputs, ptx
from jax_moe.kernels.device.entry import named
from jax_moe.kernels.sm90.device import gemm1
from jax_moe.kernels.sm90.device.mainloop import WARPGROUP

_SUMS = 8  # that a thread has of 8 tokens


class Linear(gemm1.Gemm1):
    """GEMM1's producer, units by their numbers, and an epilogue that stores each element of the output once."""

    arrays = ("group_sizes", "group_offset", "global_scale", "input_scale", "bias")

    def __init__(self, spec):
        super().__init__(spec)
        self.split = spec.split
        self.shares = -(-self.n // 8 // self.split)  # 8 tokens each: of a tile's sums what one CTA stores, at most

    def _operands(self, given):
        """With the names that GEMM1 gives x's rows: a row comes from the row of its own number."""
        op = super()._operands(given)
        return named(
            hidden_size=op.in_features, row_divisor=Int32(1), end=self._end(op),
            token_tiles=(op.num_rows + self.n - 1) // self.n, **op._asdict(),
        )  # fmt: skip

    @cute.jit
    def _end(self, op) -> Int32:
        """The rows from there on are zeros, whatever they are multiplied with. Any int32 may be a size or an offset."""
        end = op.group_sizes[0]
        if op.group_offset[0] != 0:
            end = Int32(0)
        return end

    # -- units --------------------------------------------------------------------------------------------------

    def _num_units(self, op):
        return op.m_tiles * op.token_tiles

    def _first_unit(self):
        index = super()._first_unit()
        return index // self.split if self.split > 1 else index

    def _take(self, op, index, gemm, ctas):
        return index + ctas  # of a cluster none: there are at least as many CTAs as units

    def _unit(self, op, index):
        """Token tiles run fastest, so that CTAs that run together share weights."""
        m_tile = index // op.token_tiles
        return named(expert=Int32(0), m_tile=m_tile, token_tile=index - m_tile * op.token_tiles)

    @cute.jit
    def _route(self, op, token_tile, row):
        route = token_tile * self.n + row
        if route >= op.num_rows:
            route = Int32(-1)
        return route

    def _part(self, op):
        if self.split == 1:
            return super()._part(op)
        rank = self._rank()
        return rank * op.k_blocks // self.split, (rank + 1) * op.k_blocks // self.split

    # -- what is done with the sums -----------------------------------------------------------------------------

    @cute.jit
    def _produce(self, op, shared, tid):
        gemm1.Gemm1._produce(self, op, shared, tid)
        if cutlass.const_expr(self.split > 1):
            self._meet()
            self._meet()

    @cute.jit
    def _consume(self, op, shared, tid, consumer):
        gemm1.Gemm1._consume(self, op, shared, tid, consumer)
        if cutlass.const_expr(self.split > 1 and self.config.k_warpgroups > 1):
            if consumer > 0:  # the first has met the others before it stored
                self._meet()
                self._meet()

    @cute.jit
    def _epilogue(self, op, shared, me, unit, prefetched, accumulators, width: cutlass.Constexpr):
        if cutlass.const_expr(self.split > 1):
            self._meet()
            self._share(shared, me, accumulators, width)
            self._meet()
        warp, group, quad = me.tid // 32, me.tid % 32 // 4, me.tid % 4
        row_block = unit.m_tile * self.config.m_warpgroups + me.m_warpgroup
        feature = row_block * bf16_weights.BLOCK_ROWS + 32 * warp + 4 * group
        if feature < op.out_features:
            self._store(op, shared, me, unit.token_tile * self.n + 2 * quad, feature, accumulators, width)

    def _store(self, op, shared, me, first, feature, accumulators, width):
        unscale = 2.0**-bf16_weights.WEIGHT_LOG2
        made = outputs.contribution(op, self.spec, Int32(0), feature, op.out_features, unscale)
        for share in range(-(-width // 8 // self.split)):
            if self.split == 1:
                sums = [half[4 * share + i] for half in accumulators for i in range(4)]
                self._store_tokens(op, made, first + 8 * share, sums)
            else:
                self._store_share(op, shared, me, made, first, share, width)

    @cute.jit
    def _store_share(self, op, shared, me, made, first, share: cutlass.Constexpr, width: cutlass.Constexpr):
        """Adds up the sums of all CTAs of the cluster, in their order, for 8 of the tokens that are this one's."""
        j = share * self.split + self._rank()
        if j < width // 8:
            place = self._place(shared, me, Int32(0), share)
            sums = [Float32(0.0)] * _SUMS
            for source in cutlass.range_constexpr(self.split):
                for i in cutlass.range_constexpr(_SUMS):
                    word = ptx.load_shared(place + self._offset(source) + i * (4 * WARPGROUP))
                    sums[i] = sums[i] + ptx.from_bits(word) if source else ptx.from_bits(word)
            self._store_tokens(op, made, first + 8 * j, sums)

    def _store_tokens(self, op, made, first, sums):
        for c in range(2):
            outputs.store_product_or_zeros(self.spec, made, sums, c, first + c, op.end, op.num_rows)

    @cute.jit
    def _share(self, shared, me, accumulators, width: cutlass.Constexpr):
        """Gives each CTA of the cluster the sums of its tokens: every ``split``-th 8."""
        for j in cutlass.range_constexpr(width // 8):
            place = self._place(shared, me, self._rank(), j // self.split)
            place = ptx.in_cta(place, j % self.split)
            for half in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(4):
                    word = ptx.bits(accumulators[half][4 * j + i])
                    ptx.store_cluster(place + (4 * half + i) * (4 * WARPGROUP), word)
        cute.arch.fence_view_async_shared()  # stages are otherwise written and read through the async proxy

    def _place(self, shared, me, source, share):
        """Where the sums that CTA ``source`` has given this one begin, in what were stages."""
        begin = Int32(shared.tokens.iterator.toint()) + source * self._offset(1)
        return begin + ((share * self.config.m_warpgroups + me.m_warpgroup) * _SUMS * WARPGROUP + me.tid) * 4

    def _offset(self, source: int) -> int:
        """Bytes that the sums of so many CTAs take."""
        return source * self.shares * self.config.m_warpgroups * _SUMS * WARPGROUP * 4
