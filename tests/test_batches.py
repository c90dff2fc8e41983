"""Tokens in any arrangement: leading axes, vmap and what is made of it; all equal to the op on a list of tokens."""

import dataclasses

import helpers
from helpers import make_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import reference


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
