"""The tile map of few routes, which each CTA of a GEMM makes for itself: then no sort goes before the GEMMs.

The tiles are the sort's (``kernels/README.md``), each with the same routes in the same rows. Thread ``i`` places route
``i``, by what it counts among all routes. What is kept in shared memory is:

    rows[i]             routes, by expert and then by number; the places of those that are not local come first, empty
    tile_expert[t]      local expert of a tile
    tile_start[t], tile_rows[t]   its rows in ``rows``
    tile_first[t], tile_count[t]  the first tile of its expert, and how many that has
    num_tiles[0]
"""

import cutlass
from cutlass import Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device.constants import FEW_ROUTES
from jax_moe.kernels.device.entry import named

_AT_ONCE = 8  # routes that a thread looks at in one step of a loop
_NO_TILE = 2**31 - 1
_TABLES = ("rows", "tile_expert", "tile_start", "tile_rows", "tile_first", "tile_count", "experts", "begun")


def allocate(smem):
    """Room for the map. ``experts`` and ``begun``, an expert where a route is the first of a tile, serve to make it."""
    sizes = dict.fromkeys(_TABLES, FEW_ROUTES) | {"num_tiles": 1}
    return named(
        **{name: cute.make_tensor(smem.allocate_array(Int32, n), cute.make_layout(n)) for name, n in sizes.items()}
    )


@cute.jit
def make(op, tiles, token_tile: cutlass.Constexpr, barrier: cutlass.Constexpr, tid):
    """Makes the map; by the first ``FEW_ROUTES`` threads, which meet at the named ``barrier``. Others wait behind it.

    ``op``: expert_ids and expert_offset as arrays, num_routes (at most ``FEW_ROUTES``) and local_experts.
    """
    mine = Int32(-1)
    if tid < op.num_routes:
        local = Int64(op.expert_ids[tid]) - Int64(op.expert_offset[0])  # in 64 bits: any int32 may stand there
        if local >= 0 and local < op.local_experts:
            mine = Int32(local)
    tiles.experts[tid] = mine
    cute.arch.barrier(barrier_id=barrier, number_of_threads=FEW_ROUTES)

    total, before, lower = Int32(0), Int32(0), Int32(0)  # routes of this expert, those before, and of lower experts
    for first in cutlass.range(0, op.num_routes, _AT_ONCE, unroll=1):
        for i in cutlass.range_constexpr(_AT_ONCE):
            other = tiles.experts[first + i]
            if other == mine:
                total = total + 1
                if first + i < tid:
                    before = before + 1
            if other < mine:  # those that are not local are before all
                lower = lower + 1
    begins = mine >= 0 and before % token_tile == 0
    begun = Int32(_NO_TILE)
    if begins:
        begun = mine
    tiles.begun[tid] = begun
    cute.arch.barrier(barrier_id=barrier, number_of_threads=FEW_ROUTES)

    lower_tiles, all_tiles = Int32(0), Int32(0)
    for first in cutlass.range(0, op.num_routes, _AT_ONCE, unroll=1):
        for i in cutlass.range_constexpr(_AT_ONCE):
            other = tiles.begun[first + i]
            if other < mine:
                lower_tiles = lower_tiles + 1
            if other != _NO_TILE:
                all_tiles = all_tiles + 1
    if mine >= 0:
        tiles.rows[lower + before] = tid
    if begins:
        tile = lower_tiles + before // token_tile
        tiles.tile_expert[tile] = mine
        tiles.tile_start[tile] = lower + before
        tiles.tile_rows[tile] = min(total - before, token_tile)
        tiles.tile_first[tile] = lower_tiles
        tiles.tile_count[tile] = (total + token_tile - 1) // token_tile
    if tid == 0:
        tiles.num_tiles[0] = all_tiles


def locate(work: Int32, m_tiles: Int32, tiles):
    """As ``schedule.locate``: ``(expert, m_tile, token_tile)`` of unit ``work`` in ``[0, num_tiles * m_tiles)``."""
    tile = work // m_tiles  # an expert's units are a multiple of m_tiles: any of its tiles will do
    first, count = tiles.tile_first[tile], tiles.tile_count[tile]
    local = work - first * m_tiles
    m_tile = local // count
    return tiles.tile_expert[tile], m_tile, first + local - m_tile * count


@cute.jit
def route(tiles, token_tile: Int32, row: Int32) -> Int32:
    """Route of a row of a tile, -1 for padding."""
    found = Int32(-1)
    if row < tiles.tile_rows[token_tile]:
        found = tiles.rows[tiles.tile_start[token_tile] + row]
    return found
