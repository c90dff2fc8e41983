"""Checkpoints as the real tools wrote them (``generate.py``): our weights are the tool's, our layer transformers'."""

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import checkpoints, nvfp4

DATA = Path(__file__).parent / "data"
CASES = sorted(path.name for path in DATA.iterdir())


def expected(case: str) -> dict:
    return json.loads((DATA / case / "expected.json").read_text())


def layers(case: str) -> list[int]:
    return sorted({int(name.split(".")[0]) for name in expected(case)["sha256"]})


def parts(experts: jax_moe.Experts) -> dict[str, jax_moe.Projection]:
    """Gate, up and down, each [E, N, C]."""
    names = ("gate", "up") if experts.gate_up.payload.shape[1] == 2 else ("up",)
    leaves = ("payload", "block_scale", "global_scale")
    found = {
        name: jax_moe.Projection(*(getattr(experts.gate_up, leaf)[:, index] for leaf in leaves))
        for index, name in enumerate(names)
    }
    return found | {"down": experts.down}


@pytest.mark.parametrize("case", CASES)
def test_dequantised_weights_are_the_tools_own_bit_for_bit(case):
    digests = expected(case)["sha256"]
    for layer in layers(case):
        for name, projection in parts(checkpoints.load_experts(DATA / case, layer)).items():
            scale = projection.global_scale[:, None]
            dense = nvfp4.dequantize(projection.payload, projection.block_scale, scale, jnp.bfloat16) + 0  # -0 is 0
            assert hashlib.sha256(np.asarray(dense).tobytes()).hexdigest() == digests.pop(f"{layer}.{name}"), name
    assert not digests


@pytest.mark.parametrize("case", CASES)
def test_layer_agrees_with_transformers_on_the_decompressed_weights(case):
    arrays = np.load(DATA / case / "expected.npz")
    for layer in layers(case):
        x = jnp.asarray(arrays[f"x{layer}"], jnp.bfloat16)
        routing = checkpoints.load_router(DATA / case, layer)(x)
        experts = checkpoints.load_experts(DATA / case, layer)
        y = jax_moe.fused_moe(x, experts, routing, **checkpoints.moe_options(DATA / case), out_dtype=jnp.float32)
        # Two matrices of bfloat16 weights there and bfloat16 intermediates (and for Llama-4 inputs) here: four
        # independent roundings of at most 2^-9, of which 3 * 2^-9 leaves room for their sum and for nothing else.
        error = np.linalg.norm(np.asarray(y) - arrays[f"y{layer}"]) / np.linalg.norm(arrays[f"y{layer}"])
        assert error < 3 * 2**-9
