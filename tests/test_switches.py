"""Every verb gives under each of JAX's own switches what it gives without."""

import helpers
from helpers import make_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import reference

SWITCHES = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "tracer leaks": lambda: jax.checking_leaks(),
    "disable_jit": lambda: jax.disable_jit(),
}

CASE = make_case(0, tokens=4, bias=True, out_dtype=jnp.float32)
X, EXPERTS, ROUTING = CASE.x, CASE.experts, CASE.routing
LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
BIAS = jnp.linspace(-1, 1, 4)
PREPARED = jax_moe.prepare(EXPERTS, "sm_90a")
MESH = jax.sharding.Mesh(jax.devices()[:1], ("expert",))


def _dense():
    rng = np.random.default_rng(1)
    matrices = [rng.normal(size=shape).astype(np.float32) for shape in ((2, 32, 48), (2, 32, 48), (2, 48, 32))]
    matrices[0][0, 0, 0] = 0
    matrices[1][1] = 0  # an expert without a scale
    return matrices


def _loss(x, weights):
    return jax_moe.fused_moe(x, EXPERTS, jax_moe.Routing(ROUTING.expert_ids, weights), out_dtype=jnp.float32).sum()


VERBS = {
    "route": lambda: [
        jax_moe.route(LOGITS, 2, method)
        for method in (jax_moe.Softmax(), jax_moe.Sigmoid(True), jax_moe.Llama4())
    ],
    "route with groups": lambda: jax_moe.route(LOGITS[None], 2, jax_moe.DeepSeekV3(2, 1), bias=BIAS),
    "fused_moe": lambda: jax_moe.fused_moe(X, EXPERTS, ROUTING),
    "fused_moe of a batch, w4a4": lambda: jax_moe.fused_moe(
        X[None], EXPERTS, jax.tree.map(lambda a: a[None], ROUTING), precision="w4a4", weight_on="input"
    ),
    "sharded_moe": lambda: jax_moe.sharded_moe(X, EXPERTS, ROUTING, mesh=MESH),
    "reference": lambda: reference.fused_moe(X, EXPERTS, ROUTING, precision="w4a4", weight_on="input"),
    "calibrate": lambda: jax_moe.calibrate(helpers.without_input_scales(EXPERTS), X, ROUTING),
    "quantize_experts": lambda: jax_moe.quantize_experts(*_dense(), progress=False),
    "prepare": lambda: jax_moe.prepare(EXPERTS, "sm_90a", progress=False),
    "unprepare": lambda: jax_moe.unprepare(PREPARED, 48, 32),
    "vmap": lambda: jax.vmap(lambda x, routing: jax_moe.fused_moe(x, EXPERTS, routing))(
        X[None], jax.tree.map(lambda a: a[None], ROUTING)
    ),
    "grad": lambda: jax.grad(_loss, (0, 1))(X, ROUTING.weights),
}  # fmt: skip

EXPECTED = {}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_nothing(switch, verb):
    if verb not in EXPECTED:
        EXPECTED[verb] = VERBS[verb]()
    with SWITCHES[switch]():
        got = VERBS[verb]()
    for actual, expected in zip(jax.tree.leaves(got), jax.tree.leaves(EXPECTED[verb]), strict=True):
        assert actual.dtype == expected.dtype
        # Without jit XLA may order a sum in another way; everything else has the same bits.
        tolerance = 1e-6 if switch == "disable_jit" and actual.dtype in (jnp.float32, jnp.bfloat16) else 0
        np.testing.assert_allclose(np.asarray(actual, np.float32), np.asarray(expected, np.float32), rtol=tolerance)


NAN = X.at[1, 3].set(jnp.nan)
FINDS = {
    "fused_moe": lambda x: jax_moe.fused_moe(x, EXPERTS, ROUTING),
    "under jit": jax.jit(lambda x: jax_moe.fused_moe(x, EXPERTS, ROUTING)),
    "under vmap": lambda x: jax.vmap(lambda x: jax_moe.fused_moe(x, EXPERTS, ROUTING))(x[None]),
    "sharded_moe": lambda x: jax_moe.sharded_moe(x, EXPERTS, ROUTING, mesh=MESH),
    "sharded_moe under jit": jax.jit(lambda x: jax_moe.sharded_moe(x, EXPERTS, ROUTING, mesh=MESH)),
    "grad": lambda x: jax.grad(_loss)(x, ROUTING.weights),
    "grad under jit": lambda x: jax.jit(jax.grad(_loss))(x, ROUTING.weights),
}


@pytest.mark.parametrize("call", FINDS)
def test_a_nan_is_found(call):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        FINDS[call](NAN)
    FINDS[call](NAN)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_infinity_is_found(wrap):
    call = wrap(lambda weights: jax_moe.fused_moe(X, EXPERTS, jax_moe.Routing(ROUTING.expert_ids, weights)))
    with jax.debug_infs(True):
        call(ROUTING.weights)
        with pytest.raises(FloatingPointError, match="inf"):
            call(ROUTING.weights.at[1].set(jnp.array([3e38, 0])))  # overflows where |y| > 1.13, and is nowhere a NaN
