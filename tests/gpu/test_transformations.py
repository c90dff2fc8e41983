"""vmap, gradients, leading axes, JAX's debugging flags and ``nn.MoE`` on GPUs, one and two."""

import functools

import calls
import helpers
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest
import test_derivative as derivative

import jax_moe

_CAPTURE = {"xla_gpu_graph_min_graph_size": 1}
_SIZES = dict(tokens=24, hidden=112, intermediate=80, num_experts=8, top_k=3, bias=True, out_dtype=jnp.float32)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("combine", ["atomic", "ordered"])
@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
def test_gradients(poison, precision, combine, weight_on):
    """Through prepared experts, in one program with the op; against float64."""
    case = helpers.make_case(1, **_SIZES, precision=precision, combine=combine, weight_on=weight_on)
    dy = derivative.cotangent(case)
    prepared = calls.prepared(case)

    def loss(x, weights, experts, ids):
        y = jax_moe.fused_moe(x, experts, jax_moe.Routing(ids, weights), **case.options)
        return (y * dy).sum(), y

    run = calls.jit(jax.grad(loss, (0, 1), has_aux=True), _CAPTURE)
    for _ in range(3):
        poison(0.25)
        (dx, dweights), y = run(case.x, case.routing.weights, prepared.experts, case.routing.expert_ids)
    helpers.assert_matches(y, case)
    expected = derivative.gradients(case, dy)
    derivative.assert_close(dx, expected[0])
    derivative.assert_close(dweights, expected[1])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axes", [{"expert": 2}, {"tensor": 2}, {"data": 2}], ids=str)
def test_gradients_on_a_mesh(poison, axes, axis_type):
    mesh = jax.make_mesh((2,), tuple(axes), axis_types=(axis_type,), devices=calls.devices(2))
    case = helpers.make_case(2, **_SIZES | {"intermediate": 96})
    dy = derivative.cotangent(case)
    experts = calls.prepare(jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh)))
    options = {name: value for name, value in case.options.items() if name != "expert_offset"}

    def loss(x, weights, experts, ids):
        y = jax_moe.sharded_moe(x, experts, jax_moe.Routing(ids, weights), mesh=mesh, **options)
        return (y * dy).sum()

    replicated = jax.device_put((case.x, case.routing.weights, case.routing.expert_ids), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        run = calls.jit(jax.grad(loss, (0, 1)), _CAPTURE)
        for _ in range(2):
            poison(0.25)
            dx, dweights = run(replicated[0], replicated[1], experts, replicated[2])
    expected_x, expected_weights = derivative.gradients(case, dy)
    derivative.assert_close(dweights, expected_weights)
    if "data" in axes:
        derivative.assert_close(dx, expected_x)
    else:  # each device rounds its part of dx to bfloat16, and so is their sum: of parts that are no larger than a row
        error = np.abs(np.asarray(dx, np.float64) - expected_x).max(1)
        assert (error <= 2.0**-7 * np.abs(expected_x).max(1)).all()


@pytest.mark.parametrize("combine", ["atomic", "ordered"])
def test_vmap_and_leading_axes(poison, combine):
    """Sequences that are mapped, or an axis of x, are more tokens of one call."""
    case = helpers.make_case(3, **_SIZES, combine=combine)
    prepared = calls.prepared(case)
    x, ids, weights = (a.reshape(4, 6, -1) for a in (case.x, case.routing.expert_ids, case.routing.weights))

    def call(x, ids, weights, experts):
        return jax_moe.fused_moe(x, experts, jax_moe.Routing(ids, weights), **case.options)

    def both(x, ids, weights, experts):
        mapped = jax.vmap(call, in_axes=(0, 0, 0, None))(x, ids, weights, experts)
        return mapped, call(x, ids, weights, experts)

    run = calls.jit(both, _CAPTURE)
    for _ in range(3):
        poison(0.25)
        results = run(x, ids, weights, prepared.experts)
    for y in results:
        assert y.shape == (4, 6, 112)
        helpers.assert_matches(np.asarray(y).reshape(24, 112), case)


@pytest.mark.parametrize("way", ["eager", "jit"])
def test_debug_nans_finds_a_nan(way):
    case = helpers.make_case(4, **_SIZES)
    prepared = calls.prepared(case)
    op = functools.partial(jax_moe.fused_moe, **case.options)
    run = calls.eager(op) if way == "eager" else calls.jit(op, {})
    with jax.debug_nans(True):
        helpers.assert_matches(run(case.x, prepared.experts, case.routing), case)  # no false alarm
        with pytest.raises(FloatingPointError):
            run(case.x.at[3, 5].set(jnp.nan), prepared.experts, case.routing)


@pytest.mark.parametrize("set_mesh", [False, True])
def test_a_flax_module_on_two_gpus(poison, set_mesh):
    nnx = pytest.importorskip("flax.nnx")
    from jax_moe.nn import MoE

    mesh = jax.make_mesh((2, 1), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=calls.devices(2))
    case = helpers.make_case(5, **_SIZES)
    router = jax_moe.checkpoints.Router(jax.random.normal(jax.random.key(0), (8, 112)), k=3)
    on_one = MoE(calls.prepared(case).experts, router)
    graphdef, state = nnx.split(on_one)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), nnx.get_partition_spec(state), is_leaf=lambda s: isinstance(s, P)
    )
    placed = nnx.merge(graphdef, jax.device_put(state, shardings))
    x = jax.random.normal(jax.random.key(1), (2, 12, 112))
    call = lambda module, x: module(x)  # noqa: E731
    if calls.why_not_run():
        split = lambda module: nnx.split(module)  # noqa: E731
        merged = lambda graphdef, state, x: nnx.merge(graphdef, state)(x)  # noqa: E731
        calls.jit(functools.partial(merged, split(placed)[0]), {})(split(placed)[1], x)
    expected = nnx.jit(call)(on_one, x)
    poison(0.25)
    if set_mesh:
        with jax.set_mesh(mesh):
            got = nnx.jit(call)(placed, x)
    else:
        got = nnx.jit(call)(placed, x)
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=2e-5, atol=2e-5)
