"""The sort, the groups of a product and the pass over x, in NumPy: what a GPU or the emulator must make of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import nvfp4
from jax_moe.kernels import specs


@dataclasses.dataclass(frozen=True)
class SortCase:
    """One call of the sort; ``routing`` says how the ids are drawn."""

    tokens: int
    top_k: int
    num_experts: int
    token_tile: int
    routing: str = "uniform"
    offset: int = 0
    weighted: bool = True
    granule: int = 0

    @property
    def spec(self):
        return specs.sort_spec(self.tokens * self.top_k, self.num_experts, self.token_tile, self.weighted, self.granule)


def ids(case: SortCase, rng) -> np.ndarray:
    """Expert ids, int32 ``[T, K]``."""
    shape, low, high = (case.tokens, case.top_k), case.offset, case.offset + case.num_experts
    match case.routing:
        case "uniform":
            drawn = rng.integers(0, high, shape)
        case "one":
            drawn = np.full(shape, high - 1)
        case "none":
            drawn = np.full(shape, high)
        case "skewed":
            drawn = low + np.minimum(rng.geometric(0.3, shape) - 1, case.num_experts - 1)
        case _:  # hostile
            extremes = [-1, -(2**31), 2**31 - 1, low - 1, high, low - 2**31, -low]
            drawn = np.where(rng.random(shape) < 0.3, rng.choice(extremes, shape), rng.integers(low, high, shape))
            drawn = np.clip(drawn, -(2**31), 2**31 - 1)
    return drawn.astype(np.int32)


def expected_sort(case: SortCase, ids: np.ndarray):
    """Tile starts of the experts, expert of each tile, route of each row: stable: by expert, then by route."""
    local = ids.reshape(-1).astype(np.int64) - case.offset
    routes = [np.flatnonzero(local == expert) for expert in range(case.num_experts)]
    tiles = [-(-len(r) // case.token_tile) for r in routes]
    starts = np.concatenate([[0], np.cumsum(tiles)])
    rows = np.full((starts[-1], case.token_tile), -1)
    for r, start, count in zip(routes, starts, tiles, strict=False):
        width = case.token_tile
        if case.granule and count:
            width = math.ceil(len(r) / count / case.granule) * case.granule
        for tile in range(count):
            mine = r[tile * width : (tile + 1) * width]
            assert len(mine) > 0
            rows[start + tile, : len(mine)] = mine
    return starts, np.repeat(np.arange(case.num_experts), tiles), rows.reshape(-1)


def hard_values(rng, shape) -> jax.Array:
    """bf16 values with blocks of zeros, ties of both roundings, huge, tiny and non-finite ones."""
    x = rng.normal(size=shape) * np.exp2(rng.integers(-12, 12, (shape[0], 1)))
    blocks = x.reshape(-1, 16)
    special = np.resize(
        [
            np.zeros(16),
            np.full(16, 3e38),
            np.full(16, 1e-38),
            np.resize([5.0, 2.5, 1.75, 0.25, 6.0], 16),
            -np.zeros(16),
        ],
        (len(blocks[::7]), 16),
    )
    blocks[::7] = special
    blocks[3::50, 5] = np.nan
    blocks[4::50, 7] = np.inf
    return jnp.asarray(x, jnp.bfloat16)


def expected_rows(x: jax.Array, weights: np.ndarray | None) -> np.ndarray:
    """bf16 ``[rows, H]``: x, or for each route x times its weight, rounded."""
    if weights is None:
        return np.asarray(x)
    with np.errstate(over="ignore"):
        product = np.asarray(x, np.float32)[:, None] * np.asarray(weights)[..., None]
    return product.astype(jnp.bfloat16).reshape(-1, x.shape[1])


def expected_nvfp4(values: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes, uint8 ``[rows, H]``, and block scales, float8_e4m3fn ``[rows, H/16]``, by ``jax_moe.nvfp4``."""
    with jax.default_device(jax.devices("cpu")[0]):
        payload, scales = nvfp4.quantize(jnp.asarray(values), jnp.float32(scale))
        return np.asarray(nvfp4.unpack(payload)), np.asarray(scales)


def expected_groups(sizes: np.ndarray, offset: int, local_groups: int, rows: int, token_tile: int):
    """What the kernel of a grouped product makes of group sizes.

    Returns:
      Tile starts of the local groups, group of each tile, row of each padded row, end of each local group's rows, and
      the local group of each row, -1 where there is none.
    """
    ends = np.minimum(np.cumsum(np.maximum(sizes.astype(np.int64), 0)), rows)
    starts = np.concatenate([[0], ends[:-1]])
    of_row = np.full(rows, -1)
    for local in range(local_groups):
        if 0 <= local + offset < len(sizes):
            of_row[starts[local + offset] : ends[local + offset]] = local
    mine = [np.flatnonzero(of_row == local) for local in range(local_groups)]
    tiles = [-(-len(m) // token_tile) for m in mine]
    padded = [np.concatenate([m, np.full(t * token_tile - len(m), -1)]) for m, t in zip(mine, tiles, strict=True)]
    group_ends = [
        0 if local + offset < 0 else rows_end if local + offset >= len(sizes) else ends[local + offset]
        for rows_end in [ends[-1]]
        for local in range(local_groups)
    ]
    first_tiles = np.concatenate([[0], np.cumsum(tiles)])
    return first_tiles, np.repeat(np.arange(local_groups), tiles), np.concatenate(padded), group_ends, of_row
