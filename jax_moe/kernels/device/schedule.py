"""Which CTAs do which units of work, and what a unit is: shared by every target's grouped GEMM.

A dynamic persistent tile scheduler. A unit is some weight blocks times a token tile. A CTA's first unit has
the CTA's index; every further one is the next that nobody has, by an atomic counter in global memory which the sort
has set to 0. Units differ too much (experts' last tiles hold any number of tokens) for a fixed share of them. The grid
is as large as what is resident at once: on a GPU with fewer multiprocessors than planned for, the last CTAs' first
units would come after everybody else's last.
"""

import cutlass
from cutlass import Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device import ptx


def reader(early: bool):
    """``read(array, index)`` for words of the tile map; ``early`` if who reads has not waited for the sort's end."""
    return ptx.load_early if early else lambda array, index: array[index]


@cute.jit
def locate(work: Int32, m_tiles: Int32, tile_expert: cute.Tensor, expert_tiles: cute.Tensor, read: cutlass.Constexpr):
    """``(expert, m_tile, token_tile)`` of unit ``work`` in ``[0, expert_tiles[L] * m_tiles)``.

    Experts come one after the other; within an expert the token tiles run fastest, so that the CTAs that
    run together share weight blocks and each expert's weights are read from memory once. ``read``: by :func:`reader`.
    """
    expert = read(tile_expert, work // m_tiles)  # an expert's units are a multiple of m_tiles: any of its tiles will do
    first = read(expert_tiles, expert)
    tiles = read(expert_tiles, expert + 1) - first
    local = work - first * m_tiles
    m_tile = local // tiles
    return expert, m_tile, first + local - m_tile * tiles


def take(expert_tiles: cute.Tensor, local_experts: Int32, gemm: int, ctas: Int32) -> Int32:
    """The next unit of GEMM1 (``gemm`` 0) or GEMM2 (1) beyond the first of each of ``ctas``."""
    counter = Int64(expert_tiles.iterator.toint()) + Int64(local_experts + 1 + gemm) * 4
    return ctas + ptx.fetch_add_global(counter, Int32(1))
