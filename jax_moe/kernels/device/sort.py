"""The stable sort of routes by local expert, with the tile map that both GEMMs read (``kernels/README.md``).

One counting sort. Each warp of each CTA has a contiguous part of the routes, in order:

1. every warp counts its routes of each expert, 32 at a time (``match.any``), in its own row of shared memory;
2. the rows are summed up along the warps and then, through global memory, along the CTAs of the cluster, which
   gives every (expert, warp) its first row; the experts' tile counts are summed up along the experts;
3. the tile map and the padding rows are written, and the GEMMs' work counters set to 0;
4. every warp walks over its routes again and puts each where its count says. Nothing is placed by an atomic, so
   the order within an expert is that of the routes.

All CTAs compute step 2 in full: that is cheaper than handing it round.

Every tile but an expert's last one is full, unless ``spec.granule`` asks for balanced tiles: then an expert's tiles, as
many as before, have the same *width*, the least multiple of the granule that will do.
"""

import cutlass
from cutlass import Float32, Int32, Int64
import cutlass.cute as cute
from cutlass.memory import SmemAllocator

from jax_moe.kernels.device import entry
from jax_moe.kernels.device.constants import WORK_COUNTERS
from jax_moe.kernels.device.entry import array

_WARP = 32
_ALL_LANES = 0xFFFFFFFF
_UNROLL = 4  # loads in flight; a step waits for memory alone
_PADDING_LANES = 8  # that mark one expert's padding: few rows where tiles are small, and then there are few warps


class Sort(entry.Kernel):
    """Routes to tiles; see the module."""

    @cute.kernel
    def kernel(self, given):
        if cutlass.const_expr(self.spec.cluster == 1):
            # GEMM1's CTAs may start and wait for this kernel's end. Not with many routes, where it gains nothing and
            # they could fill the GPU before a captured call's zeroing has started beside this kernel.
            cute.arch.griddepcontrol_launch_dependents()
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // _WARP), tid % _WARP
        routes = (array(given.expert_ids), array(given.routing_weights), array(given.expert_offset)[0])
        row_route, row_weight = array(given.row_route), array(given.row_weight)
        num_routes = given.num_routes

        smem = SmemAllocator()
        counts = self._allocate(smem, self.spec.warps * self.spec.local_experts)  # [warp, expert]
        first_rows = self._allocate(smem, self.spec.local_experts)
        first_tiles = self._allocate(smem, self.spec.local_experts + 1)
        totals = self._allocate(smem, self.spec.local_experts)
        warp_tiles = self._allocate(smem, self.spec.warps + 1)
        widths = self._allocate(smem, self.spec.local_experts) if self.spec.granule else None

        for i in cutlass.range(tid, self.spec.warps * self.spec.local_experts, self.spec.threads):
            counts[i] = Int32(0)
        cute.arch.sync_threads()

        # Whole steps of 32 routes for each warp.
        all_warps = self.spec.warps * self.spec.cluster
        steps = (num_routes + all_warps * _WARP - 1) // (all_warps * _WARP)
        first = (cta * self.spec.warps + warp) * steps * _WARP + lane

        mine = warp * self.spec.local_experts
        for chunk in cutlass.range(0, steps, _UNROLL):
            experts = [self._expert(routes, first, chunk + i, steps, num_routes) for i in range(_UNROLL)]
            for i in cutlass.range_constexpr(_UNROLL):
                self._count(counts, mine, experts[i], lane)
        cute.arch.sync_threads()

        total, before = self._sum_up(counts, array(given.cta_counts), cta, tid)
        tiles = (total + self.spec.token_tile - 1) // self.spec.token_tile
        first_tile = self._exclusive_sum(warp_tiles, tiles, tid, warp, lane)
        if tid < self.spec.local_experts:
            first_tiles[tid] = first_tile
            if cutlass.const_expr(self.spec.granule):
                first_rows[tid] = before  # of the expert's: which tile it is in is another question
                widths[tid] = self._width(total, tiles)
            else:
                first_rows[tid] = first_tile * self.spec.token_tile + before
            totals[tid] = total
        if tid == 0:
            first_tiles[self.spec.local_experts] = warp_tiles[self.spec.warps]
        if cta == 0:
            tile_map = array(given.expert_tiles)
            if tid < self.spec.local_experts:
                tile_map[tid] = first_tile
            if tid == 0:
                tile_map[self.spec.local_experts] = warp_tiles[self.spec.warps]
                for counter in cutlass.range_constexpr(WORK_COUNTERS):
                    tile_map[self.spec.local_experts + 1 + counter] = Int32(0)
        cute.arch.sync_threads()

        thread = cta * self.spec.threads + tid
        self._write_tiles(first_tiles, array(given.tile_expert), thread)
        if cutlass.const_expr(self.spec.granule):
            self._write_balanced_padding(first_tiles, totals, widths, (row_route, row_weight), thread)
        else:
            self._write_padding(first_tiles, totals, (row_route, row_weight), thread)

        for chunk in cutlass.range(0, steps, _UNROLL):
            experts = [self._expert(routes, first, chunk + i, steps, num_routes) for i in range(_UNROLL)]
            weights = [self._weight(routes, first, chunk + i, experts[i]) for i in range(_UNROLL)]
            for i in cutlass.range_constexpr(_UNROLL):
                row = self._place(counts, first_rows, mine, experts[i], lane)
                if experts[i] >= 0:
                    if cutlass.const_expr(self.spec.granule):
                        tile, row = self._balanced(row, widths[experts[i]])
                        row = (first_tiles[experts[i]] + tile) * self.spec.token_tile + row
                    row_route[row] = first + (chunk + i) * _WARP
                    row_weight[row] = weights[i]

    def _allocate(self, smem, size):
        return cute.make_tensor(smem.allocate_array(Int32, size), cute.make_layout(size))

    @cute.jit
    def _expert(self, routes, first, step, steps, num_routes) -> Int32:
        """Local expert of this lane's route in ``step``; -1 where there is no route, or none of ours."""
        route = first + step * _WARP
        expert = Int32(-1)
        if step < steps and route < num_routes:
            # In 64 bits: any int32 may stand there.
            local = Int64(routes[0][route]) - Int64(routes[2])
            if local >= 0 and local < self.spec.local_experts:
                expert = Int32(local)
        return expert

    @cute.jit
    def _weight(self, routes, first, step, expert) -> Float32:
        weight = Float32(1.0)
        if cutlass.const_expr(self.spec.weighted) and expert >= 0:
            weight = routes[1][first + step * _WARP]
        return weight

    @cute.jit
    def _count(self, counts, mine, expert, lane):
        same = cute.arch.match_sync(_ALL_LANES, expert)
        if expert >= 0 and (same & cute.arch.lanemask_lt()) == 0:
            counts[mine + expert] = counts[mine + expert] + Int32(cute.arch.popc(same))
        cute.arch.sync_warp()

    @cute.jit
    def _place(self, counts, first_rows, mine, expert, lane) -> Int32:
        """Row of this lane's route; counts those of the warp's step in."""
        same = cute.arch.match_sync(_ALL_LANES, expert)
        rank = Int32(cute.arch.popc(same & cute.arch.lanemask_lt()))
        row = Int32(0)
        if expert >= 0:
            row = first_rows[expert] + counts[mine + expert] + rank
        cute.arch.sync_warp()
        if expert >= 0 and rank == 0:
            counts[mine + expert] = counts[mine + expert] + Int32(cute.arch.popc(same))
        cute.arch.sync_warp()
        return row

    @cute.jit
    def _sum_up(self, counts, cta_counts, cta, tid):
        """Of expert ``tid``: (its routes in all, its routes in earlier CTAs); makes ``counts`` exclusive sums."""
        own = Int32(0)
        if tid < self.spec.local_experts:
            for warp in cutlass.range_constexpr(self.spec.warps):
                count = counts[warp * self.spec.local_experts + tid]
                counts[warp * self.spec.local_experts + tid] = own
                own = own + count
        total, before = own, Int32(0)
        if cutlass.const_expr(self.spec.cluster > 1):
            if tid < self.spec.local_experts:
                cta_counts[cta * self.spec.local_experts + tid] = own
            cute.arch.cluster_arrive()  # releases the writes above, acquires in the wait
            cute.arch.cluster_wait()
            total = Int32(0)
            if tid < self.spec.local_experts:
                for other in cutlass.range_constexpr(self.spec.cluster):
                    count = cta_counts[other * self.spec.local_experts + tid]
                    if other < cta:
                        before = before + count
                    total = total + count
        return total, before

    @cute.jit
    def _exclusive_sum(self, warp_sums, value, tid, warp, lane) -> Int32:
        """Of ``value`` over the CTA's threads; ``warp_sums[warps]`` becomes the sum of all."""
        inclusive = value
        for distance in (1, 2, 4, 8, 16):
            other = cute.arch.shuffle_sync_up(inclusive, distance, mask_and_clamp=0)
            if lane >= distance:
                inclusive = inclusive + other
        if lane == _WARP - 1:
            warp_sums[warp] = inclusive
        cute.arch.sync_threads()
        if tid == 0:
            running = Int32(0)
            for i in cutlass.range_constexpr(self.spec.warps):
                warp_sum = warp_sums[i]
                warp_sums[i] = running
                running = running + warp_sum
            warp_sums[self.spec.warps] = running
        cute.arch.sync_threads()
        return warp_sums[warp] + inclusive - value

    @cute.jit
    def _width(self, total, tiles) -> Int32:
        """Rows of each tile of an expert but the last, which has the rest: at least one."""
        width = Int32(self.spec.token_tile)
        if tiles > 0:
            width = (total + tiles - 1) // tiles
            width = (width + self.spec.granule - 1) // self.spec.granule * self.spec.granule
        return width

    def _balanced(self, row, width):
        """(Tile, row in the tile) of an expert's ``row``."""
        tile = row // width
        return tile, row - tile * width

    @cute.jit
    def _write_tiles(self, first_tiles, tile_expert, thread):
        """The expert of every tile, by bisection: one expert may have all the tiles."""
        tiles = first_tiles[self.spec.local_experts]
        for tile in cutlass.range(thread, tiles, self.spec.threads * self.spec.cluster):
            low, high = Int32(0), Int32(self.spec.local_experts)  # first_tiles[low] <= tile < first_tiles[high]
            for _ in cutlass.range_constexpr((self.spec.local_experts - 1).bit_length()):
                middle = (low + high) // 2
                if first_tiles[middle] <= tile:
                    low = middle
                else:
                    high = middle
            tile_expert[tile] = low

    @cute.jit
    def _write_padding(self, first_tiles, totals, rows, thread):
        """Marks the rows behind each expert's last one."""
        groups = self.spec.threads * self.spec.cluster // _PADDING_LANES
        for expert in cutlass.range(thread // _PADDING_LANES, self.spec.local_experts, groups):
            first = first_tiles[expert] * self.spec.token_tile + totals[expert]
            end = first_tiles[expert + 1] * self.spec.token_tile
            for row in cutlass.range(first + thread % _PADDING_LANES, end, _PADDING_LANES):
                self._pad(rows, row)

    @cute.jit
    def _write_balanced_padding(self, first_tiles, totals, widths, rows, thread):
        """Marks the rows behind the last one of each tile."""
        groups = self.spec.threads * self.spec.cluster // _PADDING_LANES
        for expert in cutlass.range(thread // _PADDING_LANES, self.spec.local_experts, groups):
            first_tile, width = first_tiles[expert], widths[expert]
            last = first_tiles[expert + 1] - first_tile - 1
            each = self.spec.token_tile - width  # padding of a tile but the last
            count = (last + 1) * self.spec.token_tile - totals[expert]
            for i in cutlass.range(thread % _PADDING_LANES, count, _PADDING_LANES):
                tile, row = last, totals[expert] - last * width + i - last * each
                if i < last * each:
                    tile, row = self._balanced(i, each)
                    row = width + row
                self._pad(rows, (first_tile + tile) * self.spec.token_tile + row)

    def _pad(self, rows, row):
        """No route, and a weight all the same: GEMM2 loads both before it can know."""
        rows[0][row] = Int32(-1)
        rows[1][row] = Float32(0.0)
