"""Which kernel variants a call launches, as frozen values; importable without the DSL."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

from jax_moe.kernels.sm90 import layout

if TYPE_CHECKING:
    from jax_moe.plan import Problem

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


class _Launch:
    """What the handler needs to know to launch a GEMM kernel."""

    tile: Tile
    cluster = 1
    pdl = True

    @property
    def threads(self) -> int:
        return self.tile.threads


@dataclasses.dataclass(frozen=True)
class Gemm1Spec(_Launch):
    """x rows, gathered by route -> intermediate."""

    tile: Tile
    precision: str
    activation: str
    gated: bool
    alpha: float
    beta: float
    limit: float
    has_bias: bool

    @property
    def name(self) -> str:
        numbers = "_".join(float(v).hex().replace(".", "p").replace("-", "m").replace("+", "")
                           for v in (self.alpha, self.beta, self.limit))  # fmt: skip
        bias = "_bias" if self.has_bias else ""
        return f"jax_moe_gemm1_{self.tile.name}_{self.precision}_{self.activation}_{numbers}{bias}"

    def entry(self):
        from jax_moe.kernels.sm90 import gemm

        return gemm.Gemm1(self).entry()


@dataclasses.dataclass(frozen=True)
class Gemm2Spec(_Launch):
    """Intermediate -> out (atomic) or contributions (ordered)."""

    tile: Tile
    precision: str
    combine: str
    out_dtype: str
    has_bias: bool

    @property
    def name(self) -> str:
        bias = "_bias" if self.has_bias else ""
        return f"jax_moe_gemm2_{self.tile.name}_{self.precision}_{self.combine}_{self.out_dtype}{bias}"

    def entry(self):
        from jax_moe.kernels.sm90 import gemm

        return gemm.Gemm2(self).entry()


@dataclasses.dataclass(frozen=True)
class CombineSpec:
    """Contributions -> out, in slot order."""

    out_dtype: str
    cluster = 1
    pdl = False
    threads = 128

    @property
    def name(self) -> str:
        return f"jax_moe_combine_{self.out_dtype}"

    def grid(self, num_tokens: int, hidden_size: int) -> int:
        """Thread blocks to launch: a thread takes four values."""
        return -(-num_tokens * (hidden_size // 4) // self.threads)

    def entry(self):
        from jax_moe.kernels.common import combine

        return combine.entry(self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels of one call; both GEMMs have the same tile."""

    gemm1: Gemm1Spec
    gemm2: Gemm2Spec
    combine: CombineSpec | None

    @property
    def token_tile(self) -> int:
        return self.gemm1.tile.token_tile

    def specs(self) -> tuple[Gemm1Spec | Gemm2Spec | CombineSpec, ...]:
        specs = (self.gemm1, self.gemm2)
        return specs if self.combine is None else (*specs, self.combine)


def max_tiles(num_routes: int, num_experts: int, token_tile: int) -> int:
    """Upper bound of the number of tiles, whatever the routing: each expert's last tile may hold one row."""
    return min(num_routes, (num_routes + num_experts * (token_tile - 1)) // token_tile)


def plan(problem: "Problem", *, biases: tuple[bool, bool]) -> Plan:
    """The kernels of ``problem``, chosen from its shapes alone.

    Args:
      problem: of the call.
      biases: whether gate_up and down have one.
    """
    from jax_moe import activations

    tile = best_tile(problem.num_tokens, problem.top_k, problem.total_experts or problem.num_experts)
    alpha, beta, limit = activations.parameters(problem.activation)
    out_dtype = str(problem.out_dtype) if problem.combine == "atomic" else "float32"
    return Plan(
        Gemm1Spec(
            tile, problem.precision, problem.activation.kind, problem.activation.gated, alpha, beta, limit, biases[0]
        ),
        Gemm2Spec(tile, problem.precision, problem.combine, out_dtype, biases[1]),
        CombineSpec(str(problem.out_dtype)) if problem.combine == "ordered" else None,
    )


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
    """The tile with the least expected time, if tokens choose ``top_k`` of ``num_experts`` experts at random."""
    probability = min(1.0, top_k / num_experts)
    return min(TILES, key=lambda tile: _expected_cost(num_tokens, probability, tile))


def _expected_cost(num_tokens: int, probability: float, tile: Tile) -> float:
    """Of an expert that some tokens choose; their number has a binomial distribution."""
    if probability == 1.0:
        return _cost(num_tokens, tile)
    mean = num_tokens * probability
    spread = math.sqrt(mean * (1 - probability))
    step = math.ceil(spread / 16)
    total = weight = 0.0
    for count in range(
        max(1, math.floor(mean - 4 * spread)), min(num_tokens, math.ceil(mean + 4 * spread) + 1) + 1, step
    ):
        rest = num_tokens - count
        ways = math.lgamma(num_tokens + 1) - math.lgamma(count + 1) - math.lgamma(rest + 1)
        likelihood = math.exp(ways + count * math.log(probability) + rest * math.log1p(-probability))
        total += likelihood * _cost(count, tile)
        weight += likelihood
    return total / weight


def _cost(rows: int, tile: Tile) -> float:
    """Of a block of an expert with so many rows."""
    nanoseconds = _NANOSECONDS[tile.m_warpgroups]
    full, rest = divmod(rows, tile.token_tile)
    cost = full * nanoseconds[tile.token_tile]
    return cost + nanoseconds[next(width for width in tile.widths if width >= rest)] if rest else cost
