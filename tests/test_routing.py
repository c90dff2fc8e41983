"""Routers against plain NumPy statements of their definitions, ties included."""

from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from statement import sigmoid

import jax_moe
from jax_moe import DeepSeekV2, DeepSeekV3, Llama4, Sigmoid, Softmax, SparseMixer


def best(scores, k):
    """Indices of the k largest, the largest first, the lower index first where they are equal."""
    return np.argsort(-scores, kind="stable")[:k]


def score(logits, kind):
    """float64 scores of one token."""
    match kind:
        case "sigmoid":
            return sigmoid(logits)
        case "softmax":
            exponentials = np.exp(logits - logits.max())
            return exponentials / exponentials.sum()
        case "sqrtsoftplus":
            return np.sqrt(np.logaddexp(logits, 0))


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
        case DeepSeekV2(groups, top_groups, factor, renormalize, kind) | DeepSeekV3(
            groups, top_groups, factor, renormalize, kind
        ):
            # Selection looks at float32 scores: what is a tie and what is not is decided there.
            scores = np.float32(score(logits, kind))
            biased = (scores if bias is None else scores + np.float32(bias)).reshape(groups, -1)
            best_in_group = 1 if isinstance(method, DeepSeekV2) else 2
            group_scores = np.sort(biased, axis=1)[:, ::-1][:, :best_in_group].sum(1)
            kept = best(group_scores, top_groups)
            allowed = np.full_like(biased, -np.inf)
            allowed[kept] = biased[kept]
            ids = best(allowed.ravel(), k)
            weights = score(logits, kind)[ids]
            weights = factor * (weights / weights.sum() if renormalize else weights)
        case SparseMixer(jitter):
            rest, ids, weights = logits.copy(), [], []
            for _ in range(2):
                ids.append(int(np.argmax(rest)))
                largest = rest[ids[-1]]
                near = [
                    z
                    for expert, z in enumerate(logits)
                    if expert not in ids[:-1] and not (largest - z) > 2 * jitter * max(abs(z), largest)
                ]
                weights.append(1 / np.exp(np.array(near) - largest).sum())
                rest[ids[-1]] = -np.inf
            ids, weights = np.array(ids), np.array(weights)
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
    DeepSeekV3(num_groups=4, top_groups=2, scores="softmax"),
    DeepSeekV3(num_groups=1, top_groups=1, scores="sqrtsoftplus", scaling_factor=1.5),
    DeepSeekV2(num_groups=4, top_groups=2), DeepSeekV2(num_groups=1, top_groups=1, scores="sigmoid", renormalize=True),
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


@pytest.mark.parametrize("method", [*METHODS[:6], DeepSeekV2(num_groups=4, top_groups=2)], ids=str)
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
    if isinstance(method, DeepSeekV2 | DeepSeekV3) and method.top_groups < method.num_groups:
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


@settings(max_examples=20)
@given(
    logits=hnp.arrays(np.float32, (6, 8), elements=st.integers(-64, 64).map(lambda n: n / 64)),
    jitter=st.sampled_from([0.01, 0.07, 0.3]),
)
def test_sparse_mixer_routes_as_defined(logits, jitter):
    """Jitters far from the distance of any two sixty-fourths, so that no rounding decides which experts are near."""
    assert_routes(logits, 2, SparseMixer(jitter))


def test_sparse_mixer_weighs_among_near_experts():
    """By hand: 10 and 9.9 are near 10, and once 10 is taken, 9.85 is near 9.9; 5 never is."""
    routing = jax_moe.route(jnp.float32([[5, 9.9, 10, 9.85]]), 2, SparseMixer(0.01))
    np.testing.assert_array_equal(routing.expert_ids, [[2, 1]])
    weights = [1 / (1 + np.exp(-0.1) + np.exp(-0.15)), 1 / (1 + np.exp(-0.05))]
    np.testing.assert_allclose(routing.weights, [weights], rtol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, SparseMixer()], ids=str)
def test_no_intermediate_is_nan_or_infinite(method):
    """Extreme and equal logits under JAX's own detectors; eager, so that every operation is looked at."""
    logits = jnp.float32([[0] * 8, [-200] * 8, [200] * 4 + [-200] * 4, [-1, -1, -1, 0, -1, -1, -1, -1]])
    with jax.debug_infs(True), jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
        weights, pullback = jax.vjp(lambda logits: jax_moe.route(logits, 2, method).weights, logits)
        (gradient,) = pullback(jnp.ones_like(weights))
    assert np.isfinite(weights).all()
    assert np.isfinite(gradient).all()


def test_defaults_are_deepseek_v2s():
    assert DeepSeekV2() == DeepSeekV2(8, 3, scaling_factor=16.0, renormalize=False, scores="softmax")


def test_defaults_are_deepseek_v3s():
    assert DeepSeekV3() == DeepSeekV3(8, 4, scaling_factor=2.5, renormalize=True, scores="sigmoid")


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
        ({"method": DeepSeekV2(1, 1), "bias": jnp.zeros(8)}, ValueError, "bias: got an array, but DeepSeekV2"),
        ({"method": SparseMixer(), "bias": jnp.zeros(8)}, ValueError, "bias: got an array, but SparseMixer"),
        ({"method": SparseMixer(), "k": 3}, ValueError, "k: got 3, needs 2"),
        ({"method": DeepSeekV3(1, 1, scores="relu")}, ValueError, "method.scores: got 'relu'"),
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


@pytest.mark.parametrize(
    "method", [Sigmoid(renormalize=True), DeepSeekV3(1, 1), DeepSeekV3(1, 1, scores="sqrtsoftplus")]
)
def test_renormalising_vanished_sigmoids_is_no_nan(method):
    routing = jax_moe.route(jnp.full((1, 4), -200.0), 2, method)
    np.testing.assert_array_equal(routing.weights, 0)
