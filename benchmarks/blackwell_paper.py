"""The tables of docs/blackwell.md: what sm_100f's kernels should do on a B200, on paper; nothing here was measured.

    python benchmarks/blackwell_paper.py           # prints the tables
    python benchmarks/blackwell_paper.py --write   # into docs/blackwell.md

Inputs are data sheets (``target.py``), the shapes of models, the configs that calls choose, and the instructions that
each role executes, counted on the emulator (``blackwell_counts.json``, by tests/count_instructions.py).
"""

from collections.abc import Iterator
import json
import math
import pathlib
import sys
from typing import Any

from jax_moe import shapes
from jax_moe.kernels import tiling
from jax_moe.kernels.sm100 import program, specs
from jax_moe.kernels.sm100.device import weight_block
from jax_moe.kernels.sm100.target import SM100
from jax_moe.problem import Precision

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "blackwell.md"
COUNTS = json.loads(pathlib.Path(__file__).with_name("blackwell_counts.json").read_text())
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 16384)

B200 = SM100.cards[0]
CLOCK = 1.855e9
BYTES_PER_SECOND = 7.2e12
"""90% of the memory's data sheet."""
ATTAINED = 5.7 / 9.0
"""Of the tensor cores' peak, what the best dense NVFP4 kernels reach on a B200, whatever limits them there."""
FLOPS = {"w4a4": ATTAINED * 9.0e15, "w4a16": ATTAINED * 2.25e15}

SORT = {1: 3.7, 512: 5.0, 2048: 9.7, 8192: 30.0, 16384: 55.0}
"""Microseconds of the sort, from this T on: as measured on an H200 (notes-h200.md), beyond T = 2048 in proportion."""
START = 1.5
"""Microseconds of each GEMM from its start until memory is busy, and from its last product to its end: assumed."""


def counted(precision: Precision, config: specs.Config, width: float, gemm: str, role: str, per: str) -> float:
    """Instructions of a role for a block or a unit of one CTA, interpolated between the widths counted."""
    low, high = (
        COUNTS[f"{precision} {config.name} {w}"][gemm][per].get(role, 0) for w in (config.granule, config.token_tile)
    )
    share = (width - config.granule) / max(1, config.token_tile - config.granule)
    return (low + share * (high - low)) / (2 if config.pair else 1)


def issue_clocks(precision: Precision, config: specs.Config, width: float, gemm: str, k_blocks: int) -> float:
    """Of a block of 128 x 256 weights: instructions of the busiest of four schedulers, the unit's share included.

    A warp belongs to the scheduler of its index modulo 4: one of the epilogue's warps and of the dequantising ones to
    each, the products to the first, the loads to the second, the two that gather to the others.
    """

    def role(name: str) -> float:
        count = counted(precision, config, width, gemm, name, "block")
        return count + counted(precision, config, width, gemm, name, "unit") / k_blocks

    everywhere = role("epilogue") / 4 + role("dequantise") / 4
    return everywhere + max(role("products"), role("loads"), role("gather") / 2)


def product_clocks(precision: Precision, config: specs.Config, width: float) -> float:
    """Of a block: the products at the attained rate, or w4a4's operands from shared memory at 128 bytes a clock."""
    products = B200.costs.product[precision] * width / ATTAINED
    if precision == "w4a16":
        return products  # weights come from tensor memory
    rows = width / 2 if config.pair else width
    return max(products, (weight_block.CODE_BYTES + rows * weight_block.ROW_BYTES) / 128)


def call_microseconds(precision: Precision, layer: shapes.LayerShape, tokens: int) -> dict[str, Any]:
    """Floor and expectation of a call."""
    config = program.best_config(B200, precision, tokens, layer.top_k, layer.num_experts)
    touched, costs = layer.touched_experts(tokens), B200.costs
    floor = {
        "HBM": touched * layer.weight_bytes_per_expert / BYTES_PER_SECOND * 1e6,
        "tensor cores": layer.flops(tokens) / FLOPS[precision] * 1e6,
    }
    total, limits = 0.0, {}
    for gemm in ("gemm1", "gemm2"):
        rows, contraction = 2 * layer.intermediate_size, layer.hidden_size
        if gemm == "gemm2":
            rows, contraction = layer.hidden_size, layer.intermediate_size
        k_blocks = math.ceil(contraction / weight_block.BLOCK_K)
        blocks = math.ceil(rows / weight_block.BLOCK_ROWS) * k_blocks  # of an expert
        memory = touched * blocks * weight_block.BLOCK_BYTES / BYTES_PER_SECOND * 1e6
        sums = dict.fromkeys(("tensor cores", "fill", "issue"), 0.0)
        busiest = 0.0
        for count, likelihood in tiling._likely_rows(tokens, layer.top_k / layer.num_experts):
            tiles = -(-count // config.token_tile)
            width = -(-math.ceil(count / tiles) // config.granule) * config.granule
            weight = touched * likelihood * tiles * blocks / B200.multiprocessors / CLOCK * 1e6
            loaded = program._loaded_bytes(precision, width, config.pair)
            clocks = (
                product_clocks(precision, config, width), loaded / costs.fill,
                issue_clocks(precision, config, width, gemm, k_blocks),
            )  # fmt: skip
            for name, value in zip(sums, clocks, strict=True):
                sums[name] += weight * value
            busiest += weight * max(clocks)
        limits[gemm] = max({"HBM": memory, **sums}.items(), key=lambda item: item[1])[0]
        unit = busiest / (touched * blocks / k_blocks) * B200.multiprocessors  # of one CTA; half of them end that late
        total += max(memory, busiest) + START + (unit / 2 if busiest > memory else 0)
    sort = max(value for start, value in SORT.items() if start <= tokens)
    bound = max(floor, key=lambda name: floor[name])
    if precision == "w4a4":  # the pass over x; behind the sort where that has a cluster
        total += START if tokens * layer.top_k <= 2048 else tokens * layer.hidden_size * 2.5625 / BYTES_PER_SECOND * 1e6
    return {
        "floor": floor[bound], "bound": bound, "config": config.name, "expected": total + sort,
        "limits": " / ".join(dict.fromkeys(limits.values())),
    }  # fmt: skip


def configs() -> Iterator[str]:
    """Each config: what it needs, and what it executes, as lines of a table."""
    yield (
        "| config | precision | tile | shared memory | tensor memory | weights in flight | issue, GEMM1 / GEMM2 "
        "| tensor cores | fill |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for precision, some in program.CONFIGS.items():
        for config in some:
            columns = 2 * config.token_tile
            atoms = -(-config.token_tile // 128)
            columns += 2 * 16 * (1 + atoms) if precision == "w4a4" else 64
            allocated = max(32, 1 << (columns - 1).bit_length())
            in_flight = config.stages * config.ctas_per_sm * config.stage_blocks
            in_flight *= weight_block.BLOCK_BYTES if precision == "w4a4" else weight_block.BF16_BLOCK_BYTES
            issue = [issue_clocks(precision, config, config.token_tile, gemm, 16) for gemm in ("gemm1", "gemm2")]
            loaded = program._loaded_bytes(precision, config.token_tile, config.pair)
            yield (
                f"| `{config.name}` | {precision} | {128 * (1 + config.pair)} x {config.token_tile} | "
                f"{config.ctas_per_sm} x {config.shared_bytes / 1024:.0f} KB | "
                f"{config.ctas_per_sm} x {allocated} columns, {columns} used | "
                f"{in_flight / 1024:.0f} KB | {issue[0]:.0f} / {issue[1]:.0f} | "
                f"{product_clocks(precision, config, config.token_tile):.0f} | {loaded / B200.costs.fill:.0f} |"
            )


def calls(precision: Precision) -> Iterator[str]:
    """Each model and T, as lines of a table."""
    yield "| model | T | floor, us | bound by | config | expected, us | x floor | GEMM1 / GEMM2 wait for |"
    yield "|---|---|---|---|---|---|---|---|"
    for model, layer in shapes.MODELS.items():
        for tokens in TOKENS:
            made = call_microseconds(precision, layer, tokens)
            yield (
                f"| {model} | {tokens} | {made['floor']:.1f} | {made['bound']} | `{made['config']}` | "
                f"{made['expected']:.1f} | {made['expected'] / made['floor']:.2f} | {made['limits']} |"
            )


TABLES = {"configs": configs, "w4a4": lambda: calls("w4a4"), "w4a16": lambda: calls("w4a16")}


def page(text: str) -> str:
    """The page with its tables made again; each stands between ``<!-- name -->`` and ``<!-- end -->``."""
    for name, lines in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        _, after = rest.split("<!-- end -->", 1)
        text = f"{before}<!-- {name} -->\n" + "\n".join(lines()) + f"\n<!-- end -->{after}"
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        for lines in TABLES.values():
            print("\n".join(lines()), end="\n\n")
