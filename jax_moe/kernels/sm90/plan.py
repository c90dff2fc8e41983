"""The tiles of sm_90a, what they cost, and which of them a call takes; importable without the DSL."""

import dataclasses
import functools
from typing import TYPE_CHECKING

from jax_moe.kernels.common import plan as common
from jax_moe.kernels.sm90 import layout

if TYPE_CHECKING:
    from jax_moe.problem import Problem

SHARED_MEMORY = 232_448
"""Bytes of shared memory one thread block may use on sm_90."""

_RESERVED_PER_CTA = 1024  # what the driver keeps of an SM's shared memory for each resident block


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a thread block is put together.

    Attributes:
      widths: rows that are multiplied, multiples of 8, ascending. The last is the token tile, N of the matrix product;
        a tile with padding takes the least that holds its rows. Each has its own code; with too many or too wide ones
        the compiler finds no registers and serialises ``wgmma`` (tests/test_kernels_compile.py looks).
      m_warpgroups: warpgroups that take different 128-row blocks of the weights (they share the tokens).
      k_warpgroups: warpgroups that take different 64-wide blocks of the contraction; their sums are added at the end.
      stage_blocks: 64-wide blocks of the contraction that are copied and announced together, a multiple of
        k_warpgroups.
      stages: how many of those are in flight.
      ctas_per_sm: resident thread blocks of one multiprocessor, all persistent.
    """

    widths: tuple[int, ...]
    m_warpgroups: int
    k_warpgroups: int
    stage_blocks: int
    stages: int
    ctas_per_sm: int

    @property
    def name(self) -> str:
        return (
            f"n{self.token_tile}m{self.m_warpgroups}k{self.k_warpgroups}b{self.stage_blocks}s{self.stages}"
            f"c{self.ctas_per_sm}" + "".join(f"w{width}" for width in self.widths[:-1])
        )

    @property
    def token_tile(self) -> int:
        return self.widths[-1]

    @property
    def threads(self) -> int:
        return 128 * (1 + self.m_warpgroups * self.k_warpgroups)

    @property
    def stage_bytes(self) -> int:
        return self.stage_blocks * (self.m_warpgroups * layout.BLOCK_BYTES + self.token_tile * layout.BLOCK_K * 2)

    @property
    def reduction_bytes(self) -> int:
        return (self.k_warpgroups - 1) * layout.BLOCK_ROWS * self.token_tile * 4

    @property
    def shared_bytes(self) -> int:
        barriers = 16 * self.stages
        units = 16 * self.stages + 16  # the unit that begins with a stage; the producers' next one, double-buffered
        rows = 8 * self.m_warpgroups * self.token_tile  # GEMM2: output row and weight, a copy for each warpgroup
        alignment = 1024
        return self.stages * self.stage_bytes + self.reduction_bytes + barriers + units + rows + alignment

    def kernels(self):
        from jax_moe.kernels.sm90 import gemm

        return gemm


def with_most_stages(
    widths: tuple[int, ...],
    m_warpgroups: int,
    k_warpgroups: int,
    stage_blocks: int,
    ctas_per_sm: int,
    limit: int = 64,
) -> Tile:
    """A tile with as many stages as shared memory holds, at most ``limit``."""
    tile = Tile(widths, m_warpgroups, k_warpgroups, stage_blocks, 0, ctas_per_sm)
    available = SHARED_MEMORY // ctas_per_sm - (_RESERVED_PER_CTA if ctas_per_sm > 1 else 0)
    per_stage = dataclasses.replace(tile, stages=1).shared_bytes - tile.shared_bytes
    return dataclasses.replace(tile, stages=min(limit, (available - tile.shared_bytes) // per_stage))


def _tile(*widths: int) -> Tile:
    if widths[-1] <= 16:
        return with_most_stages(widths, 1, 2, 4, 2)
    if widths[-1] <= 48:
        return with_most_stages(widths, 3, 1, 2, 1)
    return with_most_stages(widths, 2, 1, 2, 1)


TILES = (
    _tile(8), _tile(16), _tile(16, 24, 32), _tile(32, 40), _tile(32, 48), _tile(48, 64), _tile(64, 80), _tile(80, 96),
    _tile(96, 112), _tile(112, 128), _tile(32, 64, 128), _tile(128, 144),
)  # fmt: skip
"""What a plan chooses from. Experts with about as many rows want a second width below the widest, so that few of them
need two tiles and few multiply padding; experts with many tiles want to multiply little in their last one."""

# Nanoseconds in which a multiprocessor gets through a 128 x 64 block of GEMM1's weights, by m warpgroups and by the
# rows that it is multiplied with; measured (benchmarks/notes-h200.md). Memory alone would take 136.
_NANOSECONDS = {
    1: {8: 153, 16: 154},
    3: {16: 158, 24: 168, 32: 174, 40: 188, 48: 199},
    2: {32: 216, 48: 223, 64: 246, 80: 280, 96: 300, 112: 339, 128: 365, 144: 400},
}


@functools.lru_cache(maxsize=1024)
def best_tile(num_tokens: int, top_k: int, num_experts: int) -> Tile:
    """The tile with the least expected time (``common/plan.py``)."""
    return common.cheapest(TILES, _cost, num_tokens, top_k, num_experts)


def _cost(rows: int, tile: Tile) -> float:
    """Of a block of an expert with so many rows."""
    nanoseconds = _NANOSECONDS[tile.m_warpgroups]
    full, rest = divmod(rows, tile.token_tile)
    cost = full * nanoseconds[tile.token_tile]
    return cost + nanoseconds[next(width for width in tile.widths if width >= rest)] if rest else cost


def plan(problem: "Problem") -> common.Plan:
    """The kernels of ``problem``, chosen from its shapes alone."""
    tile = best_tile(problem.num_tokens, problem.top_k, problem.num_experts or problem.local_experts)
    return common.with_tile(problem, tile)
