"""Routers against plain NumPy statements of their definitions, ties included."""

from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from statement import sigmoid

import jax_moe
from jax_moe import DeepSeekV3, Llama4, Sigmoid, Softmax


def best(scores, k):
    """Indices of the k largest, the largest first, the lower index first where they are equal."""
    return np.argsort(-scores, kind="stable")[:k]


def state(logits, k, method, bias=None):
    """One token's expert ids and float64 weights, as the definition has it."""
    logits = np.asarray(logits, np.float64)
    match method:
        case Softmax(renormalize):
            exponentials = np.exp(logits - logits.max())
            ids = best(logits, k)
            weights = exponentials[ids] / (exponentials[ids] if renormalize else exponentials).sum()
        case Sigmoid(renormalize):
            ids = best(logits, k)
            weights = sigmoid(logits[ids])
            weights = weights / weights.sum() if renormalize else weights
        case Llama4():
            ids = best(logits, k)
            weights = sigmoid(logits[ids])
        case DeepSeekV3(groups, top_groups, factor, renormalize):
            # Selection looks at float32 scores: what is a tie and what is not is decided there.
            scores = np.asarray(jax.nn.sigmoid(jnp.asarray(logits, jnp.float32)))
            biased = (scores if bias is None else scores + np.float32(bias)).reshape(groups, -1)
            group_scores = np.sort(biased, axis=1)[:, ::-1][:, :2].sum(1)
            kept = best(group_scores, top_groups)
            allowed = np.full_like(biased, -np.inf)
            allowed[kept] = biased[kept]
            ids = best(allowed.ravel(), k)
            weights = sigmoid(logits[ids])
            weights = factor * (weights / weights.sum() if renormalize else weights)
    return ids, weights


def assert_routes(logits, k, method, bias=None):
    array = None if bias is None else jnp.asarray(bias, jnp.float32)
    routing = jax_moe.route(jnp.asarray(logits), k, method, bias=array)
    assert (routing.expert_ids.dtype, routing.weights.dtype) == (jnp.int32, jnp.float32)
    assert routing.expert_ids.shape == routing.weights.shape == (len(logits), k)
    for token, row in enumerate(np.asarray(logits, np.float32)):
        ids, weights = state(row, k, method, bias)
        np.testing.assert_array_equal(routing.expert_ids[token], ids)
        np.testing.assert_allclose(routing.weights[token], weights, rtol=1e-6)


METHODS = [
    Softmax(), Softmax(renormalize=False), Sigmoid(), Sigmoid(renormalize=True), Llama4(),
    DeepSeekV3(num_groups=4, top_groups=2),
    DeepSeekV3(num_groups=2, top_groups=2, scaling_factor=1.0, renormalize=False),
    DeepSeekV3(num_groups=1, top_groups=1),
    DeepSeekV3(num_groups=8, top_groups=4),  # groups of one
]  # fmt: skip

# Quarters: few different values, so that most examples have ties, and different logits have clearly different scores.
_LOGITS = hnp.arrays(np.float32, (6, 8), elements=st.integers(-8, 8).map(lambda n: n / 4))


@pytest.mark.parametrize("method", METHODS, ids=str)
@settings(max_examples=20)
@given(logits=_LOGITS, k=st.integers(1, 4))
def test_routes_as_defined(method, logits, k):
    assert_routes(logits, k, method)


@pytest.mark.parametrize("method", [m for m in METHODS if isinstance(m, DeepSeekV3)], ids=str)
@settings(max_examples=20)
@given(logits=_LOGITS, bias=hnp.arrays(np.float32, (8,), elements=st.integers(-8, 8).map(lambda n: n / 4)))
def test_a_bias_selects_but_does_not_weigh(method, logits, bias):
    assert_routes(logits, 3, method, bias)


@pytest.mark.parametrize("method", METHODS[:6], ids=str)
def test_equal_logits_go_to_the_lowest_experts(method):
    routing = jax_moe.route(jnp.zeros((3, 16)), 4, method)
    np.testing.assert_array_equal(routing.expert_ids, [[0, 1, 2, 3]] * 3)


def test_equal_groups_go_to_the_lowest_group():
    """Groups 0 and 2 tie for the last place. Group 3 is best by its two largest, not by its sum."""
    score = np.float32([[-1, 1, 0, -8], [2, -8, -8, -8], [1, -1, -8, 0], [1.5, 1.5, -8, -8]]).reshape(1, 16)
    method = DeepSeekV3(num_groups=4, top_groups=2)
    assert_routes(score, 3, method)
    np.testing.assert_array_equal(jax_moe.route(jnp.asarray(score), 3, method).expert_ids, [[12, 13, 1]])


def test_a_negative_biased_score_beats_a_dropped_group():
    """A zero in place of -inf for dropped experts would choose them here."""
    logits = np.zeros((1, 4), np.float32)
    assert_routes(logits, 2, DeepSeekV3(num_groups=2, top_groups=1), np.float32([-2, -3, -9, -9]))


@pytest.mark.parametrize("method", [m for m in METHODS if m != METHODS[5]], ids=str)
def test_all_experts(method):
    rng = np.random.default_rng(0)
    logits = rng.integers(-8, 8, (4, 8)).astype(np.float32) / 4
    if isinstance(method, DeepSeekV3) and method.top_groups < method.num_groups:
        with pytest.raises(ValueError, match="top_groups"):
            jax_moe.route(jnp.asarray(logits), 8, method)
    else:
        assert_routes(logits, 8, method)


@pytest.mark.parametrize("method", [*METHODS[:5], DeepSeekV3(num_groups=1, top_groups=1)], ids=str)
def test_one_expert(method):
    assert_routes(np.float32([[-3.0], [0.0], [5.0]]), 1, method)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_no_tokens(method):
    routing = jax_moe.route(jnp.zeros((0, 8)), 2, method)
    assert routing.expert_ids.shape == routing.weights.shape == (0, 2)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("leading", [(), (2, 3), (2, 1, 3), (2, 0)], ids=str)
def test_any_leading_axes(method, leading):
    """Tokens are routed one by one, however they are arranged."""
    bias = jnp.linspace(-1, 1, 8) if isinstance(method, DeepSeekV3) else None
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(*leading, 8)), jnp.float32)
    routing = jax_moe.route(logits, 3, method, bias=bias)
    flat = jax_moe.route(logits.reshape(-1, 8), 3, method, bias=bias)
    np.testing.assert_array_equal(routing.expert_ids, flat.expert_ids.reshape(*leading, 3))
    np.testing.assert_array_equal(routing.weights, flat.weights.reshape(*leading, 3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_computed_in_float32(dtype):
    logits = jnp.asarray(np.random.default_rng(1).integers(-30, 30, (5, 8)) / 8, dtype)
    assert_routes(np.asarray(logits, np.float32), 3, Softmax())
    wide = jax_moe.route(logits.astype(jnp.float32), 3)
    np.testing.assert_array_equal(jax_moe.route(logits, 3).weights, wide.weights)


def test_defaults_are_deepseek_v3s():
    assert DeepSeekV3() == DeepSeekV3(num_groups=8, top_groups=4, scaling_factor=2.5, renormalize=True)


def test_routes_under_jit_and_scan():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 8)), jnp.float32)
    _, routings = jax.lax.scan(lambda _, row: (None, jax_moe.route(row, 2)), None, logits)
    for layer in range(3):
        expected = jax.jit(jax_moe.route, static_argnames=("k", "method"))(logits[layer], k=2, method=Softmax())
        np.testing.assert_array_equal(routings.expert_ids[layer], expected.expert_ids)
        np.testing.assert_allclose(routings.weights[layer], expected.weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: got 0, needs 1 <= k <= E = 8"),
        ({"k": 9}, ValueError, "k: got 9"),
        ({"k": -1}, ValueError, "k: got -1"),
        ({"k": 2.0}, TypeError, "k: got 2.0"),
        ({"k": "2"}, TypeError, "k: got"),
        ({"logits": jnp.zeros((2, 8), jnp.int32)}, TypeError, "logits: got dtype int32, needs floats"),
        ({"logits": jnp.float32(0)}, ValueError, r"logits: got shape \(\), needs \[..., E\]"),
        ({"logits": [[0.0] * 8]}, TypeError, "logits: got list"),
        ({"method": "softmax"}, TypeError, "method: got 'softmax'"),
        ({"method": Softmax}, TypeError, "method: got"),
        ({"bias": jnp.zeros(8)}, ValueError, "bias: got an array, but Softmax"),
        ({"method": METHODS[5], "bias": jnp.zeros(4)}, ValueError, r"bias: got shape \(4,\), needs \[8\]"),
        ({"method": METHODS[5], "bias": [0.0] * 8}, TypeError, "bias: got list"),
        ({"method": METHODS[5], "bias": jnp.zeros(8, jnp.int32)}, TypeError, "bias: got dtype int32, needs floats"),
        ({"method": DeepSeekV3(num_groups=3)}, ValueError, "num_groups: got 3"),
        ({"method": DeepSeekV3(num_groups=0)}, ValueError, "num_groups: got 0"),
        ({"method": DeepSeekV3(num_groups=4, top_groups=5)}, ValueError, "top_groups: got 5"),
        ({"method": DeepSeekV3(num_groups=4, top_groups=0)}, ValueError, "top_groups: got 0"),
        ({"method": DeepSeekV3(num_groups=4, top_groups=1), "k": 3}, ValueError, "top_groups: got 1.*k = 3"),
    ],
    ids=str,
)
def test_refuses(change, error, message):
    arguments = {"logits": jnp.zeros((2, 8)), "k": 2} | change
    with pytest.raises(error, match=message):
        jax_moe.route(**arguments)


@pytest.mark.parametrize("method", [Sigmoid(renormalize=True), DeepSeekV3(num_groups=1, top_groups=1)])
def test_renormalising_vanished_sigmoids_is_no_nan(method):
    routing = jax_moe.route(jnp.full((1, 4), -200.0), 2, method)
    np.testing.assert_array_equal(routing.weights, 0)
