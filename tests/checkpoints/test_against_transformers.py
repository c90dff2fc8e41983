"""Every family that transformers has: our router, experts and shared expert compute what its MoE block computes.

``blocks`` holds what ``generate_blocks.py`` wrote: one layer of each family, the config with every key and with the
sizes only (so that each router setting is a default of the family's configuration class), and transformers' results.
"""

import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys

import config_variants
import generate_blocks
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import checkpoints

BLOCKS = Path(__file__).parent / "blocks"
CASES = sorted(generate_blocks.CASES)
CONFIGS = ["config.json", "minimal.json"]
MISSING = [module for module in ("torch", "transformers") if importlib.util.find_spec(module) is None]


def checkpoint(blocks, case, config, directory):
    """A checkpoint directory with one MoE layer."""
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").symlink_to((blocks / case / "model.safetensors").resolve())
    return directory


def read_config(blocks, case, file):
    return json.loads((blocks / case / file).read_text())


def text_part(config):
    config = config.get("thinker_config", config)
    return config.get("text_config", config)


def results(blocks, case):
    return dict(np.load(blocks / case / "expected.npz"))


def layer_of(directory):
    (layer,) = checkpoints.list_layers(directory)
    return layer


def route(directory, expected):
    """Our routing with ids in ascending order, and as it came."""
    router = checkpoints.load_router(directory, layer_of(directory))
    token_ids = [jnp.asarray(expected["token_ids"])] if "token_ids" in expected else []
    routing = router(jnp.asarray(expected["x"], jnp.bfloat16), *token_ids)
    order = np.argsort(routing.expert_ids, axis=1)
    ids, weights = (np.take_along_axis(np.asarray(a), order, 1) for a in (routing.expert_ids, routing.weights))
    return ids, weights, routing


def check_routing(directory, expected):
    ids, weights, _ = route(directory, expected)
    np.testing.assert_array_equal(ids, expected["ids"])
    # Logits are exact. A softmax or sigmoid in float32, a sum of k of them and a quotient: a few units of 2^-24.
    np.testing.assert_allclose(weights, expected["weights"], rtol=1e-6)


def check_block(directory, expected):
    """Experts on the router's choice, and the shared expert where it has the same input."""
    layer, x = layer_of(directory), jnp.asarray(expected["x"], jnp.bfloat16)
    options = checkpoints.moe_options(directory, layer)
    experts = checkpoints.load_experts(directory, layer)
    shared_expert = checkpoints.load_shared_expert(directory, layer)
    _, _, routing = route(directory, expected)
    experts_read = jnp.asarray(expected.get("x_experts", x), jnp.bfloat16)
    y = jax_moe.fused_moe(experts_read, experts, routing, **options, out_dtype=jnp.float32)
    if shared_expert is not None and "x_experts" not in expected:
        y += shared_expert(x, options["activation"])
    check_close(y, expected["y"])


def check_close(y, expected):
    # The intermediate is rounded to bfloat16, by at most 2^-8 of each value and each way as often as the other; for
    # Llama-4 the input too. Nothing else is rounded to less than float32.
    assert np.linalg.norm(np.asarray(y) - expected) < 2**-8 * np.linalg.norm(expected)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_router_chooses_and_weighs_as_transformers(tmp_path, case, config):
    directory = checkpoint(BLOCKS, case, read_config(BLOCKS, case, config), tmp_path)
    check_routing(directory, results(BLOCKS, case))


@pytest.mark.parametrize("case", CASES)
def test_number_of_experts_per_token_may_be_the_familys_default(tmp_path, case):
    config = read_config(BLOCKS, case, "minimal.json")
    (key,) = text_part(config).keys() & set(generate_blocks.K_KEYS)
    del text_part(config)[key]
    directory = checkpoint(BLOCKS, case, config, tmp_path)
    if case in ("dots1", "gemma4"):  # their configuration classes have none
        with pytest.raises(checkpoints.CheckpointError, match=r"num_experts_per_tok|top_k_experts"):
            checkpoints.load_router(directory, layer_of(directory))
    else:
        check_routing(directory, results(BLOCKS, case))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_block_computes_what_transformers_computes(tmp_path, case, config):
    directory = checkpoint(BLOCKS, case, read_config(BLOCKS, case, config), tmp_path)
    check_block(directory, results(BLOCKS, case))


@pytest.mark.parametrize("case", CASES)
def test_flax_module_is_the_block_or_is_refused(tmp_path, case):
    """Refused where the block is no function of one x: projections or norms between router and experts."""
    nn = pytest.importorskip("jax_moe.nn")
    expected = results(BLOCKS, case)
    directory = checkpoint(BLOCKS, case, read_config(BLOCKS, case, "config.json"), tmp_path)
    if "x_experts" in expected:
        with pytest.raises(checkpoints.CheckpointError, match="one by one"):
            nn.MoE.from_checkpoint(directory, layer_of(directory), progress=False)
        return
    module = nn.MoE.from_checkpoint(directory, layer_of(directory), progress=False)
    token_ids = jnp.asarray(expected["token_ids"]) if "token_ids" in expected else None
    check_close(module(jnp.asarray(expected["x"]), token_ids), expected["y"])


def variants():
    """Case, change of the config, and what transformers computes then; not those that it refuses itself."""
    for case, changes in config_variants.VARIANTS.items():
        stored = dict(np.load(BLOCKS / case / "variants.npz"))
        for number, change in enumerate(changes):
            found = {key.split(".")[1]: value for key, value in stored.items() if key.split(".")[0] == str(number)}
            if found:
                yield pytest.param(case, change, found, id=f"{case}-{change}")


@pytest.mark.parametrize(("case", "change", "found"), list(variants()))
def test_settings_mean_what_transformers_takes_them_for(tmp_path, case, change, found):
    """Or they are refused, by name: nulls, names that contradict each other, rules that we do not have."""
    config = read_config(BLOCKS, case, "minimal.json")
    text = text_part(config)
    for key, value in change.items():
        text.pop(key, None)
        if value != config_variants.REMOVE:
            text[key] = value
    directory = checkpoint(BLOCKS, case, config, tmp_path)
    if config_variants.refused(case, change):
        with pytest.raises(checkpoints.CheckpointError, match="|".join((*change, "topk_group", "num_experts_per_tok"))):
            load_everything(directory)
        return
    tokens = results(BLOCKS, case)
    inputs = {key: tokens[key][found["tokens"]] for key in ("x", "token_ids") if key in tokens}
    check_routing(directory, inputs | found)
    if "y" in found:
        check_block(directory, inputs | found)


def load_everything(directory):
    layer = layer_of(directory)
    checkpoints.load_router(directory, layer)
    checkpoints.moe_options(directory, layer)
    checkpoints.load_experts(directory, layer)


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("case", CASES)
def test_what_transformers_computes_now(tmp_path, case):
    """The same where torch and transformers are installed (``pip install .[checkpoint-tests]``), in their versions."""
    command = [sys.executable, str(Path(generate_blocks.__file__)), str(tmp_path / "now"), case]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stderr[-3000:]
    for config in CONFIGS:
        directory = tmp_path / config.partition(".")[0]
        directory.mkdir()
        checkpoint(tmp_path / "now", case, read_config(tmp_path / "now", case, config), directory)
        check_routing(directory, results(tmp_path / "now", case))
        check_block(directory, results(tmp_path / "now", case))
