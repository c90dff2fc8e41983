"""The program of one call on sm_100f: which kernels, over which buffers. ``README.md`` says what is in these."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_moe import activations
from jax_moe.kernels import steps, tiling
from jax_moe.kernels.sm100.device import weight_block
from jax_moe.kernels.sm100.device.weight_block import BLOCK_K, BLOCK_ROWS, STEP_K
from jax_moe.kernels.sm100.specs import Config, Gemm1Spec, Gemm2Spec, ProductSpec, with_most_stages
from jax_moe.kernels.target import Card, Launch, Program
from jax_moe.problem import Precision, Problem
from jax_moe.product.problem import Product

CONFIGS: dict[Precision, tuple[Config, ...]] = {
    "w4a4": (
        *(with_most_stages("w4a4", tile, ctas) for tile, ctas in ((16, 2), (32, 2), (64, 2), (128, 1), (192, 1))),
        with_most_stages("w4a4", 208, 1, pair=True),  # the widest that tensor memory has room for
    ),
    # No pairs: bf16 tokens keep the tensor cores busy for as long as they take to load.
    "w4a16": (
        with_most_stages("w4a16", 16, 2, stage_blocks=4, dequantisers=1),
        with_most_stages("w4a16", 32, 2, stage_blocks=4, dequantisers=1),
        with_most_stages("w4a16", 64, 2, stage_blocks=2, dequantisers=1),
        with_most_stages("w4a16", 128, 1, stage_blocks=2, dequantisers=2),
        # With one block a stage ptxas 13.0 (V13.0.88) crashes.
        with_most_stages("w4a16", 192, 1, stage_blocks=2, dequantisers=2),
    ),
}
"""What a call chooses from, by precision; the width of a tile is a value of run time."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Clocks of a multiprocessor for 128 x 256 weights; from data sheets, not measured (docs/blackwell.md).

    Attributes:
      memory: to get them from memory, all multiprocessors at once.
      fill: bytes that it gets from the L2 cache in a clock.
      product: of the tensor cores, for one token, by precision.
      tile: that a tile costs beyond these.
      pair: that it costs two CTAs more to wait for each other.
    """

    memory: float
    fill: float
    product: dict[Precision, float]
    tile: float
    pair: float


@functools.lru_cache(maxsize=1024)  # every layer of a model asks, each time that it is lowered
def best_config(card: Card, precision: Precision, num_tokens: int, top_k: int, num_experts: int) -> Config:
    """The config with the least expected time (``tiling.py``)."""
    cost = functools.partial(_cost, card.costs, precision)
    return tiling.cheapest(CONFIGS[precision], cost, num_tokens, top_k, num_experts)


def _cost(costs: Costs, precision: Precision, rows: int, config: Config) -> float:
    """Of 128 x 256 weights of an expert with so many rows: memory and all else hide each other but for a tenth."""
    tiles = tiling.blocks(rows, config.token_tile)
    width = tiling.balanced_tile(rows, config.token_tile, config.granule)
    product = costs.product[precision] * width
    fill = _loaded_bytes(precision, width, config.pair) / costs.fill
    busy = tiles * (max(product, fill) + costs.tile + (costs.pair if config.pair else 0))
    return max(costs.memory, busy) + min(costs.memory, busy) / 10


def _loaded_bytes(precision: Precision, width: int, pair: bool) -> int:
    """What a CTA loads for 128 x 256 weights times a tile: of a pair half the rows, but all of GEMM2's scale atoms."""
    rows = width // 2 if pair else width
    if precision == "w4a4":
        scales = tiling.blocks(width, BLOCK_ROWS) * weight_block.SCALE_BYTES
        return weight_block.BLOCK_BYTES + rows * BLOCK_K // 2 + scales
    return weight_block.BLOCK_BYTES + rows * BLOCK_K * 2


def _granule(p: Problem, config: Config) -> int:
    """Of balanced tiles, so that units of work are alike, where experts are likely to have several; 0: of full ones."""
    return config.granule if p.num_routes > (p.num_experts or p.local_experts) * config.token_tile else 0


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
    return with_config(p, card, best_config(card, p.precision, max(1, p.num_tokens), p.top_k, num_experts))


def with_config(p: Problem, card: Card, config: Config) -> Program:
    """The program of a call with this config, whatever :func:`build` would choose.

    Raises:
      ValueError: a size is beyond what the kernels take.
    """
    gemm1, gemm2 = gemms(p, config)
    is_ordered, quantised = p.combine == "ordered", p.precision == "w4a4"

    # Weight blocks of the prepared weights: rows and contraction of gate_up and of down.
    block_k, block_bytes = _weight_block(p.precision)
    parts = activations.num_parts(p.activation)
    gate_up_rows = tiling.blocks(parts * p.intermediate_size, BLOCK_ROWS)
    down_rows = tiling.blocks(p.hidden_size, BLOCK_ROWS)
    padded_intermediate = gate_up_rows * BLOCK_ROWS // parts
    h_blocks = tiling.blocks(padded_intermediate, block_k)

    sort, workspaces = steps.sort(p, config.token_tile, _granule(p, config))
    tiles = workspaces["tile_expert"].size
    before, after = [sort], []
    rows = {"x": "x", "x_scales": None}
    if quantised:
        x_codes, more = steps.x_codes(p, BLOCK_K)
        before.append(x_codes)
        rows = steps.same("x_scales") | {"x": "x_codes"}
        workspaces |= more
        tile_bytes = config.token_tile * weight_block.ROW_BYTES
        tile_bytes += tiling.blocks(config.token_tile, BLOCK_ROWS) * weight_block.SCALE_BYTES
        workspaces["h"] = jax.ShapeDtypeStruct((tiles, h_blocks, tile_bytes), jnp.uint8)
    else:
        workspaces["h"] = jax.ShapeDtypeStruct((tiles, h_blocks, config.token_tile, block_k), jnp.bfloat16)
        if p.weight_on == "input":
            x_rows, more = steps.x_rows(p)
            before.append(x_rows)
            rows["x"] = "x_rows"
            workspaces |= more
    if is_ordered:
        combine, more = steps.combine(p)
        after.append(combine)
        workspaces |= more

    grid = _grid(card, config)
    launch1 = Launch("gemm1", gemm1, grid, {
        **steps.gemm1_arguments(p), **rows,
        "m_blocks": gate_up_rows, "k_steps": tiling.blocks(p.hidden_size, STEP_K), "h_blocks": h_blocks,
    })  # fmt: skip
    launch2 = Launch("gemm2", gemm2, grid, {
        **steps.gemm2_arguments(p),
        "m_blocks": down_rows, "k_steps": tiling.blocks(p.intermediate_size, STEP_K), "h_blocks": h_blocks,
    })  # fmt: skip

    blocks = p.local_experts * block_bytes
    return Program(
        launches=(*before, launch1, launch2, *after) if p.num_tokens else (),
        adds="gemm2" if p.num_tokens and not is_ordered else None,
        workspaces=workspaces,
        weight_bytes={  # a prepared payload has the block scales inside
            "gate_up.payload": blocks * gate_up_rows * tiling.blocks(p.hidden_size, block_k), "gate_up.block_scale": 0,
            "down.payload": blocks * down_rows * tiling.blocks(p.intermediate_size, block_k), "down.block_scale": 0,
        },
        sizes=steps.sizes(p, padded_intermediate),
    )  # fmt: skip


def product_spec(p: Product, config: Config) -> ProductSpec:
    """The kernel of a grouped product that multiplies."""
    return ProductSpec(config, p.precision, str(p.out_dtype), p.has_bias)


def build_product(p: Product, card: Card) -> Program:
    """The program of a grouped product, its kernels chosen from its shapes and for ``card``.

    Raises:
      ValueError: a size is beyond what the kernels take.
    """
    return product_with_config(p, card, best_config(card, p.precision, max(1, p.num_rows), 1, p.num_groups))


def product_with_config(p: Product, card: Card, config: Config) -> Program:
    """The program of a grouped product with this config, whatever :func:`build_product` would choose.

    Raises:
      ValueError: a size is beyond what the kernels take.
    """
    block_k, block_bytes = _weight_block(p.precision)
    row_blocks = tiling.blocks(p.out_features, BLOCK_ROWS)
    groups, workspaces = steps.groups(p, config.token_tile, card)
    before, rows = [groups], {"x": "x", "x_scales": None}
    if p.precision == "w4a4":
        x_codes, more = steps.group_codes(p, BLOCK_K)
        before.append(x_codes)
        rows = steps.same("x_scales") | {"x": "x_codes"}
        workspaces |= more
    product = Launch("product", product_spec(p, config), _grid(card, config), {
        **steps.product_arguments(p), **rows, "m_blocks": row_blocks, "k_steps": tiling.blocks(p.in_features, STEP_K),
    })  # fmt: skip
    bytes_per_matrix = row_blocks * tiling.blocks(p.in_features, block_k) * block_bytes
    return steps.product_program(p, (*before, product), workspaces, bytes_per_matrix)


def _weight_block(precision: Precision) -> tuple[int, int]:
    """Values along the contraction, and bytes, of a block of prepared weights."""
    if precision == "w4a4":
        return BLOCK_K, weight_block.BLOCK_BYTES
    return weight_block.BF16_BLOCK_K, weight_block.BF16_BLOCK_BYTES


def _grid(card: Card, config: Config) -> int:
    """CTAs: persistent, in whole pairs."""
    return tiling.blocks(card.multiprocessors * config.ctas_per_sm, 1 + config.pair) * (1 + config.pair)
