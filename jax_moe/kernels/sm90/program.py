"""The programs of calls on sm_90a: which kernels, over which buffers. ``README.md`` says what is in these."""

from collections.abc import Mapping
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jax_moe import activations
from jax_moe.kernels import steps, tiling
from jax_moe.kernels.sm90.device import weight_block
from jax_moe.kernels.sm90.specs import Config, Gemm1Spec, Gemm2Spec, ProductSpec, with_most_stages
from jax_moe.kernels.target import Card, Launch, Program
from jax_moe.problem import Problem
from jax_moe.product.problem import Product


def _config(*widths: int) -> Config:
    if widths[-1] <= 16:
        return with_most_stages(widths, 1, 2, 4, 2)
    if widths[-1] <= 48:
        return with_most_stages(widths, 3, 1, 2, 1)
    return with_most_stages(widths, 2, 1, 2, 1)


CONFIGS = (
    _config(8), _config(16), _config(16, 24, 32), _config(32, 40), _config(32, 48), _config(48, 64), _config(64, 80),
    _config(80, 96), _config(96, 112), _config(112, 128), _config(32, 64, 128), _config(128, 144),
)  # fmt: skip
"""What a call chooses from. Experts with about as many rows want a second width below the widest, so that few of them
need two tiles and few multiply padding; experts with many tiles want to multiply little in their last one."""

FEW_UNITS = (with_most_stages((8,), 1, 2, 4, 2, cluster_k=2), with_most_stages((8,), 1, 4, 4, 1))
"""Other forms of the first of these, for hardly more units than CTAs (:func:`fitted`): the contraction split over two
CTAs, or over the four warpgroups of a CTA that has a multiprocessor for itself."""

Costs = Mapping[int, Mapping[int, float]]


@functools.lru_cache(maxsize=1024)  # every layer of a model asks, each time that it is lowered
def best_config(card: Card, num_tokens: int, top_k: int, num_experts: int) -> Config:
    """The config with the least expected time (``tiling.py``)."""
    return tiling.cheapest(CONFIGS, functools.partial(_cost, card.costs), num_tokens, top_k, num_experts)


def _cost(costs: Costs, rows: int, config: Config) -> float:
    """Of a weight block of an expert with so many rows."""
    nanoseconds = costs[config.m_warpgroups]
    full, rest = divmod(rows, config.token_tile)
    cost = full * nanoseconds[config.token_tile]
    return cost + nanoseconds[next(width for width in config.widths if width >= rest)] if rest else cost


def fitted(config: Config, card: Card, units: int, k_blocks: int) -> Config:
    """``config``, or the one of :data:`FEW_UNITS` that takes less time where units are few.

    What counts is the busiest multiprocessor's share. The microseconds are of an H200 (benchmarks/notes-h200.md).

    Args:
      config: chosen for its token tile.
      card: whose multiprocessors share the units.
      units: expected number of them.
      k_blocks: of a unit.
    """
    count = card.multiprocessors
    if config != CONFIGS[0] or units > 3 * count or k_blocks < 2:
        return config
    in_cluster, alone = FEW_UNITS
    microseconds = card.costs[1][8] / 1000  # of a block

    def in_pairs(most: int) -> int:
        """Parts that one multiprocessor takes, if ``most`` CTAs or clusters have one each, and two of them share it."""
        return 1 if units <= count // 2 else 2 * math.ceil(units / most)

    times = {
        config: 2.5 + microseconds * k_blocks * in_pairs(2 * count),
        in_cluster: 4.9 + microseconds * math.ceil(k_blocks / 2) * in_pairs(count),
        alone: 3.0 + 1.04 * microseconds * k_blocks * math.ceil(units / count),
    }
    return min(times, key=lambda each: times[each])


def _grid(card: Card, config: Config, most_units: int) -> int:
    """Persistent CTAs, in whole clusters; of clusters no more than there may be units.

    All must be resident at once, because their units are handed out beforehand. With two CTAs a multiprocessor an H200
    has room for 132 clusters of two; but of four for 62 only, and of eight for 30.
    """
    clusters = max(1, card.multiprocessors * config.ctas_per_sm // config.cluster_k)
    return config.cluster_k * (min(clusters, most_units) if config.cluster_k > 1 else clusters)


def _likely_tiles(config: Config, num_tokens: int, local_experts: int, share: float) -> int:
    """Expected number of tiles; ``share``: of the tokens that choose one expert. Few tokens fill one tile an expert."""
    touched = local_experts * (1 - (1 - share) ** num_tokens)
    return round(max(touched, local_experts * share * num_tokens / config.token_tile))


def gemms(p: Problem, config: Config) -> tuple[Gemm1Spec, Gemm2Spec]:
    """Both GEMMs of a call (``steps.gemms``)."""
    return steps.gemms(p, config, Gemm1Spec, Gemm2Spec)


def build(p: Problem, card: Card) -> Program:
    """The program of a call, its kernels chosen from its shapes and for ``card``.

    Raises:
      ValueError: a size is beyond what the kernels take.
    """
    # Without tokens nothing is launched, and any config will do.
    num_experts = p.num_experts or p.local_experts
    config = best_config(card, max(1, p.num_tokens), p.top_k, num_experts)
    gemm1, gemm2 = gemms(p, config)
    is_ordered, quantised = p.combine == "ordered", p.precision == "w4a4"
    has_x_rows = (quantised and not p.x_is_rounded) or p.weight_on == "input"

    # Weight blocks of the prepared weights: rows and contraction of gate_up and of down.
    parts = activations.num_parts(p.activation)
    gate_up_rows = _blocks(parts * p.intermediate_size, weight_block.BLOCK_ROWS)
    gate_up_columns = _blocks(p.hidden_size, weight_block.BLOCK_K)
    down_rows = _blocks(p.hidden_size, weight_block.BLOCK_ROWS)
    down_columns = _blocks(p.intermediate_size, weight_block.BLOCK_K)
    h_blocks = gate_up_rows * weight_block.BLOCK_ROWS // parts // weight_block.BLOCK_K

    sort, workspaces = steps.sort(p, config.token_tile)
    tiles = workspaces["tile_expert"].size
    workspaces["h"] = jax.ShapeDtypeStruct((tiles, h_blocks, config.token_tile, weight_block.BLOCK_K), jnp.bfloat16)
    before, after = [sort], []
    if has_x_rows:
        x_rows, more = steps.x_rows(p)
        before.append(x_rows)
        workspaces |= more
    if is_ordered:
        combine, more = steps.combine(p)
        after.append(combine)
        workspaces |= more

    tiles_likely = _likely_tiles(config, p.num_tokens, p.local_experts, min(1.0, p.top_k / num_experts))
    m_tiles = [_blocks(rows, config.m_warpgroups) for rows in (gate_up_rows, down_rows)]
    gemm1, gemm2 = (
        dataclasses.replace(spec, config=fitted(config, card, tiles_likely * units, k_blocks))
        for spec, units, k_blocks in zip((gemm1, gemm2), m_tiles, (gate_up_columns, down_columns), strict=True)
    )
    launch1 = Launch("gemm1", gemm1, _grid(card, gemm1.config, tiles * m_tiles[0]), {
        **steps.gemm1_arguments(p), "x": "x_rows" if has_x_rows else "x",
        "m_blocks": gate_up_rows, "k_blocks": gate_up_columns,
    })  # fmt: skip
    launch2 = Launch("gemm2", gemm2, _grid(card, gemm2.config, tiles * m_tiles[1]), {
        **steps.gemm2_arguments(p), "m_blocks": down_rows, "k_blocks": down_columns, "h_blocks": h_blocks,
    })  # fmt: skip

    blocks = p.local_experts * weight_block.BLOCK_BYTES
    return Program(
        launches=(*before, launch1, launch2, *after) if p.num_tokens else (),
        adds="gemm2" if p.num_tokens and not is_ordered else None,
        workspaces=workspaces,
        weight_bytes={  # a prepared payload has the block scales inside
            "gate_up.payload": blocks * gate_up_rows * gate_up_columns, "gate_up.block_scale": 0,
            "down.payload": blocks * down_rows * down_columns, "down.block_scale": 0,
        },
        sizes=steps.sizes(p, h_blocks * weight_block.BLOCK_K),
    )  # fmt: skip


def product_spec(p: Product, config: Config) -> ProductSpec:
    """The kernel of a grouped product that multiplies."""
    return ProductSpec(config, p.precision, str(p.out_dtype), p.has_bias)


def build_product(p: Product, card: Card) -> Program:
    """The program of a grouped product, its kernels chosen from its shapes and for ``card``.

    Raises:
      ValueError: a size is beyond what the kernels take.
    """
    config = best_config(card, max(1, p.num_rows), 1, p.num_groups)
    row_blocks = _blocks(p.out_features, weight_block.BLOCK_ROWS)
    columns = _blocks(p.in_features, weight_block.BLOCK_K)
    groups, workspaces = steps.groups(p, config.token_tile, card)
    before = [groups]
    if p.precision == "w4a4":
        x_rows, more = steps.rounded_rows(p)
        before.append(x_rows)
        workspaces |= more
    tiles = workspaces["tile_expert"].size
    m_tiles = _blocks(row_blocks, config.m_warpgroups)
    tiles_likely = _likely_tiles(config, p.num_rows, p.local_groups, 1 / p.num_groups)
    config = fitted(config, card, tiles_likely * m_tiles, columns)
    product = Launch("product", product_spec(p, config), _grid(card, config, tiles * m_tiles), {
        **steps.product_arguments(p), "m_blocks": row_blocks, "k_blocks": columns,
    })  # fmt: skip
    payload_bytes = p.local_groups * row_blocks * columns * weight_block.BLOCK_BYTES
    return Program(
        launches=(*before, product) if p.num_rows else (),
        adds=None,
        workspaces=workspaces,
        weight_bytes={"weights.payload": payload_bytes, "weights.block_scale": 0},
        sizes=steps.product_sizes(p),
    )


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
