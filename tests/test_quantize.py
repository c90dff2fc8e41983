"""``quantize_experts`` and ``calibrate``: what they compute, and what they refuse."""

import dataclasses

import helpers
from helpers import ACTIVATIONS, make_case
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import statement

import jax_moe

E, H, I = 4, 48, 32  # noqa: E741


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


def test_quantize_experts_traced():
    """Under ``jit`` the same bits, by a program that does not grow with the experts."""
    dense = list(map(jnp.asarray, _dense()))
    run = jax.jit(jax_moe.quantize_experts)
    got, expected = run(*dense), jax_moe.quantize_experts(*dense)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        helpers.assert_bit_equal(a, b)
    more = [jnp.concatenate([matrix] * 5) for matrix in dense]
    assert run.lower(*more).as_text().count("\n") == run.lower(*dense).as_text().count("\n")


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


def test_calibrate_on_zeros_under_jit_gives_usable_scales():
    """Where values are not seen, and nothing can be refused."""
    case = make_case(21)
    zeros = dataclasses.replace(case, x=jnp.zeros_like(case.x))
    experts = jax.jit(jax_moe.calibrate)(helpers.without_input_scales(case.experts), zeros.x, case.routing)
    assert not dataclasses.replace(zeros, experts=experts).run(precision="w4a4").any()


# --- What is refused ----------------------------------------------------------------------------------------------

DENSE = {
    "gate": np.zeros((E, I, H), np.float32),
    "up": np.zeros((E, I, H), np.float32),
    "down": np.zeros((E, H, I), np.float32),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"up": None}, TypeError, "up: got NoneType, needs an array"),
        ({"up": [[[0.0]]]}, TypeError, "up: got list, needs an array"),
        ({"up": np.zeros((I, H), np.float32)}, ValueError, r"up: got shape \(32, 48\), needs \[E, I, H\]"),
        ({"up": np.zeros((E, I, H), np.int32)}, TypeError, "up: got dtype int32, needs floats"),
        ({"gate": np.zeros((E, H, I), np.float32)}, ValueError, r"gate: got shape \(4, 48, 32\), needs \[4, 32, 48\]"),
        ({"gate": np.zeros((E, I, H), np.int8)}, TypeError, "gate: got dtype int8, needs floats"),
        ({"down": np.zeros((E, I, H), np.float32)}, ValueError, r"down: got shape \(4, 32, 48\), needs \[4, 48, 32\]"),
        ({"down": None}, TypeError, "down: got NoneType, needs an array"),
        ({"down": np.zeros((E, H, I), bool)}, TypeError, "down: got dtype bool, needs floats"),
        ({"gate_bias": np.zeros((E, I))}, ValueError, "gate_bias, up_bias: got only one"),
        ({"up_bias": np.zeros((E, I))}, ValueError, "gate_bias, up_bias: got only one"),
        ({"gate": None, "gate_bias": np.zeros((E, I))}, ValueError, "gate_bias: got an array, but there is no gate"),
        ({"up_bias": np.zeros((E, H))}, ValueError, r"up_bias: got shape \(4, 48\), needs \[4, 32\]"),
        ({"down_bias": np.zeros((E, I))}, ValueError, r"down_bias: got shape \(4, 32\), needs \[4, 48\]"),
    ],
    ids=str,
)
def test_quantize_experts_refuses(change, error, message):
    with pytest.raises(error, match=message):
        jax_moe.quantize_experts(**DENSE | change)


@pytest.mark.parametrize(
    ("num_experts", "intermediate", "hidden", "message"),
    [
        (0, 32, 48, "E = 0"),
        (4, 24, 48, "I = 24.*16"),
        (4, 32, 40, "H = 40.*16"),
        (4, 0, 48, "I = 0"),
        (4, 32, 0, "H = 0"),
    ],
)
def test_quantize_experts_refuses_sizes(num_experts, intermediate, hidden, message):
    up, down = np.zeros((num_experts, intermediate, hidden)), np.zeros((num_experts, hidden, intermediate))
    with pytest.raises(ValueError, match=message):
        jax_moe.quantize_experts(None, up, down)


def _calibrate(case, **changes):
    case = dataclasses.replace(case, **changes)
    return jax_moe.calibrate(case.experts, case.x, case.routing)


def test_calibrate_refuses_batches_that_would_spoil_the_scales():
    case = make_case()
    case = dataclasses.replace(case, experts=helpers.without_input_scales(case.experts))
    nan = case.x.at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="x: got NaN or infinity"):
        _calibrate(case, x=nan)
    with pytest.raises(ValueError, match="x: got only zeros"):
        _calibrate(case, x=jnp.zeros_like(case.x))
    elsewhere = dataclasses.replace(case.routing, expert_ids=case.routing.expert_ids + 4)
    with pytest.raises(ValueError, match="routing: no token reaches an expert"):
        _calibrate(case, routing=elsewhere)
    huge = dataclasses.replace(case.experts.gate_up, global_scale=case.experts.gate_up.global_scale.at[1].set(3e38))
    with pytest.raises(ValueError, match="x: expert 1 makes NaN or infinity"):
        _calibrate(case, experts=dataclasses.replace(case.experts, gate_up=huge))


def test_a_batch_that_says_nothing_changes_no_scale():
    case = make_case()
    case = dataclasses.replace(case, experts=_calibrate(case))
    elsewhere = dataclasses.replace(case.routing, expert_ids=case.routing.expert_ids + 4)
    for changes in ({"x": jnp.zeros_like(case.x)}, {"routing": elsewhere}):
        got = _calibrate(case, **changes)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(case.experts), strict=True):
            helpers.assert_bit_equal(a, b)
    with pytest.raises(ValueError, match="x: got NaN or infinity"):
        _calibrate(case, x=case.x.at[0, 0].set(jnp.nan))


def test_dense_weights_spread_over_devices_are_refused():
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    gate, up, down = _dense(num_experts=2)
    spread = jax.device_put(down, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert")))
    with pytest.raises(ValueError, match="down: got an array spread over 2 devices, needs it in one place"):
        jax_moe.quantize_experts(gate, up, spread)
    specs = jax.sharding.PartitionSpec("expert")
    run = jax.shard_map(jax_moe.quantize_experts, mesh=mesh, in_specs=specs, out_specs=specs)
    expected = jax_moe.quantize_experts(gate, up, down)
    for a, b in zip(jax.tree.leaves(run(gate, up, down)), jax.tree.leaves(expected), strict=True):
        helpers.assert_bit_equal(a, b)
