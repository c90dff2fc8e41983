"""The programs of calls on sm_90a: which kernels, over which buffers. ``README.md`` says what is in these."""

from collections.abc import Mapping
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jax_moe import activations
from jax_moe.kernels import steps, tiling
from jax_moe.kernels.device.constants import FEW_ROUTES
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


FEW_UNITS = with_most_stages((8,), 1, 4, 4, 1)
"""Instead of the first of these, where units are few (:func:`fitted`): a CTA has a multiprocessor for itself, and four
warpgroups for one unit."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Nanoseconds that a multiprocessor takes for a weight block of GEMM1.

    Attributes:
      nanoseconds: for its instructions, by m warpgroups and then by the rows that it is multiplied with; where they
        were measured, with all that memory adds.
      memory: to bring it, where that is not in there: once, however many tiles an expert has. The one hides the other
        but for a tenth.
    """

    nanoseconds: Mapping[int, Mapping[int, float]]
    memory: float = 0.0


@functools.lru_cache(maxsize=1024)  # every layer of a model asks, each time that it is lowered
def best_config(card: Card, num_tokens: int, top_k: int, num_experts: int) -> Config:
    """The config with the least expected time (``tiling.py``)."""
    return tiling.cheapest(CONFIGS, functools.partial(_cost, card.costs), num_tokens, top_k, num_experts)


def _cost(costs: Costs, rows: int, config: Config) -> float:
    """Of a weight block of an expert with so many rows."""
    nanoseconds = costs.nanoseconds[config.m_warpgroups]
    full, rest = divmod(rows, config.token_tile)
    busy = full * nanoseconds[config.token_tile]
    if rest:
        busy += nanoseconds[next(width for width in config.widths if width >= rest)]
    return max(costs.memory, busy) + min(costs.memory, busy) / 10


def fitted(config: Config, card: Card, units: int, k_blocks: int) -> Config:
    """``config``, or :data:`FEW_UNITS` where that takes less time.

    What counts is how many units the busiest multiprocessor has. With two CTAs on each, up to twice as many units as
    multiprocessors are a unit for each CTA, and some multiprocessor has two of them, however few they are: where a CTA
    goes is nobody's choice. The microseconds are of an H200 (benchmarks/notes-h200.md, T = 1).

    Args:
      config: chosen for its token tile.
      card: whose multiprocessors share the units.
      units: expected number of them.
      k_blocks: of a unit.
    """
    count = card.multiprocessors
    if config != CONFIGS[0] or units > 3 * count:  # with more, units that take turns even out
        return config
    unit = _cost(card.costs, 8, config) / 1000 * k_blocks
    usual = 2.5 + unit * 2 * math.ceil(units / (2 * count))
    alone = 3.0 + unit * 1.04 * math.ceil(units / count)
    return FEW_UNITS if alone < usual else config


def _likely_tiles(config: Config, num_tokens: int, local_experts: int, share: float) -> int:
    """Expected number of tiles; ``share``: of the tokens that choose one expert. Few tokens fill one tile an expert."""
    touched = local_experts * (1 - (1 - share) ** num_tokens)
    return round(max(touched, local_experts * share * num_tokens / config.token_tile))


def gemms(p: Problem, config: Config) -> tuple[Gemm1Spec, Gemm2Spec]:
    """Both GEMMs of a call (``steps.gemms``)."""
    gemm1, gemm2 = steps.gemms(p, config, Gemm1Spec, Gemm2Spec)
    if _maps_routes(p, config):
        gemm1 = dataclasses.replace(gemm1, maps_routes=True)
        gemm2 = dataclasses.replace(gemm2, maps_routes=True, weighted=p.weight_on == "output")
    return gemm1, gemm2


def _maps_routes(p: Problem, config: Config) -> bool:
    """Whether the GEMMs make the tile map for themselves: with so few routes that costs them less than a sort in front.

    Only in the configs for a few rows of each expert: few routes on few experts are no case to have kernels for.
    """
    return 0 < p.num_routes <= FEW_ROUTES and config.m_warpgroups == 1


def _grid(card: Card, config: Config, tiles: int, row_blocks: int) -> int:
    """CTAs of a persistent GEMM: no more than run at once, or than there may be units.

    One without work holds up the next kernel, which starts when all have run (benchmarks/notes-h200.md, T = 1).
    """
    units = tiles * _blocks(row_blocks, config.m_warpgroups)
    return min(card.multiprocessors * config.ctas_per_sm // config.cluster, units) * config.cluster


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
    has_x_rows = (quantised and not p.x_is_rounded) or p.has_parcels or p.weight_on == "input"

    # Weight blocks of the prepared weights: rows and contraction of gate_up and of down.
    parts = activations.num_parts(p.activation)
    gate_up_rows = _blocks(parts * p.intermediate_size, weight_block.BLOCK_ROWS)
    gate_up_columns = _blocks(p.hidden_size, weight_block.BLOCK_K)
    down_rows = _blocks(p.hidden_size, weight_block.BLOCK_ROWS)
    down_columns = _blocks(p.intermediate_size, weight_block.BLOCK_K)
    h_blocks = gate_up_rows * weight_block.BLOCK_ROWS // parts // weight_block.BLOCK_K

    sort, workspaces = steps.sort(p, config.token_tile)
    before, after = [sort], []
    if gemm1.maps_routes:
        before, workspaces = [], {}
    tiles = steps.num_tiles(p, config.token_tile)
    workspaces["h"] = jax.ShapeDtypeStruct((tiles, h_blocks, config.token_tile, weight_block.BLOCK_K), jnp.bfloat16)
    if has_x_rows:
        x_rows, more = steps.x_rows(p)
        before.append(x_rows)
        workspaces |= more
    if is_ordered:
        combine, more = steps.combine(p)
        after.append(combine)
        workspaces |= more

    likely = _likely_tiles(config, p.num_tokens, p.local_experts, min(1.0, p.top_k / num_experts))
    config1 = fitted(config, card, likely * gate_up_rows, gate_up_columns)
    config2 = fitted(config, card, likely * down_rows, down_columns)
    gemm1, gemm2 = dataclasses.replace(gemm1, config=config1), dataclasses.replace(gemm2, config=config2)
    grid1, grid2 = _grid(card, config1, tiles, gate_up_rows), _grid(card, config2, tiles, down_rows)
    launch1 = Launch("gemm1", gemm1, grid1, {
        **steps.gemm1_arguments(p, gemm1.maps_routes), "x": "x_rows" if has_x_rows else "x",
        "m_blocks": gate_up_rows, "k_blocks": gate_up_columns,
    })  # fmt: skip
    launch2 = Launch("gemm2", gemm2, grid2, {
        **steps.gemm2_arguments(p, gemm2.maps_routes),
        "m_blocks": down_rows, "k_blocks": down_columns, "h_blocks": h_blocks,
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
    before, rows = [groups], "x"
    if p.precision == "w4a4":
        x_rows, more = steps.rounded_rows(p)
        before.append(x_rows)
        rows = "x_rows"
        workspaces |= more
    likely = _likely_tiles(config, p.num_rows, p.local_groups, 1 / p.num_groups)
    config = fitted(config, card, likely * row_blocks, columns)
    product = Launch("product", product_spec(p, config), card.multiprocessors * config.ctas_per_sm, {
        **steps.product_arguments(p), "x": rows, "m_blocks": row_blocks, "k_blocks": columns,
    })  # fmt: skip
    bytes_per_matrix = row_blocks * columns * weight_block.BLOCK_BYTES
    return steps.product_program(p, (*before, product), workspaces, bytes_per_matrix)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
