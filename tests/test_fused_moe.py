"""``fused_moe`` against the definition, over shapes, routings and options."""

import dataclasses
import itertools

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

PRECISIONS, COMBINES, WEIGHT_ONS = ("w4a16", "w4a4"), ("atomic", "ordered"), ("output", "input")
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


def test_float4_payloads_are_viewed():
    case = make_case(9)

    def as_float4(projection):
        return dataclasses.replace(projection, payload=projection.payload.view(jnp.float4_e2m1fn))

    experts = case.experts
    experts = dataclasses.replace(experts, gate_up=as_float4(experts.gate_up), down=as_float4(experts.down))
    assert experts.gate_up.payload.shape[-1] == 2 * case.experts.gate_up.payload.shape[-1]
    viewed = dataclasses.replace(case, experts=experts)
    helpers.assert_bit_equal(viewed.run(), case.run())
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


# --- quantize_experts and calibrate -------------------------------------------------------------------------------


def _dense(seed=0, num_experts=3, intermediate=32, hidden=48):
    rng = np.random.default_rng(seed)
    spread = 10 ** rng.uniform(-2, 1, (3, num_experts, 1, 1))
    gate, up = (rng.normal(size=(num_experts, intermediate, hidden)) * s for s in spread[:2])
    down = rng.normal(size=(num_experts, hidden, intermediate)) * spread[2]
    return [a.astype(np.float32) for a in (gate, up, down)]


def _assert_quantised(projection, index, matrix):
    scale = np.float32(np.abs(matrix).max() / np.float32(2688)) if matrix.any() else np.float32(1)
    assert projection.global_scale[index] == scale
    codes, block_scales = statement.quantize(matrix, scale)
    np.testing.assert_array_equal(statement.unpack(projection.payload[index]), codes)
    helpers.assert_bit_equal(projection.block_scale[index], block_scales)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, lambda a: np.asarray(a, ml_dtypes.bfloat16)])
def test_quantize_experts_as_defined(convert):
    dense = _dense()
    dense[0][1] = 0  # an expert of zeros
    dense = [convert(a) for a in dense]
    experts = jax_moe.quantize_experts(*dense)
    gate, up, down = (np.asarray(a, np.float32) for a in dense)
    for expert in range(3):
        _assert_quantised(experts.gate_up, (expert, 0), gate[expert])
        _assert_quantised(experts.gate_up, (expert, 1), up[expert])
        _assert_quantised(experts.down, expert, down[expert])
    assert experts.gate_up.input_scale is experts.down.input_scale is experts.gate_up.bias is experts.down.bias is None


def test_quantize_experts_without_a_gate_and_with_biases():
    gate, up, down = _dense()
    rng = np.random.default_rng(1)
    gate_bias, up_bias, down_bias = rng.normal(size=(3, 32)), rng.normal(size=(3, 32)), rng.normal(size=(3, 48))
    single = jax_moe.quantize_experts(None, up, down, up_bias=up_bias)
    assert single.gate_up.payload.shape == (3, 1, 32, 24)
    np.testing.assert_array_equal(single.gate_up.bias, up_bias[:, None].astype(np.float32))
    double = jax_moe.quantize_experts(gate, up, down, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias)
    np.testing.assert_array_equal(double.gate_up.bias, np.stack([gate_bias, up_bias], 1).astype(np.float32))
    np.testing.assert_array_equal(double.down.bias, down_bias.astype(np.float32))
    np.testing.assert_array_equal(single.gate_up.payload[:, 0], double.gate_up.payload[:, 1])


@pytest.mark.parametrize("amax", [1e-36, 2.0**-149, 1e37])
def test_quantize_experts_survives_the_ends_of_float32(amax):
    """A matrix too small for a scale becomes zeros; neither end gives a NaN, though blocks of zeros are there."""
    dense = [np.where(np.arange(a.shape[-1]) < 16, np.float32(amax), np.float32(0)) + 0 * a for a in _dense()]
    experts = jax_moe.quantize_experts(*dense)
    for projection, matrix in ((experts.gate_up, dense[0]), (experts.down, dense[2])):
        values = statement.dequantize(statement.unpack(projection.payload), projection.block_scale)
        values = values.astype(np.float64) * np.asarray(projection.global_scale, np.float64)[..., None, None]
        matrix = matrix if projection is experts.down else np.stack([matrix, matrix], axis=1)
        np.testing.assert_allclose(values, matrix, rtol=1e-5, atol=1e-35)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_weight_is_not_hidden_by_quantising(value):
    gate, up, down = _dense()
    up[1, 2, 3] = value
    experts = jax_moe.quantize_experts(gate, up, down)
    values = statement.dequantize(statement.unpack(experts.gate_up.payload), experts.gate_up.block_scale)
    with np.errstate(invalid="ignore"):
        values = values * np.asarray(experts.gate_up.global_scale)[..., None, None]
    assert np.isnan(values[1, 1, 2, 3])
    assert np.isfinite(values[0]).all()


def test_quantised_experts_compute_what_the_dense_ones_do():
    """End to end, against dense float64: the error is that of NVFP4, which is a tenth, and not a misplaced scale's."""
    gate, up, down = (a / np.abs(a).max() for a in _dense())
    case = make_case(17, tokens=16, num_experts=3)
    y = dataclasses.replace(case, experts=jax_moe.quantize_experts(gate, up, down)).run(out_dtype=jnp.float32)
    x = np.asarray(case.x, np.float64)
    expected = np.zeros(x.shape)
    for token, slot in np.ndindex(*case.routing.expert_ids.shape):
        e, w = int(case.routing.expert_ids[token, slot]), float(case.routing.weights[token, slot])
        h = statement.activate(jax_moe.SwiGLU(), gate[e] @ x[token], up[e] @ x[token])
        expected[token] += w * (down[e] @ h)
    assert np.linalg.norm(y - expected) < 0.25 * np.linalg.norm(expected)
    np.testing.assert_allclose(np.vdot(y, expected) / np.vdot(expected, expected), 1, atol=0.1)


def test_quantize_experts_holds_one_expert_at_a_time():
    """384 MiB of dense weights, made as they are asked for: the process grows by the result and a few experts.

    Not by a second copy of the result (54 MiB), and not by inputs of calls that JAX has queued. They come from no file,
    whose pages would count as the process's while the system has nothing better to do with the memory.
    """
    program = """
import resource
import jax, numpy as np, jax_moe
class Dense:
    dtype = np.dtype(np.float32)
    def __init__(self, *shape):
        self.shape = shape
    def __getitem__(self, expert):
        return np.full(self.shape[1:], 0.5 + expert, self.dtype)
def quantize(experts):
    wide, tall = (experts, 2048, 1024), (experts, 1024, 2048)
    return jax_moe.quantize_experts(Dense(*wide), Dense(*wide), Dense(*tall), progress=False)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
quantize(2)  # compiles
before = peak()
experts = quantize(16)
print(sum(leaf.nbytes for leaf in jax.tree.leaves(experts)) >> 20, peak() - before)
"""
    result, growth = map(int, helpers.run_python(program).split())
    assert result == 54
    assert growth < result + 64, growth


@pytest.mark.parametrize(
    ("activation", "weight_on"), [*((a, "output") for a in ACTIVATIONS), (jax_moe.SwiGLU(), "input")], ids=str
)
def test_calibrate_covers_what_w4a4_reads(activation, weight_on):
    """The scales are amax / 2688 of x and of each expert's intermediate, so that nothing saturates."""
    case = make_case(18, tokens=24, activation=activation, bias=True)
    bare = helpers.without_input_scales(case.experts)
    experts = jax_moe.calibrate(bare, case.x, case.routing, activation=activation, weight_on=weight_on)
    x, ids = np.asarray(case.x, np.float32), np.asarray(case.routing.expert_ids)
    weights = np.asarray(case.routing.weights)
    rows = statement.bfloat16(x[:, None] * weights[..., None]) if weight_on == "input" else x
    assert experts.gate_up.input_scale == np.abs(rows).max() / np.float32(2688)
    for expert in range(4):
        token, slot = np.nonzero(ids == expert)
        chosen = rows[token, slot] if weight_on == "input" else rows[token]
        gate_up = jax.tree.map(lambda a, e=expert: a[e] if a.ndim else a, bare.gate_up)
        matrices = statement.dequantize(statement.unpack(gate_up.payload), gate_up.block_scale)
        pre = np.einsum("th,pih->pti", chosen, matrices, dtype=np.float64)
        pre = pre * np.asarray(gate_up.global_scale)[:, None, None] + np.asarray(gate_up.bias)[:, None]
        amax = np.abs(statement.activate(activation, *pre)).max()
        np.testing.assert_allclose(experts.down.input_scale[expert], amax / 2688, rtol=1e-5)
    close = dataclasses.replace(case, experts=experts).with_options(weight_on=weight_on, out_dtype=jnp.float32)
    wide, narrow = close.run(precision="w4a16"), close.run(precision="w4a4")
    assert 0 < np.linalg.norm(narrow - wide) < 0.2 * np.linalg.norm(wide)


def test_calibrate_raises_scales_and_never_lowers_them():
    case = make_case(19, tokens=12)
    bare = helpers.without_input_scales(case.experts)
    batches = [jax.tree.map(lambda a, i=i: a[4 * i : 4 * i + 4], (case.x, case.routing)) for i in range(3)]
    alone = [jax_moe.calibrate(bare, *batch) for batch in batches]
    experts, x_scale, h_scale = bare, 0.0, alone[0].down.input_scale  # the first also guesses those it does not reach
    for batch, single in zip(batches, alone, strict=True):
        experts = jax_moe.calibrate(experts, *batch)
        x_scale = np.maximum(x_scale, single.gate_up.input_scale)
        reached = np.isin(np.arange(4), batch[1].expert_ids)
        h_scale = np.where(reached, np.maximum(h_scale, single.down.input_scale), h_scale)
        np.testing.assert_array_equal(experts.gate_up.input_scale, x_scale)
        np.testing.assert_array_equal(experts.down.input_scale, h_scale)
    helpers.assert_bit_equal(jax_moe.calibrate(experts, *batches[0]).down.input_scale, experts.down.input_scale)


def test_an_expert_that_no_token_reached_does_not_spoil_calibration():
    """Its scale is a guess until a batch reaches it; then what the batch says must hold for those that it reached."""
    case = make_case(20, tokens=6)
    routing = jax_moe.Routing(jnp.zeros((6, 1), jnp.int32), jnp.ones((6, 1), jnp.float32))
    bare = helpers.without_input_scales(case.experts)
    first = jax_moe.calibrate(bare, case.x, routing)
    scales = np.asarray(first.down.input_scale)
    assert (scales == scales[0]).all()
    again = jax_moe.calibrate(first, case.x, jax_moe.Routing(routing.expert_ids + 1, routing.weights))
    expected = jax_moe.calibrate(bare, case.x, jax_moe.Routing(routing.expert_ids + 1, routing.weights))
    np.testing.assert_array_equal(again.down.input_scale[1], np.maximum(expected.down.input_scale[1], scales[1]))
    assert np.isfinite(np.asarray(again.down.input_scale)).all()
    assert again.down.input_scale[0] == scales[0]


def test_calibrate_on_zeros_gives_usable_scales():
    case = make_case(21)
    zeros = dataclasses.replace(case, x=jnp.zeros_like(case.x))
    experts = jax_moe.calibrate(helpers.without_input_scales(case.experts), zeros.x, case.routing)
    assert not dataclasses.replace(zeros, experts=experts).run(precision="w4a4").any()
    # A batch of nothing but padding says nothing: scales that are there stay.
    again = jax_moe.calibrate(case.experts, zeros.x, case.routing)
    helpers.assert_bit_equal(again.gate_up.input_scale, case.experts.gate_up.input_scale)
    helpers.assert_bit_equal(again.down.input_scale, case.experts.down.input_scale)
