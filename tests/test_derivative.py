"""The derivative with respect to x and the routing weights, compared with one worked out in NumPy and float64."""

import dataclasses
import itertools

import helpers
from helpers import ACTIVATIONS, make_case
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import statement

import jax_moe
from jax_moe import reference

# --- The definition -----------------------------------------------------------------------------------------------


def slopes(activation, *inputs):
    """The derivatives of an activation with respect to its inputs, by its published formula; 0 where it clamps."""
    a, sigmoid = activation, statement.sigmoid
    match a.kind:
        case "swiglu":
            gate, up = inputs
            gate_slope, up_slope = np.ones_like(gate), np.ones_like(up)
            if a.limit is not None:
                gate_slope, up_slope = gate < a.limit, np.abs(up) < a.limit
                gate, up = np.minimum(gate, a.limit), np.clip(up, -a.limit, a.limit)
            s = sigmoid(a.alpha * gate)
            return (up + a.beta) * s * (1 + a.alpha * gate * (1 - s)) * gate_slope, gate * s * up_slope
        case "geglu":
            gate, up = inputs
            c = np.sqrt(2 / np.pi)
            t = np.tanh(c * (gate + 0.044715 * gate**3))
            slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t**2) * c * (1 + 3 * 0.044715 * gate**2)
            return slope * up, 0.5 * gate * (1 + t)
        case "relu2":
            return (2 * np.maximum(inputs[0], 0),)
        case "situ":
            gate, up = inputs
            t, s = np.tanh(gate / a.beta), sigmoid(gate)
            f, f_slope = a.beta * t * s, (1 - t**2) * s + a.beta * t * s * (1 - s)
            if a.linear_beta is None:
                return f_slope * up, f
            u = np.tanh(up / a.linear_beta)
            return f_slope * a.linear_beta * u, f * (1 - u**2)
    raise AssertionError(a)


def gradients(case, dy):
    """float64 ``dx`` and ``dweights`` of ``sum(dy * fused_moe(...))``: each rounding's derivative is 1."""
    options = {"precision": "w4a16", "weight_on": "output"} | case.options
    precision, weight_on = options["precision"], options["weight_on"]
    x, dy = np.asarray(case.x, np.float64), np.asarray(dy, np.float64)
    weights = np.asarray(case.routing.weights, np.float64)
    ids = np.asarray(case.routing.expert_ids, np.int64) - options["expert_offset"]
    dx, dweights = np.zeros_like(x), np.zeros_like(weights)
    gate_up, down = case.experts.gate_up, case.experts.down

    def matrix(projection, *index):
        payload, scale, global_scale = (
            np.asarray(a)[index] for a in (projection.payload, projection.block_scale, projection.global_scale)
        )
        return statement.dequantize(statement.unpack(payload), scale).astype(np.float64) * np.float64(global_scale)

    def rounded(v, input_scale):
        if precision == "w4a16":
            return statement.bfloat16(v).astype(np.float64)
        if precision == "w4a4_dynamic":
            v = statement.bfloat16(v)
            input_scale = statement.row_scales(v)
        codes, scales = statement.quantize(np.asarray(v, np.float32)[None], np.float32(input_scale))
        return statement.dequantize(codes, scales)[0].astype(np.float64) * np.float64(input_scale)

    for token, slot in np.argwhere((ids >= 0) & (ids < down.global_scale.shape[0])):
        expert, weight = ids[token, slot], weights[token, slot]
        a = statement.bfloat16(weight * x[token]).astype(np.float64) if weight_on == "input" else x[token]
        a = rounded(a, gate_up.input_scale)
        parts = [matrix(gate_up, expert, part) for part in range(gate_up.global_scale.shape[1])]
        biases = np.zeros(len(parts)) if gate_up.bias is None else np.asarray(gate_up.bias, np.float64)[expert]
        inputs = [part @ a + bias for part, bias in zip(parts, biases, strict=True)]
        h = rounded(statement.activate(options["activation"], *inputs), np.asarray(down.input_scale)[expert])
        y = matrix(down, expert) @ h + (0.0 if down.bias is None else np.asarray(down.bias, np.float64)[expert])
        outer = weight if weight_on == "output" else 1.0
        dh = outer * (matrix(down, expert).T @ dy[token])
        slope = slopes(options["activation"], *inputs)
        da = sum(part.T @ (s * dh) for part, s in zip(parts, slope, strict=True))
        if weight_on == "output":
            dx[token] += da
            dweights[token, slot] = dy[token] @ y
        else:
            dx[token] += weight * da
            dweights[token, slot] = x[token] @ da
    return dx, dweights


def loss_of(case, dy, op=jax_moe.fused_moe):
    """``sum(dy * op(...))`` as a function of x and the weights; it is linear, so ``dy`` is all that reaches the op."""

    def loss(x, weights):
        routing = dataclasses.replace(case.routing, weights=weights)
        return (op(x, case.experts, routing, **case.options).astype(jnp.float32) * dy).sum()

    return loss


def cotangent(case, seed=0):
    """Values that bfloat16 holds: a bfloat16 output would round others."""
    values = np.random.default_rng(seed).normal(size=case.x.shape)
    return statement.bfloat16(values)


def assert_close(actual, expected):
    """Float32 sums of some hundred terms, by the norm of a row; a bfloat16 result is rounded once more."""
    roundoff = statement.U16 if actual.dtype == jnp.bfloat16 else 0.0
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    sizes = np.sqrt((expected**2).sum(-1, keepdims=True))
    excess = np.abs(actual - expected) - roundoff * np.abs(expected) - 1e-5 * sizes
    assert (excess <= 0).all(), f"wrong by {excess.max():.3g} of {sizes[excess.argmax() // excess.shape[1], 0]:.3g}"


def check(case, op=jax_moe.fused_moe, seed=0):
    dy = cotangent(case, seed)
    dx, dweights = jax.grad(loss_of(case, dy, op), (0, 1))(case.x, case.routing.weights)
    assert (dx.dtype, dweights.dtype) == (jnp.bfloat16, jnp.float32)
    expected_x, expected_weights = gradients(case, dy)
    assert_close(dx, expected_x)
    assert_close(dweights, expected_weights)


# --- The definition is right --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_slopes_are_differences(activation):
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=200) * 3 for _ in range(2 if activation.gated else 1)]
    for i, slope in enumerate(slopes(activation, *inputs)):
        moved = [[v + (j == i) * step for j, v in enumerate(inputs)] for step in (1e-6, -1e-6)]
        difference = (statement.activate(activation, *moved[0]) - statement.activate(activation, *moved[1])) / 2e-6
        close = np.abs(difference - slope) < 1e-6 * (1 + np.abs(slope))
        assert close.mean() > 0.98  # a clamp may be between the two points


# --- Every kind of call -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("precision", ["w4a16", "w4a4", "w4a4_dynamic"])
def test_every_option(precision, weight_on, activation):
    options = {"precision": precision, "weight_on": weight_on, "activation": activation}
    check(make_case(1, tokens=7, bias=True, out_dtype=jnp.float32, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"combine": "ordered"},
        {"out_dtype": jnp.bfloat16},
        {"routing": "hostile", "tokens": 12},
        {"routing": "any", "top_k": 4},  # an expert that comes twice for a token
        {"routing": "one", "tokens": 150},  # more than a tile
        {"routing": "hostile", "expert_offset": 2, "all_experts": 8, "tokens": 20},
        {"num_experts": 1, "top_k": 1, "tokens": 1},
        {"num_experts": 64, "tokens": 3},  # most experts without a token
        {"hidden": 112, "intermediate": 80, "num_experts": 3, "tokens": 40},
    ],
    ids=str,
)
def test_every_routing_and_shape(options):
    check(make_case(2, **{"out_dtype": jnp.float32} | options))


def test_skipped_routes_have_no_gradient():
    """Exactly none, whatever is in them."""
    case = make_case(3, tokens=4, out_dtype=jnp.float32)
    ids = case.routing.expert_ids.at[1].set(-1).at[2, 0].set(4)
    weights = case.routing.weights.at[1].set(jnp.nan).at[2, 0].set(jnp.inf)
    skipped = dataclasses.replace(case, routing=jax_moe.Routing(ids, weights), x=case.x.at[1].set(jnp.nan))
    dx, dweights = jax.grad(loss_of(skipped, cotangent(case)), (0, 1))(skipped.x, weights)
    assert not np.asarray(dx[1], np.float32).any()
    assert not np.asarray(dweights)[[1, 1, 2], [0, 1, 0]].any()
    finite = dataclasses.replace(skipped, x=case.x, routing=jax_moe.Routing(ids, case.routing.weights))
    expected_x, expected_weights = gradients(finite, cotangent(case))
    assert_close(dx, expected_x)
    assert_close(dweights, expected_weights)


def test_ids_at_the_end_of_int32_are_of_nobody():
    """id - offset wraps to a local expert in int32."""
    case = make_case(4, tokens=2, out_dtype=jnp.float32).with_options(expert_offset=2**31 - 1)
    ids = jnp.array([[-(2**31), -(2**31) + 2], [2**31 - 1, -1]], jnp.int32)
    case = dataclasses.replace(case, routing=jax_moe.Routing(ids, case.routing.weights))
    check(case)


def test_no_tokens():
    case = make_case(5, tokens=0)
    dx, dweights = jax.grad(loss_of(case, cotangent(case)), (0, 1))(case.x, case.routing.weights)
    assert (dx.shape, dweights.shape) == ((0, 48), (0, 2))


def test_differences_of_the_definition():
    """Where nothing is rounded but x, the gradient is what moving an input does to the float64 definition."""
    case = make_case(6, tokens=3, out_dtype=jnp.float32)
    dy = cotangent(case)
    _, dweights = jax.grad(loss_of(case, dy), (0, 1))(case.x, case.routing.weights)
    for token, slot in itertools.product(range(3), range(2)):
        values = []
        for step in (0.5, -0.5):  # the op is linear in the weights
            routing = dataclasses.replace(case.routing, weights=case.routing.weights.at[token, slot].add(step))
            value, _ = statement.moe(case.x, case.experts, routing, activation=jax_moe.SwiGLU(), precision="w4a16")
            values.append((value * dy).sum())
        np.testing.assert_allclose(dweights[token, slot], values[0] - values[1], rtol=1e-4)


def test_the_oracle_has_the_same_derivative():
    for options in ({}, {"precision": "w4a4"}, {"weight_on": "input"}):
        check(make_case(7, bias=True, out_dtype=jnp.float32, **options), reference.fused_moe)


# --- Prepared experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
@pytest.mark.parametrize("activation", [jax_moe.SwiGLU(), jax_moe.ReLU2()], ids=str)
def test_prepared_experts(activation, precision):
    """Sizes that the layout pads. The op itself needs a GPU; its derivative alone does not."""
    case = make_case(8, tokens=9, hidden=112, intermediate=80, bias=True, activation=activation, precision=precision,
                     out_dtype=jnp.float32)  # fmt: skip
    prepared = dataclasses.replace(case, experts=jax_moe.prepare(case.experts, "sm_90a"))
    dy = cotangent(case)
    dx, dweights = jax.jit(jax.grad(loss_of(prepared, dy), (0, 1)))(case.x, case.routing.weights)
    expected_x, expected_weights = gradients(case, dy)
    assert_close(dx, expected_x)
    assert_close(dweights, expected_weights)


# --- Transformations ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return make_case(9, tokens=6, bias=True, out_dtype=jnp.float32)


def test_vmap_and_grad_in_either_order(small):
    dy = jnp.asarray(cotangent(small))

    def loss(x, ids, weights, dy):
        return (jax_moe.fused_moe(x, small.experts, jax_moe.Routing(ids, weights), **small.options) * dy).sum()

    operands = [a.reshape(2, 3, -1) for a in (small.x, small.routing.expert_ids, small.routing.weights, dy)]
    inside = jax.vmap(jax.grad(loss, (0, 2)))(*operands)
    outside = jax.grad(lambda *a: jax.vmap(loss)(*a).sum(), (0, 2))(*operands)
    for got in (inside, outside):
        for actual, expected in zip(got, gradients(small, dy), strict=True):
            assert_close(actual.reshape(6, -1), expected)


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, "scan"], ids=["jit", "checkpoint", "scan"])
def test_under(small, transform):
    dy = jnp.asarray(cotangent(small))
    loss = loss_of(small, dy)
    if transform == "scan":

        def transformed(x, weights):
            def step(total, token):
                x, ids, weights, dy = token
                y = jax_moe.fused_moe(x, small.experts, jax_moe.Routing(ids, weights), **small.options)
                return total + (y * dy).sum(), None

            return jax.lax.scan(step, 0.0, (x, small.routing.expert_ids, weights, dy))[0]
    else:
        transformed = transform(loss)
    got = jax.grad(transformed, (0, 1))(small.x, small.routing.weights)
    for actual, expected in zip(got, gradients(small, dy), strict=True):
        assert_close(actual, expected)


def test_forward_mode(small):
    """A tangent of the output is what the gradient says of it."""
    dy = cotangent(small)
    dx, dweights = (np.asarray(cotangent(dataclasses.replace(small, x=a), 1)) for a in (small.x, small.routing.weights))
    tangents = jnp.asarray(dx, jnp.bfloat16), jnp.asarray(dweights)
    for differentiate in (jax.jvp, lambda f, p, t: (None, jax.linearize(f, *p)[1](*t))):
        _, tangent = differentiate(loss_of(small, dy), (small.x, small.routing.weights), tangents)
        expected = sum((a * b).sum() for a, b in zip(gradients(small, dy), (dx, dweights), strict=True))
        np.testing.assert_allclose(tangent, expected, rtol=1e-4)


def test_second_order(small):
    """Of the square of what is linear in the weights: 2 g g^T."""
    dy = cotangent(small)
    _, g = gradients(small, dy)
    v = np.random.default_rng(0).normal(size=g.shape).astype(np.float32)
    gradient = jax.grad(lambda weights: jnp.square(loss_of(small, dy)(small.x, weights)))
    expected = 2 * (g * v).sum() * g
    got = jax.jvp(gradient, (small.routing.weights,), (jnp.asarray(v),))[1]
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    got = jax.grad(lambda weights: (gradient(weights) * v).sum())(small.routing.weights)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_experts_are_frozen(small):
    def loss(experts):
        return jax_moe.fused_moe(small.x, experts, small.routing).astype(jnp.float32).sum()

    for differentiate in (jax.grad(loss, allow_int=True), jax.jit(jax.grad(loss, allow_int=True))):
        with pytest.raises(NotImplementedError, match=r"with respect to its experts.*x and routing.weights only"):
            differentiate(small.experts)
    assert jax.grad(lambda scale: loss(jax.lax.stop_gradient(small.experts)) * scale)(1.0)


@pytest.mark.parametrize("layout", ["canonical", "sm_90a"])
def test_one_expert_is_dense_at_a_time(layout):
    """Of 64: less than two experts' float32 weights in memory, beside the arguments."""
    case = make_case(10, tokens=32, hidden=256, intermediate=256, num_experts=64)
    experts = jax_moe.prepare(case.experts, layout)
    loss = loss_of(dataclasses.replace(case, experts=experts), cotangent(case))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(case.x, case.routing.weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 3 * 256 * 256 * 4


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np, jax_moe, helpers, test_derivative
case = helpers.make_case(0, tokens=8, hidden=32, bias=True, out_dtype=jnp.float32)
dy = test_derivative.cotangent(case)
expected = test_derivative.gradients(case, dy)
devices = np.array(jax.devices())
for shape, axes in (((4,), ("expert",)), ((2,), ("tensor",)), ((2, 2, 2), ("data", "expert", "tensor"))):
    mesh = jax.sharding.Mesh(devices[: np.prod(shape)].reshape(shape), axes)
    def op(x, experts, routing, *, activation, expert_offset, out_dtype):
        return jax_moe.sharded_moe(x, experts, routing, mesh=mesh, activation=activation, out_dtype=out_dtype)
    got = jax.jit(jax.grad(test_derivative.loss_of(case, dy, op), (0, 1)))(case.x, case.routing.weights)
    for actual, want, tolerance in zip(got, expected, (2.0**-7, 1e-5)):  # each device rounds its part of dx to bfloat16
        error = np.abs(np.asarray(actual, np.float64) - want).max() / np.abs(want).max()
        assert error < tolerance, (axes, error)
print("done")
"""


def test_through_sharded_moe():
    assert helpers.run_python(_SHARDED, JAX_NUM_CPU_DEVICES="8") == "done\n"


def test_exported_for_any_number_of_tokens():
    case = make_case(9, tokens=6, out_dtype=jnp.float32)

    def gradient(x, ids, weights):
        def loss(x, weights):
            return jax_moe.fused_moe(x, case.experts, jax_moe.Routing(ids, weights), **case.options).sum()

        return jax.grad(loss, (0, 1))(x, weights)

    (tokens,) = jax.export.symbolic_shape("t")
    shapes = [
        jax.ShapeDtypeStruct((tokens, a.shape[1]), a.dtype)
        for a in (case.x, case.routing.expert_ids, case.routing.weights)
    ]
    exported = jax.export.export(jax.jit(gradient), disabled_checks=jax_moe.export_checks())(*shapes)
    dx, dweights = exported.call(case.x, case.routing.expert_ids, case.routing.weights)
    expected_x, expected_weights = gradients(case, np.ones(case.x.shape))
    assert_close(dx, expected_x)
    assert_close(dweights, expected_weights)
