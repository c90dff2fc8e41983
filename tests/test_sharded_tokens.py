"""``sharded_moe`` on tokens over several leading axes, however a mesh spreads them: the unsharded bits."""

import functools
import math

import helpers
from helpers import make_exact_case
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest
from test_sharded_moe import make_mesh

import jax_moe

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

LEADING = [
    # leading axes of x, how x is spread over them, mesh axes, names of axes
    ((4, 4), P("data", None, None), {"data": 2, "expert": 4}, {}),
    ((4, 4), P(None, "data", None), {"data": 2, "expert": 4}, {}),
    ((4, 2, 2), P(None, None, "data", None), {"data": 2, "tensor": 4}, {}),
    ((4, 4), P("a", "b", None), {"a": 2, "b": 2, "expert": 2}, {"data_axis": ("a", "b")}),
    ((4, 4), P("b", "a", None), {"a": 2, "b": 2, "expert": 2}, {"data_axis": ("a", "b")}),
    ((4, 4), P(None, "expert", None), {"expert": 4}, {"data_axis": "expert"}),
    ((4, 4), P("expert", "tensor", None), {"expert": 2, "tensor": 4}, {"data_axis": ("expert", "tensor")}),
    ((4, 4), P("expert", None, None), {"data": 2, "expert": 4}, {}),  # over an axis that is not for tokens
    ((4, 4), P(), {"data": 2, "expert": 4}, {}),
    ((16,), P("data", None), {"data": 2, "expert": 4}, {}),
]


@pytest.mark.parametrize(
    ("wrap", "axis_type"),
    [(jax.jit, AUTO), (jax.jit, EXPLICIT), (lambda f: f, EXPLICIT)],
    ids=["jit", "jit, explicit", "eager, explicit"],
)
@pytest.mark.parametrize(("leading", "spec", "axes", "names"), LEADING, ids=str)
def test_tokens_of_any_leading_axes(leading, spec, axes, names, wrap, axis_type):
    """The same bits, wherever a batch or a sequence is sharded."""
    case = make_exact_case(6)
    expected = case.run()
    mesh = make_mesh(axis_type, **axes)
    tokens = jax.tree.map(lambda a: a.reshape(*leading, a.shape[-1]), (case.x, case.routing))
    x, routing = jax.device_put(tokens, NamedSharding(mesh, spec))
    experts = jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh))
    with jax.set_mesh(mesh):
        run = wrap(functools.partial(jax_moe.sharded_moe, mesh=mesh, **names, **case.options))
        y = run(x, experts, routing)
    assert y.shape == x.shape
    helpers.assert_bit_equal(np.asarray(y).reshape(expected.shape), expected)
    data_axes = names.get("data_axis", "data")
    if axis_type is EXPLICIT and sorted(jax.tree.leaves(tuple(spec))) == sorted(jax.tree.leaves(data_axes)):
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)  # and no token has moved


@pytest.mark.parametrize(("leading", "data"), [((2, 4), 8), ((3, 2), 2), ((6, 1), 2), ((2, 3, 4), 8)], ids=str)
def test_leading_axes_that_only_together_are_divided(leading, data):
    case = make_exact_case(7, tokens=math.prod(leading))
    mesh = make_mesh(data=data)
    x, routing = jax.tree.map(lambda a: a.reshape(*leading, a.shape[-1]), (case.x, case.routing))
    y = jax.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, **case.options))(x, case.experts, routing)
    helpers.assert_bit_equal(np.asarray(y).reshape(-1, 64), case.run())


def test_other_leading_axes_are_refused():
    case = make_exact_case(8)
    with pytest.raises(ValueError, match=r"x, routing.expert_ids: got shapes \(2, 8, 64\) and \(16, 4\)"):
        jax_moe.sharded_moe(case.x.reshape(2, 8, 64), case.experts, case.routing, mesh=make_mesh(expert=4))
