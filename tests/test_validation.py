"""Every bad argument is an error while tracing that says which argument, what it got and what it needs."""

import dataclasses
import functools
import inspect

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import activations, primitive, reference
from jax_moe.problem import Options

T, H, I, E, K = 5, 48, 32, 4, 2  # noqa: E741


def experts_with(name, **leaves):
    """A change of some leaves of a projection of the case's experts, each given as a function of the leaf."""

    def change(arguments):
        experts = arguments["experts"]
        projection = getattr(experts, name)
        changed = {leaf: f(getattr(projection, leaf)) for leaf, f in leaves.items()}
        return {"experts": dataclasses.replace(experts, **{name: dataclasses.replace(projection, **changed)})}

    return change


def routing_with(**leaves):
    def change(arguments):
        changed = {leaf: f(getattr(arguments["routing"], leaf)) for leaf, f in leaves.items()}
        return {"routing": dataclasses.replace(arguments["routing"], **changed)}

    return change


def arguments_with(**changed):
    return lambda arguments: changed


# What is changed; the error; what the message must say: the argument, what it got, what it needs.
BAD = {
    "x is a list": (arguments_with(x=[[0.0] * H] * T), TypeError, "x: got list, needs an array"),
    "x is None": (arguments_with(x=None), TypeError, "x: got NoneType, needs an array"),
    "x is float32": (arguments_with(x=jnp.zeros((T, H))), TypeError, "x: got dtype float32, needs bfloat16"),
    "x is a vector": (
        arguments_with(x=jnp.zeros(H, jnp.bfloat16)),
        ValueError,
        r"x, routing.expert_ids: got shapes \(48,\) and \(5, 2\), need the same leading axes",
    ),
    "x has a batch axis": (
        arguments_with(x=jnp.zeros((1, T, H), jnp.bfloat16)),
        ValueError,
        r"x, routing.expert_ids: got shapes \(1, 5, 48\) and \(5, 2\), need the same leading axes",
    ),
    "H is no multiple": (arguments_with(x=jnp.zeros((T, 40), jnp.bfloat16)), ValueError, "x: got H = 40, needs .*16"),
    "H is 0": (arguments_with(x=jnp.zeros((T, 0), jnp.bfloat16)), ValueError, "x: got H = 0, needs .*16"),
    "H is not the experts'": (
        arguments_with(x=jnp.zeros((T, 64), jnp.bfloat16)),
        ValueError,
        "x: got H = 64, the experts have H = 48",
    ),
    "x has no tokens": (
        arguments_with(x=jnp.zeros((0, H), jnp.bfloat16)),
        ValueError,
        r"x, routing.expert_ids: got shapes \(0, 48\) and \(5, 2\), need the same leading axes",
    ),
    "experts are a tuple": (arguments_with(experts=()), TypeError, "experts: got tuple, needs Experts"),
    "a projection is a tuple": (
        lambda arguments: {"experts": dataclasses.replace(arguments["experts"], down=())},
        TypeError,
        "experts.down: got tuple, needs Projection",
    ),
    "an unknown layout": (
        lambda arguments: {"experts": dataclasses.replace(arguments["experts"], layout="swizzled")},
        ValueError,
        "experts.layout: got 'swizzled', needs one of 'canonical', 'wgmma_v1'",
    ),
    "no experts": (
        lambda arguments: {"experts": jax.tree.map(lambda a: a[:0] if a.ndim else a, arguments["experts"])},
        ValueError,
        "experts: got no expert, needs at least one",
    ),
    "a layer axis is left": (
        lambda arguments: {"experts": jax.tree.map(lambda a: a[None], arguments["experts"])},
        ValueError,
        r"experts.gate_up.global_scale: got shape \(1, 4, 2\), needs \[L, P\]",
    ),
    "I is no multiple": (
        experts_with("gate_up", payload=lambda p: p[:, :, :24], block_scale=lambda s: s[:, :, :24]),
        ValueError,
        "experts: got I = 24, needs a positive multiple of 16",
    ),
    "I is 0": (
        experts_with("gate_up", payload=lambda p: p[:, :, :0]),
        ValueError,
        "experts: got I = 0, needs a positive multiple",
    ),
    "gate_up payload is missing": (
        experts_with("gate_up", payload=lambda p: None),
        TypeError,
        "experts.gate_up.payload: got NoneType",
    ),
    "gate_up payload is signed": (
        experts_with("gate_up", payload=lambda p: p.astype(jnp.int8)),
        TypeError,
        "experts.gate_up.payload: got dtype int8, needs uint8",
    ),
    "gate_up payload is dense": (
        experts_with("gate_up", payload=lambda p: jnp.zeros((E, 2, I, H), jnp.uint8)),
        ValueError,
        r"experts.gate_up.payload: got shape \(4, 2, 32, 48\), needs \[4, 2, 32, 24\]",
    ),
    "gate_up payload is a packed float4": (
        experts_with("gate_up", payload=lambda p: jnp.zeros(p.shape, jnp.float4_e2m1fn)),
        ValueError,
        r"experts.gate_up.payload: got shape \(4, 2, 32, 24\), needs \[4, 2, 32, 48\]",
    ),
    "gate and up in one axis": (
        experts_with("gate_up", payload=lambda p: p.reshape(E, 2 * I, -1)),
        ValueError,
        r"experts.gate_up.payload: got shape \(4, 64, 24\)",
    ),
    "gate_up block scales are float32": (
        experts_with("gate_up", block_scale=lambda s: s.astype(jnp.float32)),
        TypeError,
        "experts.gate_up.block_scale: got dtype float32, needs float8_e4m3fn",
    ),
    "gate_up block scales of another e4m3": (
        experts_with("gate_up", block_scale=lambda s: s.astype(jnp.float8_e4m3fnuz)),
        TypeError,
        "experts.gate_up.block_scale: got dtype float8_e4m3fnuz, needs float8_e4m3fn",
    ),
    "gate_up block scales of 32": (
        experts_with("gate_up", block_scale=lambda s: s[..., :1]),
        ValueError,
        r"experts.gate_up.block_scale: got shape \(4, 2, 32, 1\), needs \[4, 2, 32, 3\]",
    ),
    "one global scale for gate and up": (
        experts_with("gate_up", global_scale=lambda s: s[:, 0]),
        ValueError,
        r"experts.gate_up.global_scale: got shape \(4,\), needs \[L, P\]",
    ),
    "gate_up global scales are float16": (
        experts_with("gate_up", global_scale=lambda s: s.astype(jnp.float16)),
        TypeError,
        "experts.gate_up.global_scale: got dtype float16, needs float32",
    ),
    "gate_up input scale for each expert": (
        experts_with("gate_up", input_scale=lambda s: jnp.ones(E)),
        ValueError,
        r"experts.gate_up.input_scale: got shape \(4,\), needs \[\]",
    ),
    "gate_up input scale is a float": (
        experts_with("gate_up", input_scale=lambda s: 1.0),
        TypeError,
        "experts.gate_up.input_scale: got float",
    ),
    "gate_up bias for one part": (
        experts_with("gate_up", bias=lambda b: jnp.zeros((E, I))),
        ValueError,
        r"experts.gate_up.bias: got shape \(4, 32\), needs \[4, 2, 32\]",
    ),
    "gate_up bias is bfloat16": (
        experts_with("gate_up", bias=lambda b: jnp.zeros((E, 2, I), jnp.bfloat16)),
        TypeError,
        "experts.gate_up.bias: got dtype bfloat16, needs float32",
    ),
    "down payload of another E": (
        experts_with("down", payload=lambda p: p[:3]),
        ValueError,
        r"experts.down.payload: got shape \(3, 48, 16\), needs \[4, 48, 16\]",
    ),
    "down payload is transposed": (
        experts_with("down", payload=lambda p: p.swapaxes(1, 2)),
        ValueError,
        r"experts.down.payload: got shape \(4, 16, 48\), needs \[4, 48, 16\]",
    ),
    "down payload is float": (
        experts_with("down", payload=lambda p: p.astype(jnp.float32)),
        TypeError,
        "experts.down.payload: got dtype float32, needs uint8",
    ),
    "down block scales are of 32": (
        experts_with("down", block_scale=lambda s: s[..., :1]),
        ValueError,
        r"experts.down.block_scale: got shape \(4, 48, 1\), needs \[4, 48, 2\]",
    ),
    "down global scale is one": (
        experts_with("down", global_scale=lambda s: s[0]),
        ValueError,
        r"experts.down.global_scale: got shape \(\), needs \[4\]",
    ),
    "down input scale is one": (
        experts_with("down", input_scale=lambda s: s[0]),
        ValueError,
        r"experts.down.input_scale: got shape \(\), needs \[4\]",
    ),
    "down bias of I": (
        experts_with("down", bias=lambda b: jnp.zeros((E, I))),
        ValueError,
        r"experts.down.bias: got shape \(4, 32\), needs \[4, 48\]",
    ),
    "routing is a tuple": (arguments_with(routing=(None, None)), TypeError, "routing: got tuple, needs Routing"),
    "ids are int64": (
        routing_with(expert_ids=lambda i: np.asarray(i, np.int64)),
        TypeError,
        "expert_ids: got dtype int64, needs int32",
    ),
    "ids are unsigned": (
        routing_with(expert_ids=lambda i: i.astype(jnp.uint32)),
        TypeError,
        "expert_ids: got dtype uint32, needs int32",
    ),
    "ids of other tokens": (
        routing_with(expert_ids=lambda i: i[:4]),
        ValueError,
        r"x, routing.expert_ids: got shapes \(5, 48\) and \(4, 2\), need the same leading axes",
    ),
    "ids are a vector": (
        routing_with(expert_ids=lambda i: i[:, 0]),
        ValueError,
        r"x, routing.expert_ids: got shapes \(5, 48\) and \(5,\), need the same leading axes",
    ),
    "no slots": (
        routing_with(expert_ids=lambda i: i[:, :0], weights=lambda w: w[:, :0]),
        ValueError,
        "routing.expert_ids: got K = 0, needs at least one slot",
    ),
    "weights are bfloat16": (
        routing_with(weights=lambda w: w.astype(jnp.bfloat16)),
        TypeError,
        "routing.weights: got dtype bfloat16, needs float32",
    ),
    "x has no axis": (arguments_with(x=jnp.bfloat16(0)), ValueError, r"x: got shape \(\), needs \[\.\.\., H\]"),
    "weights of other tokens": (
        routing_with(weights=lambda w: w[None]),
        ValueError,
        r"routing.weights: got shape \(1, 5, 2\), needs \[5, 2\]",
    ),
    "weights of other slots": (
        routing_with(weights=lambda w: w[:, :1]),
        ValueError,
        r"routing.weights: got shape \(5, 1\), needs \[5, 2\]",
    ),
    "weights are missing": (
        routing_with(weights=lambda w: None),
        TypeError,
        "routing.weights: got NoneType, needs an array",
    ),
    "activation is a name": (
        arguments_with(activation="swiglu"),
        TypeError,
        "activation: got str, needs SwiGLU or GeGLU",
    ),
    "activation is a class": (
        arguments_with(activation=jax_moe.GeGLU),
        TypeError,
        "activation: got the class GeGLU itself, needs SwiGLU or",
    ),
    "alpha is an array": (
        arguments_with(activation=jax_moe.SwiGLU(alpha=jnp.float32(1.7))),
        TypeError,
        "activation.alpha: got ArrayImpl, needs a Python number",
    ),
    "alpha is a string": (
        arguments_with(activation=jax_moe.SwiGLU(alpha="1")),
        TypeError,
        "activation.alpha: got str, needs a Python number",
    ),
    "alpha is None": (
        arguments_with(activation=jax_moe.SwiGLU(alpha=None)),
        TypeError,
        "activation.alpha: got NoneType, needs a Python number",
    ),
    "limit is negative": (
        arguments_with(activation=jax_moe.SwiGLU(limit=-1.0)),
        ValueError,
        "activation.limit: got -1.0, needs a finite number above 0",
    ),
    "limit is infinite": (
        arguments_with(activation=jax_moe.SwiGLU(limit=float("inf"))),
        ValueError,
        "activation.limit: got inf, needs a finite number above 0",
    ),
    "alpha overflows float32": (
        arguments_with(activation=jax_moe.SwiGLU(alpha=1e300)),
        ValueError,
        "activation.alpha: got 1e[+]300, needs a finite number in float32",
    ),
    "limit vanishes in float32": (
        arguments_with(activation=jax_moe.SwiGLU(limit=1e-300)),
        ValueError,
        "activation.limit: got 1e-300, needs a finite number above 0 in float32",
    ),
    "command_buffer is a word": (
        arguments_with(command_buffer="no"),
        TypeError,
        "command_buffer: got str, needs bool",
    ),
    "beta is NaN": (
        arguments_with(activation=jax_moe.SwiGLU(beta=float("nan"))),
        ValueError,
        "activation.beta: got nan, needs a finite number",
    ),
    "SiTU divides by 0": (
        arguments_with(activation=jax_moe.SiTU(beta=0.0)),
        ValueError,
        "activation.beta: got 0.0, needs a finite number above 0",
    ),
    "SiTU divides by 0 linearly": (
        arguments_with(activation=jax_moe.SiTU(linear_beta=0)),
        ValueError,
        "activation.linear_beta: got 0, needs a finite number above 0",
    ),
    "activation without a gate": (
        arguments_with(activation=jax_moe.ReLU2()),
        ValueError,
        r"activation: got ReLU2, which has no gate; experts.gate_up has P = 2 \(gate and up\)",
    ),
    "an unknown precision": (
        arguments_with(precision="fp8"),
        ValueError,
        "precision: got 'fp8', needs one of 'w4a16', 'w4a4'",
    ),
    "precision is None": (arguments_with(precision=None), ValueError, "precision: got None, needs one of"),
    "an unknown combine": (
        arguments_with(combine="sum"),
        ValueError,
        "combine: got 'sum', needs one of 'atomic', 'ordered'",
    ),
    "an unknown weight_on": (
        arguments_with(weight_on="both"),
        ValueError,
        "weight_on: got 'both', needs one of 'output', 'input'",
    ),
    "out_dtype is float16": (
        arguments_with(out_dtype=jnp.float16),
        TypeError,
        "out_dtype: got float16, needs bfloat16 or",
    ),
    "out_dtype is float64": (
        arguments_with(out_dtype=np.float64),
        TypeError,
        "out_dtype: got float64, needs bfloat16 or",
    ),
    "out_dtype is no dtype": (arguments_with(out_dtype="wide"), TypeError, "out_dtype: got 'wide', needs bfloat16 or"),
    "out_dtype is None": (arguments_with(out_dtype=None), TypeError, "out_dtype: got None, needs bfloat16 or"),
    "offset is negative": (arguments_with(expert_offset=-1), ValueError, "expert_offset: got -1, needs 0 <="),
    "offset is too large": (
        arguments_with(expert_offset=2**31),
        ValueError,
        "expert_offset: got 2147483648, needs 0 <=",
    ),
    "offset is a float": (arguments_with(expert_offset=1.0), TypeError, "expert_offset: got 1.0, needs an int"),
    "offset is a float array": (
        arguments_with(expert_offset=jnp.float32(1)),
        TypeError,
        "expert_offset: got dtype float32, needs int32",
    ),
    "offset for each token": (
        arguments_with(expert_offset=jnp.zeros(T, jnp.int32)),
        ValueError,
        r"expert_offset: got shape \(5,\), needs \[\]",
    ),
    "offset is None": (arguments_with(expert_offset=None), TypeError, "expert_offset: got NoneType, needs an array"),
    "w4a4 without gate_up's input scale": (
        lambda arguments: experts_with("gate_up", input_scale=lambda s: None)(arguments) | {"precision": "w4a4"},
        ValueError,
        r"experts.gate_up.input_scale: got None, .*jax_moe.calibrate\(",
    ),
    "w4a4 without down's input scale": (
        lambda arguments: experts_with("down", input_scale=lambda s: None)(arguments) | {"precision": "w4a4"},
        ValueError,
        r"experts.down.input_scale: got None, .*jax_moe.calibrate\(",
    ),
}


@pytest.fixture(scope="module")
def good():
    case = helpers.make_case(0, tokens=T, hidden=H, intermediate=I, num_experts=E, top_k=K)
    return {"x": case.x, "experts": case.experts, "routing": case.routing}


@pytest.fixture
def nothing_is_bound(monkeypatch):
    """The call itself must not be reached."""

    def reached(*_, **__):
        raise AssertionError("a bad argument reached the custom call")

    monkeypatch.setattr(primitive.fused_moe_p, "bind", reached)


@pytest.mark.usefixtures("nothing_is_bound")
@pytest.mark.parametrize("name", BAD)
def test_fused_moe_refuses(name, good):
    change, error, message = BAD[name]
    arguments = good | change(good)
    with pytest.raises(error, match=message):
        jax_moe.fused_moe(**arguments)


def _is_array(leaf):
    return isinstance(leaf, jax.Array)


@pytest.mark.usefixtures("nothing_is_bound")
@pytest.mark.parametrize("name", BAD)
def test_fused_moe_refuses_while_tracing(name, good):
    """The same when every array is a tracer: nothing waits for the call to run."""
    change, error, message = BAD[name]
    leaves, tree = jax.tree.flatten(good | change(good))
    arrays = [leaf for leaf in leaves if _is_array(leaf)]

    def traced(arrays):
        arrays = iter(arrays)
        return jax_moe.fused_moe(
            **jax.tree.unflatten(tree, [next(arrays) if _is_array(leaf) else leaf for leaf in leaves])
        )

    with pytest.raises(error, match=message):
        jax.jit(traced).lower(arrays)


@pytest.mark.usefixtures("nothing_is_bound")
@pytest.mark.parametrize("name", [name for name in BAD if not name.startswith("offset")])
def test_sharded_moe_refuses(name, good):
    change, error, message = BAD[name]
    arguments = good | change(good)
    with pytest.raises(error, match=message):
        jax_moe.sharded_moe(**arguments, mesh=jax.make_mesh((2,), ("expert",)))


def test_the_good_arguments_are_good(good):
    assert jax_moe.fused_moe(**good).shape == (T, H)
    for offset in (np.int32(1), jnp.int32(1), 2**31 - 1):
        assert jax_moe.fused_moe(**good, expert_offset=offset).shape == (T, H)


def test_experts_in_all_are_a_number_and_no_fewer_than_here(good):
    with pytest.raises(ValueError, match=f"num_experts: got {E - 1}, needs at least L = {E}"):
        jax_moe.fused_moe(**good, num_experts=E - 1)
    with pytest.raises(ValueError, match=f"num_experts: got {E}, needs at least L = {E} after expert_offset = 1"):
        jax_moe.fused_moe(**good, num_experts=E, expert_offset=1)
    with pytest.raises(TypeError, match="expert_offset: got True, needs an int"):
        jax_moe.fused_moe(**good, expert_offset=True)
    with pytest.raises(TypeError, match=r"num_experts: got 64.0, needs an int"):
        jax_moe.fused_moe(**good, num_experts=64.0)  # pyright: ignore[reportArgumentType]


def test_numbers_may_be_numpys(good):
    """As read from a configuration; kernels are looked up by ``repr``, so they become Python's."""
    call = functools.partial(jax.jit(jax_moe.fused_moe, static_argnames=("activation", "num_experts")), **good)
    call(num_experts=np.int64(64), activation=jax_moe.SwiGLU(np.float32(1.5), np.float64(1), np.int64(7)))
    jax_moe.fused_moe(**good, expert_offset=np.int64(1))
    assert jax_moe.route(jnp.zeros((T, E)), np.int64(2)).weights.shape == (T, 2)
    for activation in (jax_moe.SwiGLU(1, np.float64(1), 7), jax_moe.SiTU(np.float32(4), 25)):
        assert all(type(number) is float for number in activations.parameters(activation))


def test_there_is_no_positional_option(good):
    with pytest.raises(TypeError):
        jax_moe.fused_moe(good["x"], good["experts"], good["routing"], jax_moe.SwiGLU())


def test_every_call_takes_the_options_of_the_op():
    op = inspect.signature(jax_moe.fused_moe).parameters
    assert inspect.signature(reference.fused_moe).parameters == op
    for field in dataclasses.fields(Options):
        assert inspect.signature(jax_moe.sharded_moe).parameters[field.name] == op[field.name]


def test_w4a16_needs_no_input_scales(good):
    without = good | {"experts": helpers.without_input_scales(good["experts"])}
    helpers.assert_bit_equal(jax_moe.fused_moe(**good), jax_moe.fused_moe(**without))


# --- calibrate ----------------------------------------------------------------------------------------------------

NOT_CALIBRATES = ("offset", "out_dtype", "combine", "precision", "w4a4", "command_buffer")


@pytest.mark.parametrize("name", [name for name in BAD if not any(word in name for word in NOT_CALIBRATES)])
def test_calibrate_refuses(name, good):
    """It takes what fused_moe takes."""
    change, error, message = BAD[name]
    arguments = good | change(good)
    with pytest.raises(error, match=message):
        jax_moe.calibrate(**arguments)


def test_calibrate_refuses_no_tokens(good):
    case = helpers.make_case(0, tokens=0)
    with pytest.raises(ValueError, match="x: got no tokens"):
        jax_moe.calibrate(case.experts, case.x, case.routing)
