"""``examples/generate.py`` and ``qwen3_moe.py``: a whole model computes what transformers computes.

Two chains, each with a bound of its own. ``checkpoints/qwen3_reference.py``, float64 NumPy, is compared with logits that
transformers computed in float32 (``checkpoints/generate_models.py`` stored them): nothing but float32 sums lie between.
The example is compared with that reference, rounding where the example says that it rounds; and with transformers.
"""

import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import checkpoint_writer as writer
import generate_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwen3_reference
from typer.testing import CliRunner

from jax_moe import checkpoints, ffi, nvfp4
from jax_moe.checkpoints import files

ROOT = pathlib.Path(__file__).parents[1]
MODELS = pathlib.Path(__file__).parent / "checkpoints" / "models"
CASES = sorted(generate_models.CASES)
BF16_EXPERTS = "modelopt-qwen3_moe-experts"
LAYERS = generate_models.SIZES["num_hidden_layers"]
PROMPT = generate_models.PROMPT

REFERENCE = 2**-16
"""float32 sums of up to 128 products, in two layers: units of 2^-24, a few hundred of them at most."""
DIRECT = 2**-11
"""The example in float32 and a reference that rounds at the same places: of the values that both round to bfloat16, by up
to 2^-8 each, not one in 64 lies so near the middle between two that a float32 sum in another order decides."""
SITES = {jnp.float32: 2, jnp.bfloat16: 8}
"""Roundings in a layer: x of the experts and their intermediate; also x, query, key, value, probability and output of the
attention. Each is of 2^-8 at most and of either sign, so together they are 2^-8 times the root of their number."""


@pytest.fixture(scope="module", autouse=True)
def _examples():
    sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
    yield
    del sys.path[:2]


@pytest.fixture(scope="module")
def qwen3(_examples):
    return importlib.import_module("qwen3_moe")


@pytest.fixture(scope="module")
def generate(_examples):
    return importlib.import_module("generate")


@pytest.fixture(scope="module")
def loaded(qwen3):
    """Each case's parameters in float32, in a list of layers, and its config: read once."""
    return {case: qwen3.load(MODELS / case, dtype=jnp.float32) for case in CASES}


def expected(case):
    return dict(np.load(MODELS / case / "expected.npz"))


def reference(directory, renormalize=True, tied=False) -> qwen3_reference.Model:
    """Weights by the public loaders, which tests of their own compare with the tools' decompression."""
    checkpoint = checkpoints.open_model(directory)

    def matrix(name):
        return np.asarray(checkpoints.load_linear(checkpoint, name), np.float64)

    def norm(name):
        return np.asarray(checkpoints.load_tensor(checkpoint, f"{name}.weight"), np.float64)

    def experts(projection):
        scale = projection.global_scale[..., None]
        return np.asarray(nvfp4.dequantize(projection.payload, projection.block_scale, scale), np.float64)

    layers = []
    for number in range(LAYERS):
        prefix = f"model.layers.{number}"
        loaded = checkpoints.load_experts(checkpoint, number)
        layers.append({
            "attention_norm": norm(f"{prefix}.input_layernorm"),
            "moe_norm": norm(f"{prefix}.post_attention_layernorm"),
            "query": matrix(f"{prefix}.self_attn.q_proj"),
            "key": matrix(f"{prefix}.self_attn.k_proj"),
            "value": matrix(f"{prefix}.self_attn.v_proj"),
            "output": matrix(f"{prefix}.self_attn.o_proj"),
            "query_norm": norm(f"{prefix}.self_attn.q_norm"),
            "key_norm": norm(f"{prefix}.self_attn.k_norm"),
            "router": matrix(f"{prefix}.mlp.gate"),
            "gate_up": experts(loaded.gate_up),
            "down": experts(loaded.down),
        })  # fmt: skip
    embed = matrix("model.embed_tokens")
    sizes = generate_models.SIZES
    return qwen3_reference.Model(
        embed,
        embed if tied else matrix("lm_head"),
        norm("model.norm"),
        layers,
        sizes["num_attention_heads"],
        sizes["num_key_value_heads"],
        sizes["num_experts_per_tok"],
        renormalize,
        sizes["rope_parameters"]["rope_theta"],
        1e-6,
    )


def to_bfloat16(place, values):
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def experts_to_bfloat16(place, values):
    return to_bfloat16(place, values) if place in ("moe_x", "intermediate") else values


def compute(qwen3, params, config, tokens):
    """Logits ``[B, S, V]`` of the example."""
    moe = qwen3.moe_layer()
    x, _ = jax.jit(lambda params, tokens: qwen3.forward(params, tokens, moe, config))(params, tokens)
    return np.asarray(qwen3.logits(params, x))


def error(actual, wanted) -> float:
    """Relative, of the position where it is largest: a mistake at one position is not lost among the others."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return float((np.linalg.norm(actual - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).max())


# --- Logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_transformers(case):
    wanted = expected(case)
    model = reference(MODELS / case)
    assert error([model.logits(tokens) for tokens in wanted["tokens"]], wanted["logits"]) < REFERENCE


@pytest.mark.parametrize("form", ["list", "stack"])
@pytest.mark.parametrize("case", CASES)
def test_logits_in_float32(qwen3, loaded, case, form):
    wanted = expected(case)
    params, config = loaded[case]
    if form == "stack":
        params = params | {"layers": qwen3.stack_layers(iter(params["layers"]), LAYERS)}
    actual = compute(qwen3, params, config, wanted["tokens"])
    model = reference(MODELS / case)
    rounded = [model.logits(tokens, experts_to_bfloat16) for tokens in wanted["tokens"]]
    assert error(actual, rounded) < DIRECT
    total = np.linalg.norm(actual - wanted["logits"]) / np.linalg.norm(wanted["logits"])
    assert total < 2**-8 * (LAYERS * SITES[jnp.float32]) ** 0.5


@pytest.mark.parametrize("case", CASES)
def test_logits_in_bfloat16(qwen3, case):
    wanted = expected(case)
    params, config = qwen3.load(MODELS / case, stack=True)
    actual = compute(qwen3, params, config, wanted["tokens"])
    total = np.linalg.norm(actual - wanted["logits"]) / np.linalg.norm(wanted["logits"])
    assert total < 2**-8 * (LAYERS * SITES[jnp.bfloat16] + 1) ** 0.5  # one for what the last product reads


MUTANTS = {
    "rope turns the other way": lambda m, p, c: m.setattr("rotate", lambda x, at, theta, f=m.rotate: f(x, -at, theta)),
    "rope pairs neighbours": lambda m, p, c: m.setattr(
        "rotate",
        lambda x, at, theta, f=m.rotate: f(x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape), at, theta),
    ),
    "rope has another base": lambda m, p, c: c.update(theta=c["theta"] * 1.1),
    "rope starts at 1 for keys": None,
    "no mask": None,
    "one norm without its weight": lambda m, p, c: p["layers"][1].update(query_norm=jnp.ones(32)),
    "keys are not normalised": None,
    "an epsilon of 1e-2": lambda m, p, c: c.update(norm_eps=1e-2),
    "heads read the wrong keys": None,
    "the router does not renormalise": None,
    "one expert fewer": None,
    "the last norm is left out": None,
}


def test_placeholder():
    pass
