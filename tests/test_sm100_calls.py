"""Calls on sm_100f, run on the emulator: the CPU handler's bits where all sums are exact, else within the bound.

No such GPU was ever at hand. The emulator (tests/emulator) runs the kernels' own PTX, whole calls with poisoned
workspaces, and reports races; the tests vary its seed and the order in which asynchronous work takes effect.
"""

import importlib.util
import itertools
import shutil

import emulated_call
import emulator
from helpers import ACTIVATIONS, assert_bit_equal, assert_matches, make_case, make_exact_case
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe.kernels.sm100 import program

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here"),
]

PRECISIONS = tuple(program.CONFIGS)
CONFIGS = [
    pytest.param(precision, config, id=f"{precision}-{config.name}")
    for precision, configs in program.CONFIGS.items()
    for config in configs
]
ORDERS = itertools.cycle(emulator.ORDERS)


def run(case, *, orders=("random", "starved"), seed=0, multiprocessors=2, config=None):
    """The output of a call in each order, which chooses other bits only where inexact sums are added atomically."""
    calls = [emulated_call.prepare(case, "sm_100f", multiprocessors=multiprocessors, config=config) for _ in orders]
    return [call.run(order=order, seed=seed + i) for i, (call, order) in enumerate(zip(calls, orders, strict=True))]


@pytest.mark.parametrize(("precision", "config"), CONFIGS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_config_on_an_exact_grid(precision, config, gated):
    """Tiles that are full, ragged and of one row; K in whole and in partial blocks; more units than CTAs."""
    tile = config.token_tile
    case = make_exact_case(
        tile, tokens=tile + 9, hidden=336, intermediate=176, num_experts=3, top_k=2, gated=gated, precision=precision,
        combine="atomic" if gated else "ordered", out_dtype=jnp.float32,
    )  # fmt: skip
    expected = case.run()
    for actual in run(case, orders=emulator.ORDERS if gated else ("random",), seed=tile, config=config):
        assert_bit_equal(actual, expected)


@pytest.mark.parametrize(("precision", "config"), CONFIGS)
def test_every_width_of_a_tile(precision, config):
    """An expert of every number of rows around a multiple of 8, the others empty."""
    for tokens in sorted({1, 7, 8, 9, 16, 17, 31, 33, config.token_tile, config.token_tile + 1}):
        case = make_exact_case(
            tokens, tokens=tokens, hidden=64, intermediate=64, num_experts=2, top_k=1, precision=precision,
            out_dtype=jnp.float32,
        )  # fmt: skip
        skewed = jax_moe.Routing(jnp.ones_like(case.routing.expert_ids), case.routing.weights)
        case = type(case)(case.x, case.experts, skewed, case.options)
        (actual,) = run(case, orders=(next(ORDERS),), seed=tokens, config=config)
        assert_bit_equal(actual, case.run())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: repr(a)[:40])
def test_activations_and_biases(precision, activation):
    """Any two of activation, precision and bias in each combination; a kernel for each three takes long to compile."""
    bias = (ACTIVATIONS.index(activation) + PRECISIONS.index(precision)) % 2 == 1
    combine, out_dtype = ("ordered", jnp.float32) if bias else ("atomic", jnp.bfloat16)
    case = make_case(
        3, tokens=11, hidden=272, intermediate=144, num_experts=4, top_k=3, activation=activation, bias=bias,
        precision=precision, combine=combine, out_dtype=out_dtype,
    )  # fmt: skip
    for actual in run(case):
        assert_matches(actual, case)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weight_on_the_input(precision):
    case = make_case(4, tokens=9, hidden=96, intermediate=80, top_k=2, precision=precision, weight_on="input")
    for actual in run(case):
        assert_matches(actual, case)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("routing", ["any", "one", "hostile"])
def test_routings(precision, routing):
    case = make_case(
        5, tokens=40, hidden=64, intermediate=96, num_experts=5, top_k=4, routing=routing, expert_offset=3,
        all_experts=12, precision=precision, combine="ordered",
    )  # fmt: skip
    first, second = run(case, multiprocessors=3)
    assert_bit_equal(first, second)
    assert_matches(first, case)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_experts_and_slots(precision):
    case = make_case(
        6, tokens=3, hidden=32, intermediate=16, num_experts=512, top_k=16, precision=precision, combine="ordered"
    )
    for actual in run(case, orders=("random",)):
        assert_matches(actual, case)


@pytest.mark.parametrize(("hidden", "intermediate"), [(16, 16), (80, 48), (272, 272), (528, 784)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_sizes_that_are_no_whole_blocks(precision, hidden, intermediate):
    for gated in (True, False):
        case = make_exact_case(
            hidden, tokens=6, hidden=hidden, intermediate=intermediate, num_experts=3, top_k=2, gated=gated,
            precision=precision, out_dtype=jnp.float32,
        )  # fmt: skip
        for actual in run(case, orders=("starved",)):
            assert_bit_equal(actual, case.run())


def test_a_nan_scale_reaches_the_tokens_of_its_expert_only():
    """w4a4 multiplies e4m3's NaN itself; w4a16 has it in the global scale."""
    for precision in PRECISIONS:
        case = make_case(7, tokens=8, hidden=64, intermediate=32, num_experts=4, top_k=1, precision=precision)
        scale = case.experts.down.block_scale.at[2, 5, 1].set(jnp.nan)
        down = type(case.experts.down)(**{**vars(case.experts.down), "block_scale": scale})
        experts = jax_moe.Experts(case.experts.gate_up, down)
        (actual,) = run(type(case)(case.x, experts, case.routing, case.options), orders=("random",))
        hit = np.asarray(case.routing.expert_ids[:, 0] == 2)
        assert hit.any()
        assert np.isnan(actual[hit].astype(np.float32)).any(1).all()
        assert np.isfinite(actual[~hit].astype(np.float32)).all()
