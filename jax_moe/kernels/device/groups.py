"""From group sizes to the tile map of a grouped product, and the zeros of the rows that no local group has.

Rows stand group by group, so that where a group begins says where each of its rows is. Every CTA finds that out for
itself, in shared memory, and then all CTAs share what is to be written:

1. the sizes are summed up along the groups, and with them the tiles of the local groups. Any int32 may be a size: a
   negative one counts as 0, and what goes beyond the rows that are there is cut off (``FindGroups`` in
   ``ffi/cpu/product_handler.cc`` is the same rule);
2. the tile map is written, a warp for each tile, and the GEMM's work counters set to 0;
3. rows of the output in front of the first local group and behind the last are zeroed: the product stores all others.
"""

import cutlass
from cutlass import Int32, Int64, Uint32
import cutlass.cute as cute
from cutlass.memory import SmemAllocator

from jax_moe.kernels.device import entry, ptx
from jax_moe.kernels.device.constants import WORK_COUNTERS
from jax_moe.kernels.device.entry import array, named

_WARP = 32
_VECTOR_BYTES = 16
_NO_LIMIT = 2**31 - 1


class Groups(entry.Kernel):
    """Group sizes to tiles; see the module."""

    @cute.kernel
    def kernel(self, given):
        # Whoever comes next waits for this kernel's end: all CTAs of this one have started when its first may.
        cute.arch.griddepcontrol_launch_dependents()
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        me = named(
            tid=tid, warp=cute.arch.make_warp_uniform(tid // _WARP), lane=tid % _WARP, cta=cta,
            thread=cta * self.spec.threads + tid, threads=ctas * self.spec.threads,
        )  # fmt: skip
        smem = SmemAllocator()
        first_rows = self._allocate(smem, self.spec.capacity + 1)  # of a local group, and behind the last one
        first_tiles = self._allocate(smem, self.spec.capacity + 1)
        sums = self._allocate(smem, self.spec.threads // _WARP)
        self._find(given, first_rows, first_tiles, sums, me)
        cute.arch.sync_threads()
        if cta == 0:
            self._write_groups(given, first_rows, first_tiles, tid)
        self._write_tiles(given, first_rows, first_tiles, me)
        self._write_other_rows(given, first_rows[0], first_rows[given.local_groups], me)

    def _allocate(self, smem, size):
        return cute.make_tensor(smem.allocate_array(Int32, size), cute.make_layout(size))

    @cute.jit
    def _find(self, given, first_rows, first_tiles, sums, me):
        """First row and first tile of each local group, and those behind the last one."""
        sizes, offset = array(given.group_sizes), Int64(array(given.group_offset)[0])
        row, tile = Int32(0), Int32(0)  # where the next groups begin
        for base in cutlass.range(0, given.num_groups, self.spec.threads, unroll=1):
            group = base + me.tid
            size = Int32(0)
            if group < given.num_groups:
                size = max(sizes[group], Int32(0))
            start, rows_end = self._sum(sums, size, row, given.num_rows, me)
            end = self._add(start, size, given.num_rows)
            local = Int64(group) - offset  # any int32 may stand there
            tiles = Int32(0)
            if local >= 0 and local < given.local_groups:
                tiles = (end - start + given.token_tile - 1) // given.token_tile
            first_tile, tiles_end = self._sum(sums, tiles, tile, Int32(_NO_LIMIT), me)
            if group < given.num_groups and local >= 0 and local <= given.local_groups:
                first_rows[Int32(local)] = start
                first_tiles[Int32(local)] = first_tile
            row, tile = rows_end, tiles_end
        # Local groups that have no size are empty: they begin where the first, or behind where the last one, does.
        for local in cutlass.range(me.tid, given.local_groups + 1, self.spec.threads, unroll=1):
            group = Int64(local) + offset
            if group < 0:
                first_rows[local] = Int32(0)
                first_tiles[local] = Int32(0)
            elif group >= given.num_groups:
                first_rows[local] = row
                first_tiles[local] = tile

    @cute.jit
    def _add(self, a, b, limit) -> Int32:
        """``min(a + b, limit)`` of numbers from 0 on, whose sum may be beyond an int32; ``a`` is at most ``limit``."""
        return a + min(b, limit - a)

    @cute.jit
    def _sum(self, sums, value, first, limit, me):
        """``first`` and the values of all earlier threads of the CTA, then of all its threads; at most ``limit``."""
        inclusive = min(value, limit)
        for distance in (1, 2, 4, 8, 16):
            other = cute.arch.shuffle_sync_up(inclusive, distance, mask_and_clamp=0)
            if me.lane >= distance:
                inclusive = self._add(inclusive, other, limit)
        before = cute.arch.shuffle_sync_up(inclusive, 1, mask_and_clamp=0)
        if me.lane == 0:
            before = Int32(0)
        if me.lane == _WARP - 1:
            sums[me.warp] = inclusive
        cute.arch.sync_threads()
        total = first
        for warp in cutlass.range_constexpr(self.spec.threads // _WARP):
            if warp == me.warp:
                before = self._add(total, before, limit)
            total = self._add(total, sums[warp], limit)
        cute.arch.sync_threads()  # the next sum writes where this one has read
        return before, total

    @cute.jit
    def _write_groups(self, given, first_rows, first_tiles, tid):
        expert_tiles, group_ends = array(given.expert_tiles), array(given.group_ends)
        for local in cutlass.range(tid, given.local_groups + 1, self.spec.threads, unroll=1):
            expert_tiles[local] = first_tiles[local]
            if local < given.local_groups:
                group_ends[local] = first_rows[local + 1]
        if tid < WORK_COUNTERS:
            expert_tiles[given.local_groups + 1 + tid] = Int32(0)

    @cute.jit
    def _write_tiles(self, given, first_rows, first_tiles, me):
        """A warp finds a tile's group by bisection, because one may have all the tiles, and writes its rows."""
        tile_expert, row_route = array(given.tile_expert), array(given.row_route)
        width, warps = given.token_tile, me.threads // _WARP
        for tile in cutlass.range(me.thread // _WARP, first_tiles[given.local_groups], warps, unroll=1):
            low, high = Int32(0), given.local_groups  # first_tiles[low] <= tile < first_tiles[high]
            for _ in cutlass.range_constexpr(self.spec.capacity.bit_length()):
                middle = (low + high) // 2
                if first_tiles[middle] <= tile:
                    low = middle
                else:
                    high = middle
            if me.lane == 0:
                tile_expert[tile] = low
            first, end = first_rows[low] + (tile - first_tiles[low]) * width, first_rows[low + 1]
            for i in cutlass.range(me.lane, width, _WARP, unroll=1):
                row = Int32(-1)
                if i < end - first:
                    row = first + i
                    if cutlass.const_expr(self.spec.has_row_group):
                        array(given.row_group)[row] = low
                row_route[tile * width + i] = row

    @cute.jit
    def _write_other_rows(self, given, begin, end, me):
        """Zeros, and no group, for the rows in front of ``begin`` and from ``end`` on."""
        count, vectors = given.num_rows - (end - begin), given.row_vectors
        zero = Uint32(0)
        for index in cutlass.range(me.thread, count * vectors, me.threads, unroll=1):
            place = self._other(index, begin * vectors, end * vectors)
            ptx.store_global(Int64(given.out.toint()) + Int64(place) * _VECTOR_BYTES, (zero, zero, zero, zero))
        if cutlass.const_expr(self.spec.has_row_group):
            row_group = array(given.row_group)
            for index in cutlass.range(me.thread, count, me.threads, unroll=1):
                row_group[self._other(index, begin, end)] = Int32(-1)

    @cute.jit
    def _other(self, index, begin, end) -> Int32:
        """Place ``index`` among those that are not from ``begin`` to ``end``."""
        if index >= begin:
            index = index + (end - begin)
        return index
