"""Which expert, token tile and weight tile a unit of work is: shared by every target's grouped GEMM."""

from cutlass import Int32
import cutlass.cute as cute


@cute.jit
def locate(work: Int32, m_tiles: Int32, tile_expert: cute.Tensor, expert_tiles: cute.Tensor):
    """``(expert, m_tile, token_tile)`` of unit ``work`` in ``[0, expert_tiles[L] * m_tiles)``.

    Experts come one after the other; within an expert the token tiles run fastest, so that the blocks that
    run together share weight tiles and each expert's weights are read from memory once.
    """
    expert = tile_expert[work // m_tiles]  # an expert's units are a multiple of m_tiles: any of its tiles will do
    first = expert_tiles[expert]
    tiles = expert_tiles[expert + 1] - first
    local = work - first * m_tiles
    m_tile = local // tiles
    return expert, m_tile, first + local - m_tile * tiles
