"""The programs of calls on sm_90a: which kernels, over which buffers. ``README.md`` says what is in these."""

from collections.abc import Mapping
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp

from jax_moe import activations
from jax_moe.kernels import steps, tiling
from jax_moe.kernels.device.constants import FEW_ROUTES
from jax_moe.kernels.sm90.device import weight_block
from jax_moe.kernels.sm90.specs import (
    Config,
    Gemm1Spec,
    Gemm2Spec,
    HRowsSpec,
    LinearSpec,
    ProductSpec,
    with_most_stages,
)
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
    _config(80, 96), _config(96, 112), _config(112, 128, 144), _config(128, 136, 152),
)  # fmt: skip
"""What a call chooses from. Experts with about as many rows want widths below the widest, so that few of them need two
tiles and few multiply padding; experts with two tiles or more have balanced ones."""

_GRANULE = 8  # of balanced tiles: the least rows that a product has


FEW_UNITS = with_most_stages((8,), 1, 4, 4, 1)
"""Instead of the first of these, where units are few (:func:`fitted`): a CTA has a multiprocessor for itself, and four
warpgroups for one unit."""

SPLIT_UNITS = with_most_stages((8,), 1, 4, 4, 1, cluster=2)
"""The same in clusters of two, which share a unit where they would have an odd number."""


@dataclasses.dataclass(frozen=True)
class FewUnits:
    """What counts where a multiprocessor has only a few units (:func:`fitted`, :func:`linear_form`).

    Attributes:
      pair: nanoseconds that a GEMM of two CTAs a multiprocessor takes besides its blocks.
      alone: the same of one CTA.
      block: what a block takes one CTA with four warpgroups, where one of two CTAs with two each takes 1.
      turns: units a multiprocessor; where there are more, they even out, whichever CTA takes them.
      meeting: nanoseconds that a cluster takes for each of its CTAs to share their sums.
      handing_over: and for each row of tokens of a tile, and m warpgroup.
    """

    pair: float
    alone: float
    block: float
    turns: float
    meeting: float
    handing_over: float


BATCH_INVARIANT = tuple(
    with_most_stages(config.widths, config.m_warpgroups, 1, config.stage_blocks, config.ctas_per_sm)
    for config in CONFIGS
)
"""What a batch-invariant call chooses from: all sum the blocks of the contraction in one order, from first to last."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a card's kernels are chosen by.

    Attributes:
      nanoseconds: that a multiprocessor takes for the instructions of a weight block, by m warpgroups and then by the
        rows that it is multiplied with; where they were measured, with all that memory adds.
      few_units: what besides counts where units are few.
      memory: nanoseconds to bring a block, where that is not in there: once, however many tiles an expert has. The one
        hides the other but for a tenth.
    """

    nanoseconds: Mapping[int, Mapping[int, float]]
    few_units: FewUnits
    memory: float = 0.0


@functools.lru_cache(maxsize=1024)  # every layer of a model asks, each time that it is lowered
def best_config(
    card: Card, num_tokens: int, top_k: int, num_experts: int, batch_invariant: bool = False, *, balanced: bool = True
) -> Config:
    """The config with the least expected time (``tiling.py``); ``balanced``: whether an expert's tiles are."""
    configs = BATCH_INVARIANT if batch_invariant else CONFIGS
    cost = functools.partial(_cost, card.costs, balanced=balanced)
    return tiling.cheapest(configs, cost, num_tokens, top_k, num_experts)


def _cost(costs: Costs, rows: int, config: Config, balanced: bool = True) -> float:
    """Of a weight block of an expert with so many rows; those of a product are in full tiles, not in balanced ones."""
    tile = config.token_tile
    if balanced and (granule := _granule(config)):
        tile = tiling.balanced_tile(rows, tile, granule)
    full, rest = divmod(rows, tile)
    nanoseconds = costs.nanoseconds[config.m_warpgroups]
    busy = 0.0
    for count, size in ((full, tile), (1, rest)):
        if count and size:
            busy += count * nanoseconds[next(width for width in config.widths if width >= size)]
    return max(costs.memory, busy) + min(costs.memory, busy) / 10


def _granule(config: Config) -> int:
    """Of balanced tiles, where there are widths to choose from: an expert's tiles then take the least of them."""
    return _GRANULE if len(config.widths) > 1 else 0


def fitted(config: Config, card: Card, routes: tuple[int, int, int, int], row_blocks: int, k_blocks: int) -> Config:
    """``config``, or :data:`FEW_UNITS` or :data:`SPLIT_UNITS` where that is likely to take less time.

    What counts is how many units the busiest multiprocessor has, one after the other or side by side. One expert more
    may be one turn more, so each number of experts counts as it is likely. Which units are shared depends on how many
    there are: only those of one token are, as its bits would depend on others; and only where there is at most one for
    two CTAs, which was measured.

    Args:
      config: chosen for its token tile.
      card: whose multiprocessors share the units.
      routes: T, K, E and L.
      row_blocks, k_blocks: of an expert's matrix.
    """
    if config != CONFIGS[0]:
        return config
    tokens, top_k, num_experts, local_experts = routes
    tiles = min(local_experts, num_experts) * tokens * min(1.0, top_k / num_experts) / config.token_tile  # all full
    few, unit = card.costs.few_units, _cost(card.costs, config.token_tile, config) * k_blocks
    times = dict.fromkeys((config, FEW_UNITS), 0.0)
    if tokens == 1 and k_blocks > 1:
        times[SPLIT_UNITS] = few.meeting * SPLIT_UNITS.cluster + few.handing_over * SPLIT_UNITS.token_tile
    for experts, likelihood in tiling.touched(*routes):
        units = max(experts, tiles) * row_blocks / card.multiprocessors  # of each
        even = units > few.turns
        turns = {
            config: units if even else _turns_of_pairs(units),
            FEW_UNITS: units if even else math.ceil(units),
            SPLIT_UNITS: 1 / 2 if units <= 1 / 2 else math.inf,
        }
        for form in times:
            start, block = (few.pair, 1.0) if form == config else (few.alone, few.block)
            times[form] += likelihood * (start + unit * block * turns[form])
    return min(times, key=lambda form: times[form])


def _turns_of_pairs(units: float) -> float:
    """How many of so many units a multiprocessor the busiest one has, if each has two CTAs.

    Where a CTA goes, or which one is free first, is nobody's choice: the last units are on their own, or in twos on one
    multiprocessor, the more likely the more they are.
    """
    full = 2 * math.floor(units / 2)
    rest = units - full
    return full + (min(2.0, 1 + rest) if rest else 0)


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
    # The pass over h of w4a4_dynamic reads the sort's map.
    return 0 < p.num_routes <= FEW_ROUTES and config.m_warpgroups == 1 and p.precision != "w4a4_dynamic"


def _grid(card: Card, config: Config, tiles: int, row_blocks: int) -> int:
    """CTAs of a persistent GEMM: no more than run at once, or than there may be units.

    One without work holds up the next kernel, which starts when all have run (benchmarks/notes-h200.md, T = 1).
    """
    units = _units(config, tiles, row_blocks)
    return config.cluster * min(card.multiprocessors * config.ctas_per_sm // config.cluster, units)


def _units(config: Config, tiles: int, row_blocks: int) -> int:
    return tiles * tiling.blocks(row_blocks, config.m_warpgroups)


def build(p: Problem, card: Card) -> Program:
    """The program of a call, its kernels chosen from its shapes and for ``card``.

    Raises:
      ValueError: a size is beyond what the kernels take.
    """
    # Without tokens nothing is launched, and any config will do.
    num_experts = p.num_experts or p.local_experts
    config = best_config(card, max(1, p.num_tokens), p.top_k, num_experts, p.batch_invariant)
    gemm1, gemm2 = gemms(p, config)
    is_ordered, quantised = p.combine == "ordered", p.precision != "w4a16"
    has_x_rows = (quantised and p.x_form != "rounded") or p.weight_on == "input"

    # Weight blocks of the prepared weights: rows and contraction of gate_up and of down.
    parts = activations.num_parts(p.activation)
    gate_up_rows = tiling.blocks(parts * p.intermediate_size, weight_block.BLOCK_ROWS)
    gate_up_columns = tiling.blocks(p.hidden_size, weight_block.BLOCK_K)
    down_rows = tiling.blocks(p.hidden_size, weight_block.BLOCK_ROWS)
    down_columns = tiling.blocks(p.intermediate_size, weight_block.BLOCK_K)
    h_blocks = gate_up_rows * weight_block.BLOCK_ROWS // parts // weight_block.BLOCK_K

    sort, workspaces = steps.sort(p, config.token_tile, _granule(config))
    before, between, after = [sort], [], []
    if gemm1.maps_routes:
        before, workspaces = [], {}
    tiles = steps.num_tiles(p, config.token_tile)
    workspaces["h"] = jax.ShapeDtypeStruct((tiles, h_blocks, config.token_tile, weight_block.BLOCK_K), jnp.bfloat16)
    if has_x_rows:
        x_rows, more = steps.x_rows(p)
        before.append(x_rows)
        workspaces |= more
    if p.precision == "w4a4_dynamic":
        h_rows, more = _h_rows(p, tiles * config.token_tile, config.token_tile, h_blocks)
        between.append(h_rows)
        workspaces |= more
    if is_ordered:
        combine, more = steps.combine(p)
        after.append(combine)
        workspaces |= more

    routes = p.num_tokens, p.top_k, num_experts, p.local_experts
    config1 = fitted(config, card, routes, gate_up_rows, gate_up_columns)
    config2 = fitted(config, card, routes, down_rows, down_columns)
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
        launches=(*before, launch1, *between, launch2, *after) if p.num_tokens else (),
        adds="gemm2" if p.num_tokens and not is_ordered else None,
        workspaces=workspaces,
        weight_bytes={  # a prepared payload has the block scales inside
            "gate_up.payload": blocks * gate_up_rows * gate_up_columns, "gate_up.block_scale": 0,
            "down.payload": blocks * down_rows * down_columns, "down.block_scale": 0,
        },
        sizes=steps.sizes(p, h_blocks * weight_block.BLOCK_K),
    )  # fmt: skip


def _h_rows(p: Problem, rows: int, token_tile: int, h_blocks: int) -> tuple[Launch, steps.Workspaces]:
    """The pass over h of w4a4_dynamic."""
    spec = HRowsSpec()
    arguments = {
        **steps.same("h", "row_route", "expert_tiles"), "row_scales": "h_row_scales",
        "local_experts": p.local_experts, "token_tile": token_tile, "h_blocks": h_blocks,
    }  # fmt: skip
    workspaces = {"h_row_scales": jax.ShapeDtypeStruct((rows,), jnp.float32)}
    return Launch("h_rows", spec, spec.grid(rows), arguments), workspaces


def _matrix_blocks(p: Product) -> tuple[int, int]:
    """Weight blocks of a prepared matrix, along N and along C."""
    return tiling.blocks(p.out_features, weight_block.BLOCK_ROWS), tiling.blocks(p.in_features, weight_block.BLOCK_K)


def product_spec(p: Product, config: Config) -> ProductSpec:
    """The kernel of a grouped product that multiplies."""
    return ProductSpec(config, p.precision, str(p.out_dtype), p.has_bias)


def linear_spec(p: Product, config: Config, split: int) -> LinearSpec:
    """The kernel of a product with one matrix, whose contraction ``split`` CTAs share."""
    return LinearSpec(config, p.precision, str(p.out_dtype), p.has_bias, split)


def build_product(p: Product, card: Card) -> Program:
    """The program of a grouped product, its kernels chosen from its shapes and for ``card``.

    Raises:
      ValueError: a size is beyond what the kernels take.
    """
    if p.num_groups == p.local_groups == 1 and p.precision != "w4a4_dynamic":  # whose rows have scales of their own
        form = linear_form(card, max(1, p.num_rows), *_matrix_blocks(p), p.batch_invariant)
        return linear_with_form(p, card, *form)
    config = best_config(card, max(1, p.num_rows), 1, p.num_groups, p.batch_invariant, balanced=False)
    row_blocks, columns = _matrix_blocks(p)
    groups, workspaces = steps.groups(p, config.token_tile, card)
    before, rows = [groups], "x"
    if p.precision != "w4a16":
        x_rows, more = steps.rounded_rows(p)
        before.append(x_rows)
        rows = "x_rows"
        workspaces |= more
    config = fitted(config, card, (p.num_rows, 1, p.num_groups, p.local_groups), row_blocks, columns)
    grid = _grid(card, config, workspaces["tile_expert"].size, row_blocks)
    product = Launch("product", product_spec(p, config), grid, {
        **steps.product_arguments(p), "x": rows, "m_blocks": row_blocks, "k_blocks": columns,
    })  # fmt: skip
    bytes_per_matrix = row_blocks * columns * weight_block.BLOCK_BYTES
    return steps.product_program(p, (*before, product), workspaces, bytes_per_matrix)


SPLITS = 1, 2, 3, 4
"""CTAs that may share a unit of a product with one matrix. Larger clusters gained little, and find less room."""

_ROOM = 0.9
"""Part of the multiprocessors that clusters of more than two find room on: 114 CTAs in threes ran at once on an H200's
132, 132 in threes and 128 in fours did not."""


@functools.lru_cache(maxsize=1024)
def linear_form(
    card: Card, num_rows: int, row_blocks: int, k_blocks: int, batch_invariant: bool = False
) -> tuple[Config, int]:
    """The config of a product with one matrix, and how many CTAs share a unit: what takes the least time.

    Batch-invariant: none share one, as that sums in an order of its own.
    """
    configs, splits = ((*CONFIGS, FEW_UNITS), SPLITS) if not batch_invariant else (BATCH_INVARIANT, (1,))
    forms = itertools.product(configs, [split for split in splits if split <= k_blocks])
    return min(forms, key=lambda form: _linear_nanoseconds(card, *form, num_rows, row_blocks, k_blocks))


def _linear_nanoseconds(card: Card, config: Config, split: int, num_rows: int, row_blocks: int, k_blocks: int) -> float:
    """Of a product with one matrix. Units are alike, and CTAs have a multiprocessor each if there are enough."""
    few, tiles = card.costs.few_units, tiling.blocks(num_rows, config.token_tile)
    ctas = split * _units(config, tiles, row_blocks)
    places = card.multiprocessors * (_ROOM if split > 2 else 1)
    if split > 1 and ctas > places * config.ctas_per_sm:
        return math.inf
    turns = math.ceil(ctas / places)
    if turns > 1:
        turns = math.ceil(turns / config.ctas_per_sm) * config.ctas_per_sm
    block = _cost(card.costs, num_rows, config, balanced=False) / tiles * (few.block if config == FEW_UNITS else 1)
    start = few.alone if config.ctas_per_sm == 1 else few.pair
    if split > 1:
        start += few.meeting * split + few.handing_over * config.m_warpgroups * config.token_tile
    return start + turns * tiling.blocks(k_blocks, split) * config.m_warpgroups * block


def linear_with_form(p: Product, card: Card, config: Config, split: int) -> Program:
    """The program of a product with one matrix, whatever :func:`build_product` would choose.

    Raises:
      ValueError: a size is beyond what the kernels take.
    """
    row_blocks, columns = _matrix_blocks(p)
    before, workspaces, rows = [], {}, "x"
    if p.precision == "w4a4":
        x_rows, workspaces = steps.rounded_rows(p, per_group=False)
        before, rows = [x_rows], "x_rows"
    spec = linear_spec(p, config, split)
    tiles = tiling.blocks(p.num_rows, config.token_tile)
    grid = split * _units(config, tiles, row_blocks) if split > 1 else _grid(card, config, tiles, row_blocks)
    launch = Launch("product", spec, grid, {
        **steps.linear_arguments(p), "x": rows, "m_blocks": row_blocks, "k_blocks": columns,
    })  # fmt: skip
    return steps.product_program(p, (*before, launch), workspaces, row_blocks * columns * weight_block.BLOCK_BYTES)
