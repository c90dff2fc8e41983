"""Tokens in any arrangement: leading axes, vmap and what is made of it; all equal to the op on a list of tokens."""

import dataclasses
import itertools

import helpers
from helpers import make_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import ffi, reference


def arranged(case, *leading):
    """The case with its tokens in an array of these leading axes."""
    x, routing = jax.tree.map(lambda a: a.reshape(*leading, a.shape[-1]), (case.x, case.routing))
    return dataclasses.replace(case, x=x, routing=routing)


# --- Leading axes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(6,), (2, 3), (1, 3, 1, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"precision": "w4a4", "combine": "ordered"}, {"weight_on": "input"}], ids=str)
def test_leading_axes_are_tokens(leading, options):
    case = make_case(1, tokens=6, bias=True, out_dtype=jnp.float32, **options)
    got = arranged(case, *leading).run()
    assert got.shape == (*leading, 48)
    helpers.assert_bit_equal(got.reshape(6, 48), case.run())
    helpers.assert_matches(got.reshape(6, 48), case)
    expected = arranged(case, *leading).run(reference.fused_moe)
    helpers.assert_bit_equal(expected.reshape(6, 48), case.run(reference.fused_moe))


def test_one_token_needs_no_axis():
    case = make_case(2, tokens=1)
    got = arranged(case).run()
    assert got.shape == (48,)
    helpers.assert_bit_equal(got[None], case.run())
    assert arranged(case).run(reference.fused_moe).shape == (48,)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens_of_any_arrangement(leading):
    case = make_case(3, tokens=0)
    assert arranged(case, *leading).run().shape == (*leading, 48)


def test_routes_and_tokens_of_a_batch_fit():
    """What a model writes: logits, ids and tokens keep the axes of the batch."""
    case = make_case(4, tokens=6, out_dtype=jnp.float32)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    got = jax_moe.fused_moe(case.x.reshape(2, 3, 48), case.experts, jax_moe.route(logits, 2), **case.options)
    flat = dataclasses.replace(case, routing=jax_moe.route(logits.reshape(6, 4), 2))
    helpers.assert_matches(np.asarray(got).reshape(6, 48), flat)


def test_calibrates_on_a_batch():
    case = make_case(5, tokens=6)
    experts = helpers.without_input_scales(case.experts)
    batch = arranged(case, 2, 3)
    flat, batched = (jax_moe.calibrate(experts, c.x, c.routing) for c in (case, batch))
    jax.tree.map(helpers.assert_bit_equal, batched, flat)


@pytest.mark.parametrize(
    ("x_axes", "routing_axes"), [((2, 3), (6,)), ((2, 3), (3, 2)), ((6,), (2, 3)), ((), (6,)), ((2, 3), (2,))], ids=str
)
def test_other_leading_axes_are_refused(x_axes, routing_axes):
    """A batch that would broadcast, or holds as many tokens in another order, is as wrong as any other."""
    case = make_case(6, tokens=6)
    x = jnp.zeros((*x_axes, 48), jnp.bfloat16)
    routing = jax_moe.Routing(jnp.zeros((*routing_axes, 2), jnp.int32), jnp.zeros((*routing_axes, 2)))
    shapes = ".*".join(f"{n}" for n in (*x_axes, 48, *routing_axes, 2))
    with pytest.raises(ValueError, match=rf"^x, routing.expert_ids: got shapes .*{shapes}.*the same leading axes"):
        jax_moe.fused_moe(x, case.experts, routing)


# --- vmap ---------------------------------------------------------------------------------------------------------


def batch_of(count, **options):
    """Leaves ``[count, T, ...]`` of x and routing, the experts and the op on one element of it."""
    cases = [make_case(seed, tokens=3, bias=True, out_dtype=jnp.float32, **options) for seed in range(count)]
    x, routing = jax.tree.map(lambda *a: jnp.stack(a), *[(case.x, case.routing) for case in cases])
    experts, options = cases[0].experts, cases[0].options

    def op(x, ids, weights):
        return jax_moe.fused_moe(x, experts, jax_moe.Routing(ids, weights), **options)

    return (x, routing.expert_ids, routing.weights), experts, op


def in_turn(op, operands, axes):
    """What vmap must give: the op on one element after another."""
    size = next(a.shape[axis] for a, axis in zip(operands, axes, strict=True) if axis is not None)

    def element(i):
        return [a if axis is None else jnp.take(a, i, axis) for a, axis in zip(operands, axes, strict=True)]

    return np.stack([np.asarray(op(*element(i))) for i in range(size)])


@pytest.mark.parametrize("mapped", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_vmap_over_any_of_the_tokens_operands(mapped):
    operands, experts, op = batch_of(3)
    operands = [a if is_mapped else a[1] for a, is_mapped in zip(operands, mapped, strict=True)]
    axes = [0 if is_mapped else None for is_mapped in mapped]
    got = np.asarray(jax.vmap(op, axes)(*operands))
    helpers.assert_bit_equal(got, in_turn(op, operands, axes))
    for i in range(3):
        x, ids, weights = (a if axis is None else a[i] for a, axis in zip(operands, axes, strict=True))
        routing = jax_moe.Routing(ids, weights)
        helpers.assert_matches(got[i], helpers.Case(x, experts, routing, {"out_dtype": jnp.float32}))


@pytest.mark.parametrize(
    "options", [{"precision": "w4a4"}, {"combine": "ordered"}, {"weight_on": "input"}, {"expert_offset": 1}], ids=str
)
def test_vmap_of_every_kind_of_call(options):
    operands, _, op = batch_of(2, routing="hostile", **options)
    helpers.assert_bit_equal(jax.jit(jax.vmap(op))(*operands), in_turn(op, operands, (0, 0, 0)))


def test_vmap_over_other_axes():
    operands, _, op = batch_of(4)
    moved = jnp.moveaxis(operands[0], 0, -1), jnp.moveaxis(operands[1], 0, 1), operands[2]
    got = jax.vmap(op, in_axes=(-1, 1, 0), out_axes=2)(*moved)
    helpers.assert_bit_equal(jnp.moveaxis(got, 2, 0), in_turn(op, operands, (0, 0, 0)))


def test_nested_vmaps_are_one_call():
    operands, _, op = batch_of(6)
    nested = jax.vmap(jax.vmap(op, (0, 0, None)), (0, None, 0))
    arguments = operands[0].reshape(2, 3, 3, -1), operands[1][:3], operands[2][:2]
    got = nested(*arguments)
    expected = np.stack([in_turn(op, (arguments[0][i], arguments[1], arguments[2][i]), (0, 0, None)) for i in range(2)])
    helpers.assert_bit_equal(got, expected)
    hlo = jax.jit(nested).lower(*arguments).compile().as_text()
    assert hlo.count(f'custom_call_target="{ffi.TARGET}"') == 1


@pytest.mark.parametrize(("size", "tokens"), [(1, 3), (2, 0), (0, 3)])
def test_vmap_of_little_or_nothing(size, tokens):
    operands, _, op = batch_of(max(size, 1))
    operands = [a[:size, :tokens] for a in operands]
    got = jax.vmap(op)(*operands)
    assert got.shape == (size, tokens, 48)
    if got.size:
        helpers.assert_bit_equal(got, in_turn(op, operands, (0, 0, 0)))


@pytest.mark.parametrize("count", [4, 5])
def test_lax_map_in_batches(count):
    """5 of them in batches of 2 leave one over."""
    operands, _, op = batch_of(count)
    got = jax.lax.map(lambda element: op(*element), operands, batch_size=2)
    helpers.assert_bit_equal(got, in_turn(op, operands, (0, 0, 0)))


@pytest.mark.parametrize("use", [True, False])
def test_vmap_of_a_branch(use):
    operands, _, op = batch_of(2)
    maybe = jax.vmap(lambda *a: jax.lax.cond(use, op, lambda x, *_: x.astype(jnp.float32), *a))
    expected = in_turn(op, operands, (0, 0, 0)) if use else operands[0].astype(jnp.float32)
    helpers.assert_bit_equal(maybe(*operands), expected)


def test_vmap_over_the_predicate_of_a_branch():
    """JAX runs both branches and repeats what they close over, the experts too: refused, with what does the same."""
    operands, _, op = batch_of(2)
    use = jnp.array([True, False])
    with pytest.raises(NotImplementedError, match=r"lax\.cond whose predicate is mapped.*jnp\.where"):
        jax.vmap(lambda use, *a: jax.lax.cond(use, op, lambda x, *_: x.astype(jnp.float32), *a))(use, *operands)
    chosen = jax.vmap(lambda use, *a: jnp.where(use, op(*a), a[0].astype(jnp.float32)))(use, *operands)
    expected = in_turn(op, operands, (0, 0, 0))
    expected[1] = operands[0][1].astype(jnp.float32)
    helpers.assert_bit_equal(chosen, expected)


def test_vmap_of_a_scan_over_layers():
    """The layers' experts are scanned, not mapped: that is what the error about mapped experts advises."""
    layers = [make_case(seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *[layer.experts for layer in layers])
    x, ids, weights = batch_of(3)[0]

    def model(x, ids, weights):
        routing = jax_moe.Routing(ids, weights)
        return jax.lax.scan(lambda x, experts: (jax_moe.fused_moe(x, experts, routing), None), x, stacked)[0]

    helpers.assert_bit_equal(jax.jit(jax.vmap(model))(x, ids, weights), in_turn(model, (x, ids, weights), (0, 0, 0)))


@pytest.mark.parametrize("jit", [True, False])
def test_vmap_inside_a_shard_map(jit):
    operands, _, op = batch_of(3)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    spec = jax.sharding.PartitionSpec(None, "data")
    run = jax.shard_map(jax.vmap(op), mesh=mesh, in_specs=spec, out_specs=spec)
    helpers.assert_bit_equal((jax.jit(run) if jit else run)(*operands), in_turn(op, operands, (0, 0, 0)))


def test_vmap_of_sharded_moe():
    operands, experts, op = batch_of(3)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("expert",))

    def sharded(x, ids, weights):
        return jax_moe.sharded_moe(x, experts, jax_moe.Routing(ids, weights), mesh=mesh, out_dtype=jnp.float32)

    helpers.assert_bit_equal(jax.vmap(sharded)(*operands), in_turn(op, operands, (0, 0, 0)))


def test_nnx_vmap():
    nnx = pytest.importorskip("flax.nnx")
    operands, _, op = batch_of(3)
    helpers.assert_bit_equal(nnx.vmap(op)(*operands), in_turn(op, operands, (0, 0, 0)))


def test_a_mapped_expert_is_refused():
    case = make_case(7)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), case.experts)
    with pytest.raises(NotImplementedError, match=r"vmap over experts or expert_offset.*in_axes=None.*jax\.lax\.scan"):
        jax.vmap(lambda e: jax_moe.fused_moe(case.x, e, case.routing))(stacked)
    with pytest.raises(NotImplementedError, match="vmap over experts or expert_offset"):
        jax.vmap(lambda o: jax_moe.fused_moe(case.x, case.experts, case.routing, expert_offset=o))(jnp.arange(2))


def test_debug_mode_finds_an_id_of_nobody_in_a_batch():
    program = """
import jax, jax.numpy as jnp, jax_moe, helpers
case = helpers.make_case(0, tokens=6)
x, ids, weights = (a.reshape(2, 3, -1) for a in (case.x, case.routing.expert_ids, case.routing.weights))
for name, run, said in (
    ("vmap", jax.vmap(lambda x, i, w: jax_moe.fused_moe(x, case.experts, jax_moe.Routing(i, w))), "token 2, slot 1"),
    ("batch", lambda x, i, w: jax_moe.fused_moe(x, case.experts, jax_moe.Routing(i, w)), "token 1, 2, slot 1"),
):
    jax.block_until_ready(run(x, ids, weights))
    jax.effects_barrier()
    try:
        jax.block_until_ready(jax.jit(run)(x, ids.at[1, 2, 1].set(-7), weights))
        jax.effects_barrier()
    except Exception as error:
        assert f"routing.expert_ids: got -7 for {said}" in str(error), error
        print(name)
"""
    assert helpers.run_python(program, JAX_MOE_DEBUG="1") == "vmap\nbatch\n"
