"""``jax_moe.steady`` against float64: its values, its derivatives, what it does at the ends."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import steady

# Dense near zero, where a sigmoid or a logarithm cancels, and out to where float32 ends.
_X = np.float32(np.concatenate([[0.0, -0.0], *[s * np.geomspace(1e-30, 400, 4001) for s in (1, -1)]]))
_SMALLEST = np.finfo(np.float32).tiny


def _exp(x):
    return np.exp(-np.abs(np.float64(x)))


FUNCTIONS = {
    "exp_of_difference": (lambda x: steady.exp_of_difference(-jnp.abs(x), jnp.zeros_like(x)), _exp),
    "sigmoid": (steady.sigmoid, lambda x: np.where(x < 0, _exp(x), 1) / (1 + _exp(x))),
    "softplus": (steady.softplus, lambda x: np.logaddexp(np.float64(x), 0)),
    "square_root": (lambda x: steady.square_root(jnp.abs(x)), lambda x: np.sqrt(np.abs(np.float64(x)))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_within_two_units_in_the_last_place(name):
    function, definition = FUNCTIONS[name]
    got, expected = np.float64(function(jnp.asarray(_X))), definition(_X)
    # What would be subnormal is 0; a sigmoid's numerator already is where that is less than twice the smallest number.
    at_least_normal = expected > 2 * _SMALLEST
    assert (got[~at_least_normal] <= 2 * _SMALLEST).all()
    error = np.abs(got - expected)[at_least_normal] / np.spacing(np.float32(expected))[at_least_normal]
    assert error.max() < (0.51 if name == "square_root" else 2)


def test_quotients_are_rounded_as_ieee_does():
    rng = np.random.default_rng(0)
    a, b = np.float32(rng.uniform(0, 1, (64, 33))), np.float32(rng.uniform(1, 64, (64, 1)))
    np.testing.assert_array_equal(steady.quotient(jnp.asarray(a), jnp.asarray(b)), a / b)
    np.testing.assert_array_equal(steady.quotient(jnp.asarray(a[:1]), jnp.asarray(b[:1])), a[:1] / b[:1])


def test_sums_are_rounded_once():
    values = np.float32(np.random.default_rng(1).uniform(0, 1, (50, 512)) ** 8)
    values[:, 0] = 1
    got = np.asarray(steady.sum_of_parts(jnp.asarray(values)))
    exact = values.astype(np.float64).sum(1, keepdims=True)
    assert np.abs(got - exact).max() <= np.spacing(np.float32(exact)).max() * 0.501
    shuffled = values[:, np.random.default_rng(2).permutation(512)]
    np.testing.assert_array_equal(steady.sum_of_parts(jnp.asarray(shuffled)), got)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


@pytest.mark.parametrize("name", ["softmax", "sum_of_parts", "quotient", "square_root"])
def test_what_leaves_float64_is_rounded_before_the_conversion(name):
    """XLA's GPU backend drops a conversion to float32 that another converts back; no CPU does (steady._rounded)."""
    x = jax.ShapeDtypeStruct((3, 8), jnp.float32)
    jaxpr = jax.make_jaxpr(getattr(steady, name))(*[x] * (2 if name == "quotient" else 1)).jaxpr
    made_by = {variable: equation.primitive.name for equation in _equations(jaxpr) for variable in equation.outvars}
    narrowed = [
        equation.invars[0]
        for equation in _equations(jaxpr)
        if equation.primitive.name == "convert_element_type"
        and equation.invars[0].aval.shape  # constants are scalars
        and (equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype) == (jnp.float64, jnp.float32)
    ]
    assert narrowed
    assert {made_by.get(variable) for variable in narrowed} == {"reduce_precision"}


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "softmax"])
def test_nan_gives_nan_and_infinity_does_not(name):
    function = getattr(steady, name)
    assert np.isnan(function(jnp.float32([[0, 1, jnp.nan, 2]]))[0, 2])
    assert np.isfinite(function(jnp.float32([[0, 1, 1e30, -1e30]]))).all()
    if name == "softmax":
        assert np.isnan(function(jnp.float32([[0, 1, jnp.nan, 2]]))).all()
        np.testing.assert_array_equal(function(jnp.float32([[1e30, -1e30, jnp.inf, 0]])), [[0.5, 0, 0.5, 0]])


def test_derivatives_are_those_of_jax_nn():
    x = jnp.float32([[-30, -3, -1e-3, 0, 1e-3, 0.5, 2, 30]])
    pairs = (
        (steady.sigmoid, jax.nn.sigmoid),
        (steady.softplus, jax.nn.softplus),
        (lambda x: jnp.sin(steady.softmax(x)), lambda x: jnp.sin(jax.nn.softmax(x))),
        (lambda x: steady.square_root(jnp.exp(x)), lambda x: jnp.sqrt(jnp.exp(x))),
    )

    @jax.jit
    def derivatives(x):
        gradient = lambda function: jax.grad(lambda x: (function(x) * jnp.arange(8)).sum())(x)  # noqa: E731
        at_zero = jax.grad(lambda x: steady.square_root(x).sum())(jnp.zeros(2))
        return [(gradient(ours), gradient(theirs)) for ours, theirs in pairs], at_zero

    results, at_zero = derivatives(x)
    for got, expected in results:
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-12)
    np.testing.assert_array_equal(at_zero, 0)
