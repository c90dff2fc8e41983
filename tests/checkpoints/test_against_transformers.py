"""Every family that transformers has: our router, experts and shared expert compute what its MoE block computes.

``blocks`` holds what ``generate_blocks.py`` wrote: one layer of each family, the config with every key and with the
sizes only (so that each router setting is a default of the family's configuration class), and transformers' results.
"""

from pathlib import Path
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import checkpoints

BLOCKS = Path(__file__).parent / "blocks"
CASES = sorted(path.parent.name for path in BLOCKS.glob("*/expected.npz"))


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture(params=["config.json", "minimal.json"])
def checkpoint(request, tmp_path, case):
    """A checkpoint directory with one MoE layer."""
    shutil.copy(BLOCKS / case / request.param, tmp_path / "config.json")
    (tmp_path / "model.safetensors").symlink_to(BLOCKS / case / "model.safetensors")
    return tmp_path


@pytest.fixture
def expected(case):
    return dict(np.load(BLOCKS / case / "expected.npz"))


def layer_of(checkpoint):
    (layer,) = checkpoints.list_layers(checkpoint)
    return layer


def route(checkpoint, expected):
    router = checkpoints.load_router(checkpoint, layer_of(checkpoint))
    tokens = (expected["token_ids"],) if "token_ids" in expected else ()
    return router(jnp.asarray(expected["x"], jnp.bfloat16), *tokens)


def test_router_chooses_and_weighs_as_transformers(checkpoint, expected):
    routing = route(checkpoint, expected)
    order = np.argsort(routing.expert_ids, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(routing.expert_ids), order, 1), expected["ids"])
    weights = np.take_along_axis(np.asarray(routing.weights), order, 1)
    np.testing.assert_allclose(weights, expected["weights"], rtol=1e-6)


def block_output(checkpoint, expected):
    layer, x = layer_of(checkpoint), jnp.asarray(expected["x"], jnp.bfloat16)
    options = checkpoints.moe_options(checkpoint, layer)
    shared_expert = checkpoints.load_shared_expert(checkpoint, layer)
    y = jax_moe.fused_moe(
        jnp.asarray(expected.get("x_experts", x), jnp.bfloat16),
        checkpoints.load_experts(checkpoint, layer),
        route(checkpoint, expected),
        **options,
        out_dtype=jnp.float32,
    )
    alone = shared_expert is None or "x_experts" in expected
    return y if alone else y + shared_expert(x, options["activation"])


def test_block_computes_what_transformers_computes(checkpoint, expected):
    y = block_output(checkpoint, expected)
    # The intermediate is rounded to bfloat16, by at most 2^-8 of each value and each way as often as the other; for
    # Llama-4 the input too. Nothing else is rounded to less than float32.
    assert np.linalg.norm(np.asarray(y) - expected["y"]) < 2**-8 * np.linalg.norm(expected["y"])
