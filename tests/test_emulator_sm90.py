"""Calls on the emulator with today's sm_90a kernels: where all sums are exact, the bits of the CPU handler."""

import dataclasses
import importlib.util
import shutil

import emulated_call
import emulator
from emulator import recorded_calls
from helpers import ACTIVATIONS, assert_bit_equal, assert_matches, make_case, make_exact_case
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import check, nvfp4
from jax_moe.kernels.sm90 import program

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here"),
]


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize(
    ("precision", "combine"), [("w4a16", "atomic"), ("w4a4", "ordered"), ("w4a4_dynamic", "atomic")]
)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(tokens=1, num_experts=3, top_k=2, hidden=128, intermediate=64),
        dict(tokens=20, num_experts=8, top_k=4, hidden=320, intermediate=192),
        dict(tokens=7, num_experts=5, top_k=3, hidden=144, intermediate=96, gated=False),
    ],
    ids=lambda sizes: str(sizes["tokens"]),
)
def test_exact_calls_have_the_bits_of_the_cpu(sizes, precision, combine, order):
    case = make_exact_case(sizes["tokens"], precision=precision, combine=combine, out_dtype=jnp.float32, **sizes)
    expected = case.run()
    for seed in range(2):
        call = emulated_call.prepare(case, "sm_90a")
        assert_bit_equal(call.run(order=order, seed=seed), expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(bias=True, combine="ordered", top_k=3, num_experts=5, hidden=144, intermediate=96),
        dict(activation=ACTIVATIONS[4], tokens=40, num_experts=3, hidden=64, intermediate=80),  # without a gate
        dict(weight_on="input", routing="hostile", num_experts=4),
    ],
    ids=str,
)
def test_rows_with_scales_of_their_own_match_the_definition(options):
    """Every row has another scale; one is of zeros."""
    case = make_case(8, precision="w4a4_dynamic", out_dtype=jnp.float32, **{"tokens": 13} | options)
    sizes = 2.0 ** jnp.arange(case.x.shape[0])[:, None] % 7 - 3
    case = dataclasses.replace(case, x=(case.x * sizes.astype(jnp.bfloat16)).at[2].set(0))
    for multiprocessors in (1, 3):  # where there is one, a CTA has several units
        call = emulated_call.prepare(case, "sm_90a", multiprocessors=multiprocessors)
        assert_matches(call.run(order="random", seed=multiprocessors), case)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_nan_and_no_other_row_is(value):
    case = make_case(9, tokens=9, bias=True, precision="w4a4_dynamic", combine="ordered", out_dtype=jnp.float32)
    usual = emulated_call.prepare(case, "sm_90a").run()
    got = emulated_call.prepare(dataclasses.replace(case, x=case.x.at[4, 20].set(value)), "sm_90a").run()
    assert np.isnan(got[4]).all()
    assert_bit_equal(np.delete(got, 4, 0), np.delete(usual, 4, 0))


def test_x_that_is_rounded_already_has_the_bits_of_the_pass_over_x(monkeypatch):
    """On random values too: the products are the same, and so is the order of their sums."""
    case = make_case(4, tokens=13, num_experts=5, top_k=3, hidden=144, intermediate=96, bias=True, precision="w4a4",
                     combine="ordered", out_dtype=jnp.float32)  # fmt: skip
    call = emulated_call.prepare(case, "sm_90a")
    expected = call.run()
    assert "x_rows" in [launch.name for launch in call.program.launches]
    checked = check.check
    monkeypatch.setattr(
        check, "check", lambda *args, **more: dataclasses.replace(checked(*args, **more), x_form="rounded")
    )
    x = nvfp4.quantize_dequantize(case.x, case.experts.gate_up.input_scale)
    call = emulated_call.prepare(dataclasses.replace(case, x=x), "sm_90a")
    assert "x_rows" not in [launch.name for launch in call.program.launches]
    assert_bit_equal(call.run(), expected)


def test_x_in_parcels_has_the_bits_of_the_pass_over_x():
    """On random values too: the products are the same, and so is the order of their sums."""
    case = make_case(5, tokens=13, num_experts=5, top_k=3, hidden=144, intermediate=96, bias=True, precision="w4a4",
                     combine="ordered", out_dtype=jnp.float32)  # fmt: skip
    expected = emulated_call.prepare(case, "sm_90a").run()
    assert_bit_equal(emulated_call.prepare(case, "sm_90a", travels=True).run(), expected)


@pytest.mark.parametrize("name", recorded_calls.CALLS)
def test_a_hopper_gpu_gave_the_same(name):
    """The outputs that ``record_sm90.py`` recorded on a GPU: the same bits where all sums are exact."""
    if not recorded_calls.FILE.exists():
        pytest.skip("nothing recorded yet: tests/emulator/record_sm90.py")
    recorded = np.load(recorded_calls.FILE)[name]
    case = recorded_calls.CALLS[name]()
    emulated = emulated_call.prepare(case, "sm_90a").run(order="random", seed=1)
    if name.startswith("exact"):
        assert_bit_equal(emulated, recorded)
        return
    # A GPU rounds inside of its products, and approximate instructions may differ in their last bit: here and there the
    # intermediate is then rounded to its other neighbour, which shows in one output in some hundred thousand sums.
    error = np.linalg.norm(emulated - recorded) / np.linalg.norm(recorded)
    assert error < {"w4a16": 1e-3, "w4a4": 1e-2}[case.options["precision"]]


@pytest.mark.parametrize(
    "config", [config for config in program.CONFIGS if config.token_tile > 96], ids=lambda config: config.name
)
@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
def test_tiles_of_many_rows_have_the_bits_of_the_cpu(monkeypatch, config, precision):
    """Their products come a k16-step at a time. The experts have a tile and two balanced ones, a stage has a rest."""
    monkeypatch.setattr(program, "best_config", lambda *_, **__: config)
    case = make_exact_case(7, tokens=260, num_experts=3, top_k=1, hidden=208, intermediate=64, precision=precision,
                           combine="ordered", out_dtype=jnp.float32)  # fmt: skip
    experts = jnp.where(jnp.arange(260) < 155, 0, 2)[:, None]
    case = dataclasses.replace(case, routing=dataclasses.replace(case.routing, expert_ids=experts.astype(jnp.int32)))
    call = emulated_call.prepare(case, "sm_90a")
    assert_bit_equal(call.run(order="random", seed=2), case.run())
