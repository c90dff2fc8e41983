"""``fused_moe`` against the definition, over shapes, routings and options."""

import dataclasses
import itertools
import os

import helpers
from helpers import ACTIVATIONS, make_case, make_exact_case
from hypothesis import assume, given, settings, strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import statement

import jax_moe
from jax_moe import reference

PRECISIONS, COMBINES, WEIGHT_ONS = ("w4a16", "w4a4", "w4a4_dynamic"), ("atomic", "ordered"), ("output", "input")
OUT_DTYPES = (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("weight_on", WEIGHT_ONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_option(precision, weight_on, activation):
    for bias, combine in itertools.product((False, True), COMBINES):
        case = make_case(1, activation=activation, bias=bias, precision=precision, weight_on=weight_on)
        for out_dtype in OUT_DTYPES if bias else OUT_DTYPES[1:]:
            case.check(combine=combine, out_dtype=out_dtype)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(0, 40),
    hidden=st.integers(1, 6),
    intermediate=st.integers(1, 6),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 9),
    routing=st.sampled_from(["distinct", "any", "one", "hostile"]),
    offset=st.sampled_from([0, 1, 5]),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    precision=st.sampled_from(PRECISIONS),
    combine=st.sampled_from(COMBINES),
    weight_on=st.sampled_from(WEIGHT_ONS),
    out_dtype=st.sampled_from(OUT_DTYPES),
)
def test_any_shape_and_routing(
    seed, tokens, hidden, intermediate, num_experts, top_k, routing, offset, activation, bias, **options
):
    assume(routing != "distinct" or top_k <= num_experts)
    case = make_case(
        seed, tokens=tokens, hidden=16 * hidden, intermediate=16 * intermediate, num_experts=num_experts, top_k=top_k,
        routing=routing, expert_offset=offset, all_experts=num_experts + 2 * offset, activation=activation, bias=bias,
        **options,
    )  # fmt: skip
    case.check()


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "hidden": 16, "intermediate": 16, "num_experts": 1, "top_k": 1},
        {"tokens": 0, "hidden": 32, "intermediate": 16},
        {"tokens": 67, "hidden": 16, "intermediate": 144, "num_experts": 8, "top_k": 8},
        {"tokens": 131, "hidden": 112, "intermediate": 80, "num_experts": 3, "top_k": 2},
        {"tokens": 2, "hidden": 2064, "intermediate": 16},  # longer than a panel of the CPU kernels
        {"tokens": 65, "hidden": 16, "intermediate": 1040, "num_experts": 2, "routing": "one"},
        {"tokens": 3, "num_experts": 64, "top_k": 2},  # most experts without a token
        {"tokens": 9, "top_k": 7, "routing": "any"},  # more slots than experts
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("combine", COMBINES)
def test_awkward_sizes(sizes, precision, combine):
    make_case(2, precision=precision, combine=combine, out_dtype=jnp.float32, **sizes).check()


# --- Routing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("weight_on", WEIGHT_ONS)
def test_an_expert_that_comes_twice_counts_twice(combine, weight_on):
    case = make_case(3, tokens=4, top_k=3, combine=combine, weight_on=weight_on, bias=True, out_dtype=jnp.float32)
    ids = jnp.full((4, 3), 2, jnp.int32).at[1, 1].set(0)
    case = dataclasses.replace(case, routing=dataclasses.replace(case.routing, expert_ids=ids))
    case.check()


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("bad", [-1, 4, 5, 2**31 - 1, -(2**31)])
def test_ids_of_nobody_are_skipped(bad, combine, out_dtype):
    """Alone in a token: exact zeros. Next to others: as if the slot were not there, whatever its weight."""
    case = make_case(4, tokens=4, bias=True, combine=combine, out_dtype=out_dtype)
    ids = case.routing.expert_ids.at[1].set(bad).at[2, 0].set(bad)
    weights = case.routing.weights.at[1].set(jnp.nan).at[2, 0].set(jnp.inf)
    skipped = dataclasses.replace(case, routing=jax_moe.Routing(ids, weights)).run()
    assert not skipped[1].view(np.uint16).any()  # +0, in every bit
    zero_weight = dataclasses.replace(case, routing=jax_moe.Routing(ids, weights.at[1].set(0).at[2, 0].set(0)))
    helpers.assert_bit_equal(skipped, zero_weight.run())
    helpers.assert_matches(skipped, zero_weight)


@pytest.mark.parametrize("offset", [0, 3, 2**31 - 4, 2**31 - 1])
def test_offsets_at_the_end_of_int32_do_not_wrap(offset):
    """offset + L goes beyond int32: an id is compared as the integer it is."""
    case = make_case(5, tokens=6, top_k=4, out_dtype=jnp.float32)
    ids = np.asarray(case.routing.expert_ids, np.int64) + offset
    ids = np.where(ids >= 2**31, ids - 2**32, ids)  # those that do not exist wrap to negative ids, of nobody
    case = dataclasses.replace(
        case, routing=dataclasses.replace(case.routing, expert_ids=jnp.asarray(ids.astype(np.int32)))
    )
    case.check(expert_offset=offset)
    helpers.assert_bit_equal(case.run(expert_offset=offset), case.run(expert_offset=jnp.int32(offset)))


def test_shards_of_the_experts_add_up():
    """Expert parallelism by hand: each half skips the other half's ids."""
    case = make_exact_case(num_experts=8)
    whole = case.run(out_dtype=jnp.float32)
    halves = []
    for offset in (0, 4):
        half = jax.tree.map(lambda a, start=offset: a[start : start + 4] if a.ndim else a, case.experts)
        halves.append(dataclasses.replace(case, experts=half).run(out_dtype=jnp.float32, expert_offset=offset))
    assert all(half.any() for half in halves)
    helpers.assert_bit_equal(halves[0] + halves[1], whole)


def test_a_traced_offset_is_not_a_new_program():
    case = make_case(6)
    run = jax.jit(lambda offset: jax_moe.fused_moe(case.x, case.experts, case.routing, expert_offset=offset))
    for offset in (0, 1, 2):
        helpers.assert_bit_equal(run(jnp.int32(offset)), case.run(expert_offset=offset))
    assert run._cache_size() == 1


# --- Exact grids: every right answer has the same bits ------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "relu2"])
@pytest.mark.parametrize("weight_on", WEIGHT_ONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_combines_agree_bit_for_bit(precision, weight_on, gated):
    for seed, out_dtype in itertools.product(range(2), OUT_DTYPES):
        case = make_exact_case(seed, gated=gated, precision=precision, weight_on=weight_on, out_dtype=out_dtype)
        options = {name: value for name, value in case.options.items() if name != "out_dtype"}
        expected, _ = statement.moe(case.x, case.experts, case.routing, **options)
        expected = expected.astype(np.float32).astype(out_dtype)
        helpers.assert_bit_equal(case.run(combine="atomic"), expected)
        helpers.assert_bit_equal(case.run(combine="ordered"), expected)
        if seed == 0 and weight_on == "output" and out_dtype == jnp.float32:
            helpers.assert_bit_equal(case.run(reference.fused_moe), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("combine", COMBINES)
def test_the_same_bits_every_time(combine, precision):
    case = make_case(7, tokens=70, top_k=4, combine=combine, precision=precision)
    first = case.run()
    for _ in range(5):
        helpers.assert_bit_equal(case.run(), first)


@pytest.mark.parametrize("combine", COMBINES)
def test_a_token_does_not_depend_on_the_others(combine):
    """Each row alone, in any company and at any place gives the same bits."""
    case = make_case(8, tokens=9, top_k=3, combine=combine)
    whole = case.run()
    order = np.random.default_rng(0).permutation(9)

    def rows(index):
        routing = jax.tree.map(lambda a: a[index], case.routing)
        return dataclasses.replace(case, x=case.x[index], routing=routing).run()

    helpers.assert_bit_equal(rows(order), whole[order])
    for token in range(9):
        helpers.assert_bit_equal(rows(np.array([token])), whole[token : token + 1])


# --- Weights ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    "xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""),
    reason="XLA's older emitters, which conftest.py takes with jax 0.10, cannot compile float4: `XLA_FLAGS= pytest`",
)
def test_float4_payloads_are_viewed():
    case = make_case(9)

    def as_float4(projection):
        return dataclasses.replace(projection, payload=projection.payload.view(jnp.float4_e2m1fn))

    experts = case.experts
    experts = dataclasses.replace(experts, gate_up=as_float4(experts.gate_up), down=as_float4(experts.down))
    assert experts.gate_up.payload.shape[-1] == 2 * case.experts.gate_up.payload.shape[-1]
    viewed = dataclasses.replace(case, experts=experts)
    helpers.assert_bit_equal(viewed.run(), case.run())
    on_host = jax.tree.map(np.asarray, experts)  # NumPy has a float4 in each byte
    helpers.assert_bit_equal(dataclasses.replace(case, experts=on_host).run(), case.run())
    jitted = jax.jit(jax_moe.fused_moe, static_argnames=("activation", "expert_offset"))
    helpers.assert_bit_equal(viewed.run(jitted), case.run())
    viewed.check(reference.fused_moe)
    scales = [jax_moe.calibrate(e, case.x, case.routing).down.input_scale for e in (experts, case.experts)]
    helpers.assert_bit_equal(*scales)


def test_numpy_arrays_are_arrays():
    case = make_case(10)
    host = jax.tree.map(np.asarray, (case.x, case.experts, case.routing))
    helpers.assert_bit_equal(jax_moe.fused_moe(*host), case.run())


def _with_codes(case, name, change):
    """The case with the bytes of a projection's block scales changed."""
    projection = getattr(case.experts, name)
    codes = np.asarray(projection.block_scale).view(np.uint8).copy()
    change(codes)
    scales = jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn))
    experts = dataclasses.replace(case.experts, **{name: dataclasses.replace(projection, block_scale=scales)})
    return dataclasses.replace(case, experts=experts)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_every_block_scale_is_used_as_it_is(name, precision):
    """All finite e4m3 codes: zero, subnormals, the largest, and negative ones."""
    case = make_case(11, tokens=6, num_experts=2, precision=precision, out_dtype=jnp.float32)
    finite = np.uint8([code for code in range(256) if code & 0x7F != 0x7F])

    def change(codes):
        codes.flat[:] = np.resize(finite, codes.size)

    _with_codes(case, name, change).check()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_zero_block_scales_give_zeros(name, precision):
    case = make_case(12, precision=precision)

    def change(codes):
        codes[:] = 0

    assert not _with_codes(case, name, change).run().any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("combine", COMBINES)
def test_a_nan_stays_in_its_row_and_column(combine, precision):
    """A NaN scale of down spoils one column of its expert's tokens; a NaN token spoils itself; nothing else changes."""
    case = make_case(13, tokens=12, combine=combine, precision=precision)
    clean = case.run()
    uses = np.asarray(case.routing.expert_ids == 1).any(1)
    assert 0 < uses.sum() < 12

    def change(codes):
        codes[1, 7, 0] = 0x7F

    spoilt = _with_codes(case, "down", change).run()
    expected = clean.astype(np.float32)
    expected[uses, 7] = np.nan
    np.testing.assert_array_equal(spoilt.astype(np.float32), expected)

    spoilt = dataclasses.replace(case, x=case.x.at[3, 5].set(jnp.nan)).run().astype(np.float32)
    expected = clean.astype(np.float32)
    expected[3] = np.nan
    np.testing.assert_array_equal(spoilt, expected)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_infinities_stay_in_their_rows(precision, combine):
    case = make_case(14, tokens=8, combine=combine, precision=precision, bias=True)
    clean = case.run().astype(np.float32)
    for value in (np.inf, -np.inf, ml_dtypes.finfo(ml_dtypes.bfloat16).max):
        spoilt = dataclasses.replace(case, x=case.x.at[3].set(value)).run().astype(np.float32)
        rest = np.arange(8) != 3
        np.testing.assert_array_equal(spoilt[rest], clean[rest])
    weights = case.routing.weights.at[2, 1].set(np.inf)
    spoilt = dataclasses.replace(case, routing=dataclasses.replace(case.routing, weights=weights)).run()
    assert not np.isfinite(spoilt[2].astype(np.float32)).any()
    np.testing.assert_array_equal(spoilt[np.arange(8) != 2].astype(np.float32), clean[np.arange(8) != 2])


def _scales_where_only_a_division_is_right(largest: float, count: int) -> list[np.float32]:
    """Input scales s under which largest * (1 / (6 s)) and largest / (6 s) round to different e4m3 block scales."""
    e4m3 = np.arange(8, 0x7E, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    s = np.float32(largest) / (np.float32(6) * (e4m3[1:] + e4m3[:-1]) / 2)
    s = np.concatenate([s, np.nextafter(s, np.float32(0)), np.nextafter(s, np.float32(1))])
    product = (np.float32(largest) * (np.float32(1) / (np.float32(6) * s))).astype(ml_dtypes.float8_e4m3fn)
    return list(s[product.astype(np.float32) != statement.block_scales(largest, s).astype(np.float32)][:count])


def test_activations_are_quantised_at_the_boundaries_as_defined():
    case = make_case(22, precision="w4a4", out_dtype=jnp.float32)
    x = jnp.clip(case.x, -1, 1).at[:, ::16].set(1.375)  # the largest of every block
    scales = _scales_where_only_a_division_is_right(1.375, 5)
    assert len(scales) == 5
    for scale in scales:
        gate_up = dataclasses.replace(case.experts.gate_up, input_scale=jnp.float32(scale))
        dataclasses.replace(case, x=x, experts=dataclasses.replace(case.experts, gate_up=gate_up)).check()


@pytest.mark.parametrize("scale", [0.0, 2.0**-140, 1e-30, 1e30, np.inf, np.nan, -1e-3])
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_adversarial_input_scales_never_crash(name, scale):
    """An input scale is the user's: 0, infinite or negative ones may give any numbers, in the same places each time."""
    case = make_case(15, precision="w4a4", out_dtype=jnp.float32)
    projection = getattr(case.experts, name)
    projection = dataclasses.replace(projection, input_scale=jnp.full_like(projection.input_scale, scale))
    case = dataclasses.replace(case, experts=dataclasses.replace(case.experts, **{name: projection}))
    result = case.run()
    assert result.shape == case.x.shape
    helpers.assert_bit_equal(case.run(), result)


@pytest.mark.parametrize("gate_scale", [2.0**-20, 1.0, 2.0**20])
def test_gate_and_up_keep_their_own_global_scales(gate_scale):
    """Scales far apart, with their product constant: using one for both would be off by 2^20."""
    case = make_case(16, activation=jax_moe.SwiGLU(alpha=0.0), out_dtype=jnp.float32)  # gate / 2 * up: bilinear
    gate_up = case.experts.gate_up
    scaled = gate_up.global_scale * jnp.asarray([gate_scale, 1 / gate_scale], jnp.float32)
    scaled = dataclasses.replace(case.experts, gate_up=dataclasses.replace(gate_up, global_scale=scaled))
    helpers.assert_bit_equal(dataclasses.replace(case, experts=scaled).run(), case.run())
