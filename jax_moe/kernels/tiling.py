"""How many tiles a call may have, and which kind of tile costs least; for every target, and without the DSL."""

from collections.abc import Callable, Iterable
import functools
import math
from typing import TypeVar

import numpy as np

_Config = TypeVar("_Config")


def blocks(size: int, block: int) -> int:
    """How many blocks hold ``size``."""
    return -(-size // block)


def balanced_tile(rows: int, token_tile: int, granule: int) -> int:
    """Rows of each of an expert's tiles where they are balanced (``specs.SortSpec.granule``)."""
    return blocks(blocks(rows, blocks(rows, token_tile)), granule) * granule


def max_tiles(num_routes: int, local_experts: int, token_tile: int) -> int:
    """Upper bound of the number of tiles, whatever the routing: each expert's last tile may hold one row."""
    return min(num_routes, (num_routes + local_experts * (token_tile - 1)) // token_tile)


def cheapest(
    configs: Iterable[_Config], cost: Callable[[int, _Config], float], num_tokens: int, top_k: int, num_experts: int
) -> _Config:
    """The config with the least expected cost, if tokens choose ``top_k`` of ``num_experts`` experts at random.

    Args:
      configs: to choose from.
      cost: ``cost(rows, config)``, of an expert with so many rows.
      num_tokens, top_k, num_experts: of the call; experts that routes may name, not only the local ones.
    """
    counts = _likely_rows(num_tokens, min(1.0, top_k / num_experts))
    return min(configs, key=lambda config: sum(likelihood * cost(rows, config) for rows, likelihood in counts))


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


@functools.lru_cache(maxsize=1024)
def touched(num_tokens: int, top_k: int, num_experts: int, local_experts: int) -> tuple[tuple[int, float], ...]:
    """How many local experts have a row, and how likely that is, if tokens choose ``top_k`` experts at random.

    Exact: the chain of these numbers, token by token. Those less likely than 1e-9 are left out.
    """
    top_k, local_experts = min(top_k, num_experts), min(local_experts, num_experts)
    ways = math.comb(num_experts, top_k)
    # new[j][n]: how likely a token names j local experts that no token before it has, where these have named n.
    new = [
        np.array([
            math.comb(local_experts - n, j) * math.comb(num_experts - local_experts + n, top_k - j) / ways
            for n in range(local_experts + 1 - j)
        ])
        for j in range(min(top_k, local_experts) + 1)
    ]  # fmt: skip
    likely = np.zeros(local_experts + 1)
    likely[0] = 1.0
    for _ in range(num_tokens):
        if likely[-1] > 1 - 1e-9:
            break
        before, likely = likely, np.zeros_like(likely)
        for j, of_these in enumerate(new):
            likely[j:] += before[: len(of_these)] * of_these
    return tuple((number, float(value)) for number, value in enumerate(likely) if value > 1e-9)
