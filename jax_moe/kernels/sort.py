"""The stable sort of routes by local expert, with the tile map that both GEMMs read (``ABI.md``).

One counting sort. Each warp of each thread block has a contiguous part of the routes, in order:

1. every warp counts its routes of each expert, 32 at a time (``match.any``), in its own row of shared memory;
2. the rows are summed up along the warps and then, through global memory, along the blocks of the cluster, which
   gives every (expert, warp) its first row; the experts' tile counts are summed up along the experts;
3. the tile map and the padding rows are written, and the GEMMs' work counters set to 0;
4. every warp walks over its routes again and puts each where its count says. Nothing is placed by an atomic, so
   the order within an expert is that of the routes.

All blocks compute step 2 in full: that is cheaper than handing it round.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64
import cutlass.cute as cute
from cutlass.memory import SmemAllocator

from jax_moe.kernels import specs
from jax_moe.kernels.common.memory import array, pointer

_WARP = 32
_ALL_LANES = 0xFFFFFFFF
_UNROLL = 4  # loads in flight; a step waits for memory alone
_PADDING_LANES = 8  # that mark one expert's padding: few rows where tiles are small, and then there are few warps


class Sort:
    """Routes to tiles; see the module."""

    def __init__(self, spec: specs.SortSpec):
        self.spec = spec
        self.experts = spec.num_experts
        self.warps = spec.warps
        self.threads = spec.threads

    def entry(self):
        arguments = (
            pointer(Int32), pointer(Float32), pointer(Int32), pointer(Int32), pointer(Int32), pointer(Int32),
            pointer(Float32), pointer(Int32), Int32(0), cuda.CUstream(0),
        )  # fmt: skip
        return self.launch, arguments

    @cute.jit
    def launch(
        self, expert_ids: cute.Pointer, routing_weights: cute.Pointer, expert_offset: cute.Pointer,
        expert_tiles: cute.Pointer, tile_expert: cute.Pointer, row_route: cute.Pointer, row_weight: cute.Pointer,
        block_counts: cute.Pointer, num_routes: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        cluster = self.spec.cluster
        self.kernel(
            expert_ids, routing_weights, expert_offset, expert_tiles, tile_expert, row_route, row_weight, block_counts,
            num_routes,
        ).launch(grid=(cluster, 1, 1), block=(self.threads, 1, 1), cluster=(cluster, 1, 1), stream=stream)  # fmt: skip

    @cute.kernel
    def kernel(
        self, expert_ids: cute.Pointer, routing_weights: cute.Pointer, expert_offset: cute.Pointer,
        expert_tiles: cute.Pointer, tile_expert: cute.Pointer, row_route: cute.Pointer, row_weight: cute.Pointer,
        block_counts: cute.Pointer, num_routes: Int32,
    ):  # fmt: skip
        if cutlass.const_expr(self.spec.cluster == 1):
            # GEMM1's blocks may start and wait for this kernel's end. Not with many routes, where it gains nothing and
            # they could fill the GPU before a captured call's zeroing has started beside this kernel.
            cute.arch.griddepcontrol_launch_dependents()
        tid, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // _WARP), tid % _WARP
        routes = (array(expert_ids), array(routing_weights), array(expert_offset)[0])
        row_route, row_weight = array(row_route), array(row_weight)

        smem = SmemAllocator()
        counts = self._allocate(smem, self.warps * self.experts)  # [warp, expert]
        first_rows = self._allocate(smem, self.experts)
        first_tiles = self._allocate(smem, self.experts + 1)
        totals = self._allocate(smem, self.experts)
        warp_tiles = self._allocate(smem, self.warps + 1)

        for i in cutlass.range(tid, self.warps * self.experts, self.threads):
            counts[i] = Int32(0)
        cute.arch.sync_threads()

        # Whole steps of 32 routes for each warp.
        all_warps = self.warps * self.spec.cluster
        steps = (num_routes + all_warps * _WARP - 1) // (all_warps * _WARP)
        first = (block * self.warps + warp) * steps * _WARP + lane

        mine = warp * self.experts
        for chunk in cutlass.range(0, steps, _UNROLL):
            experts = [self._expert(routes, first, chunk + i, steps, num_routes) for i in range(_UNROLL)]
            for i in cutlass.range_constexpr(_UNROLL):
                self._count(counts, mine, experts[i], lane)
        cute.arch.sync_threads()

        total, before = self._sum_up(counts, array(block_counts), block, tid)
        tiles = (total + self.spec.token_tile - 1) // self.spec.token_tile
        first_tile = self._exclusive_sum(warp_tiles, tiles, tid, warp, lane)
        if tid < self.experts:
            first_tiles[tid] = first_tile
            first_rows[tid] = first_tile * self.spec.token_tile + before
            totals[tid] = total
        if tid == 0:
            first_tiles[self.experts] = warp_tiles[self.warps]
        if block == 0:
            tile_map = array(expert_tiles)
            if tid < self.experts:
                tile_map[tid] = first_tile
            if tid == 0:
                tile_map[self.experts] = warp_tiles[self.warps]
                for counter in cutlass.range_constexpr(specs.WORK_COUNTERS):
                    tile_map[self.experts + 1 + counter] = Int32(0)
        cute.arch.sync_threads()

        thread = block * self.threads + tid
        self._write_tiles(first_tiles, array(tile_expert), thread)
        self._write_padding(first_tiles, totals, row_route, thread)

        for chunk in cutlass.range(0, steps, _UNROLL):
            experts = [self._expert(routes, first, chunk + i, steps, num_routes) for i in range(_UNROLL)]
            weights = [self._weight(routes, first, chunk + i, experts[i]) for i in range(_UNROLL)]
            for i in cutlass.range_constexpr(_UNROLL):
                row = self._place(counts, first_rows, mine, experts[i], lane)
                if experts[i] >= 0:
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
            if local >= 0 and local < self.experts:
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
    def _sum_up(self, counts, block_counts, block, tid):
        """Of expert ``tid``: (its routes in all, its routes in earlier blocks); makes ``counts`` exclusive sums."""
        own = Int32(0)
        if tid < self.experts:
            for warp in cutlass.range_constexpr(self.warps):
                count = counts[warp * self.experts + tid]
                counts[warp * self.experts + tid] = own
                own = own + count
        total, before = own, Int32(0)
        if cutlass.const_expr(self.spec.cluster > 1):
            if tid < self.experts:
                block_counts[block * self.experts + tid] = own
            cute.arch.cluster_arrive()  # releases the writes above, acquires in the wait
            cute.arch.cluster_wait()
            total = Int32(0)
            if tid < self.experts:
                for other in cutlass.range_constexpr(self.spec.cluster):
                    count = block_counts[other * self.experts + tid]
                    if other < block:
                        before = before + count
                    total = total + count
        return total, before

    @cute.jit
    def _exclusive_sum(self, warp_sums, value, tid, warp, lane) -> Int32:
        """Of ``value`` over the block's threads; ``warp_sums[warps]`` becomes the sum of all."""
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
            for i in cutlass.range_constexpr(self.warps):
                warp_sum = warp_sums[i]
                warp_sums[i] = running
                running = running + warp_sum
            warp_sums[self.warps] = running
        cute.arch.sync_threads()
        return warp_sums[warp] + inclusive - value

    @cute.jit
    def _write_tiles(self, first_tiles, tile_expert, thread):
        """The expert of every tile, by bisection: one expert may have all the tiles."""
        tiles = first_tiles[self.experts]
        for tile in cutlass.range(thread, tiles, self.threads * self.spec.cluster):
            low, high = Int32(0), Int32(self.experts)  # first_tiles[low] <= tile < first_tiles[high]
            for _ in cutlass.range_constexpr((self.experts - 1).bit_length()):
                middle = (low + high) // 2
                if first_tiles[middle] <= tile:
                    low = middle
                else:
                    high = middle
            tile_expert[tile] = low

    @cute.jit
    def _write_padding(self, first_tiles, totals, row_route, thread):
        """Marks the rows behind each expert's last one."""
        groups = self.threads * self.spec.cluster // _PADDING_LANES
        for expert in cutlass.range(thread // _PADDING_LANES, self.experts, groups):
            first = first_tiles[expert] * self.spec.token_tile + totals[expert]
            end = first_tiles[expert + 1] * self.spec.token_tile
            for row in cutlass.range(first + thread % _PADDING_LANES, end, _PADDING_LANES):
                row_route[row] = Int32(-1)
