"""What the plans of all targets have in common: what a GEMM is asked for, how a tile is chosen, how many there may be.

Frozen values, importable without the DSL. A target adds its tiles and what they cost (``sm90/plan.py``).
"""

from collections.abc import Callable, Iterable
import dataclasses
import math
from typing import Any, Protocol, TYPE_CHECKING, TypeVar

from jax_moe.kernels import specs

if TYPE_CHECKING:
    from jax_moe.problem import Problem


class Tile(Protocol):
    """How a thread block of a target's GEMMs is put together; hashable, and its ``repr`` tells two of them apart."""

    @property
    def name(self) -> str: ...

    @property
    def token_tile(self) -> int:
        """N, the rows of a tile (``ABI.md``)."""
        ...

    @property
    def threads(self) -> int:
        """Of a block."""
        ...

    @property
    def ctas_per_sm(self) -> int:
        """Blocks of the persistent grid for each multiprocessor."""
        ...

    def kernels(self) -> Any:
        """The module with the target's ``Gemm1`` and ``Gemm2``; needs the DSL."""
        ...


class _Gemm:
    """How the handler launches a GEMM kernel."""

    tile: Tile
    pdl = True

    @property
    def threads(self) -> int:
        return self.tile.threads


@dataclasses.dataclass(frozen=True)
class Gemm1Spec(_Gemm):
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
        return self.tile.kernels().Gemm1(self).entry()


@dataclasses.dataclass(frozen=True)
class Gemm2Spec(_Gemm):
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
        return self.tile.kernels().Gemm2(self).entry()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels of one call; both GEMMs have the same tile."""

    gemm1: Gemm1Spec
    gemm2: Gemm2Spec
    combine: specs.CombineSpec | None

    @property
    def token_tile(self) -> int:
        return self.gemm1.tile.token_tile


def max_tiles(num_routes: int, num_experts: int, token_tile: int) -> int:
    """Upper bound of the number of tiles, whatever the routing: each expert's last tile may hold one row."""
    return min(num_routes, (num_routes + num_experts * (token_tile - 1)) // token_tile)


def with_tile(problem: "Problem", tile: Tile) -> Plan:
    """The kernels of ``problem`` if its tiles are ``tile``."""
    from jax_moe import activations

    alpha, beta, limit = activations.parameters(problem.activation)
    out_dtype = str(problem.out_dtype) if problem.combine == "atomic" else "float32"
    gemm1 = Gemm1Spec(
        tile, problem.precision, problem.activation.kind, problem.activation.gated, alpha, beta, limit,
        problem.has_gate_up_bias,
    )  # fmt: skip
    gemm2 = Gemm2Spec(tile, problem.precision, problem.combine, out_dtype, problem.has_down_bias)
    return Plan(gemm1, gemm2, specs.CombineSpec(str(problem.out_dtype)) if problem.combine == "ordered" else None)


_TileT = TypeVar("_TileT", bound=Tile)


def cheapest(
    tiles: Iterable[_TileT], cost: Callable[[int, _TileT], float], num_tokens: int, top_k: int, num_experts: int
) -> _TileT:
    """The tile with the least expected cost, if tokens choose ``top_k`` of ``num_experts`` experts at random.

    Args:
      tiles: to choose from.
      cost: ``cost(rows, tile)``, of an expert with so many rows.
      num_tokens, top_k, num_experts: of the call; experts that routes may name, not only the local ones.
    """
    counts = _likely_rows(num_tokens, min(1.0, top_k / num_experts))
    return min(tiles, key=lambda tile: sum(likelihood * cost(rows, tile) for rows, likelihood in counts))


def _likely_rows(num_tokens: int, probability: float) -> list[tuple[int, float]]:
    """How many rows an expert that some tokens choose has, and how likely that is: a binomial distribution.

    At most some 130 samples of it, which reach four standard deviations to each side; their likelihoods sum to 1.
    """
    if probability == 1.0:
        return [(num_tokens, 1.0)]
    mean = num_tokens * probability
    spread = math.sqrt(mean * (1 - probability))
    first, last = max(1, math.floor(mean - 4 * spread)), min(num_tokens, math.ceil(mean + 4 * spread) + 1)
    counts = range(first, last + 1, math.ceil(spread / 16))
    logarithms = [
        math.lgamma(num_tokens + 1) - math.lgamma(rows + 1) - math.lgamma(num_tokens - rows + 1)
        + rows * math.log(probability) + (num_tokens - rows) * math.log1p(-probability)
        for rows in counts
    ]  # fmt: skip
    likelihoods = [math.exp(logarithm) for logarithm in logarithms]
    return [(rows, likelihood / sum(likelihoods)) for rows, likelihood in zip(counts, likelihoods, strict=True)]
