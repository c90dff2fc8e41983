"""What benchmarks/device_gemm.py builds and runs: the tiles, cases and kernels of each suite."""

import math
import re

from jax_moe import shapes
from jax_moe.kernels import specs
from jax_moe.kernels.common import plan as common_plan
from jax_moe.kernels.sm90 import plan

INF = math.inf


def tile(text):
    """A tile by name: n8m1k2b4c1, with a limit of stages n8m1k2b4c1s5, with narrower widths n48m3k1b2c1w32w40."""
    found = re.fullmatch(r"n(\d+)m(\d+)k(\d+)b(\d+)c(\d+)(?:s(\d+))?((?:w\d+)*)", text)
    if found is None:
        raise SystemExit(f"{text}: not a tile such as n8m1k2b4c1, n8m1k2b4c1s5 or n48m3k1b2c1w32w40")
    *numbers, limit, widths = found.groups()
    token_tile, *others = map(int, numbers)
    widths = (*map(int, widths.split("w")[1:]), token_tile)
    return plan.with_most_stages(widths, *others, *([int(limit)] if limit else []))


CHECK_TILES = [
    "n8m1k2b2c1",
    "n8m1k1b4c2",
    "n16m1k4b4c1",
    "n48m1k1b2c2",
    "n80m2k1b2c1",
    "n128m2k1b1c1w32w64",
    "n24m1k4b4c1",
    "n144m2k1b2c1w128",
    "n32m3k1b2c1w16w24",
]
ACTIVATIONS = [
    ("swiglu", 1.0, 0.0, INF),
    ("swiglu", 1.702, 1.0, 0.75),
    ("geglu", 0.0, 0.0, INF),
    ("relu2", 0.0, 0.0, INF),
    ("situ", 0.0, 4.0, 25.0),
]
CASES = [
    (t, precision, activation, bias, combine, out)
    for i, t in enumerate(CHECK_TILES)
    for precision, activation, bias, combine, out in [
        ("w4a16", ACTIVATIONS[0], False, "ordered", "float32"),
        ("w4a16", ACTIVATIONS[1], True, "atomic", "float32"),
        ("w4a4", ACTIVATIONS[(2, 0)[i % 2]], i % 2 == 0, "atomic", "bfloat16"),
        ("w4a4", ACTIVATIONS[2 + i % 2], i % 2 == 1, "ordered", "bfloat16"),
        ("w4a16", ACTIVATIONS[(3, 4)[i % 2]], False, "ordered", "float32"),
    ]
]
TIMED = {1: ["auto"], 8: ["auto"], 32: ["auto"], 128: ["auto"], 512: ["auto"], 2048: ["auto"], 8192: ["auto"]}
"""T: the tiles to time, "auto" being what plan.py picks."""


MODES = [("w4a16", "atomic"), ("w4a4", "atomic"), ("w4a16", "ordered")]  # only the first for other tiles than the first


def resolve(text, model, T):
    """The tile of "auto" for T tokens of a model."""
    if text != "auto":
        return tile(text)
    shape = shapes.MODELS[model]
    return plan.best_tile(T, shape.top_k, shape.num_experts)


def timed(suite):
    """Model, and tiles by T, of the suite MODEL (all that TIMED has) or MODEL:T:TILE,TILE..."""
    model, *given = suite.split(":")
    return model, {int(given[0]): given[1].split(",")} if given else TIMED


def gemm1(t, precision, activation, bias):
    kind, alpha, beta, limit = activation
    return common_plan.Gemm1Spec(t, precision, kind, kind != "relu2", alpha, beta, limit, bias)


def gemm2(t, precision, bias, combine, out):
    return common_plan.Gemm2Spec(t, precision, combine, out if combine == "atomic" else "float32", bias)


def suite_specs(suite):
    wanted = []
    if suite == "check":
        for t, precision, activation, bias, combine, out in CASES:
            wanted += [gemm1(tile(t), precision, activation, bias), gemm2(tile(t), precision, bias, combine, out)]
    else:
        model, variants_of = timed(suite)
        for T, variants in variants_of.items():
            for number, text in enumerate(variants):
                t = resolve(text, model, T)
                for precision, combine in MODES[: 1 if number else None]:
                    wanted.append(gemm1(t, precision, ACTIVATIONS[0], False))
                    wanted.append(gemm2(t, precision, False, combine, "bfloat16"))
    wanted += [specs.CombineSpec("bfloat16"), specs.CombineSpec("float32")]
    return list(dict.fromkeys(wanted))
