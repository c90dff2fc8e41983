"""Peak memory of loading a layer, as the kernel counts it: at most 1.15 times the result (1.3 is promised)."""

import sys

import checkpoint_writer as writer
import helpers
import numpy as np
import pytest

EXPERTS, HIDDEN, INTERMEDIATE = 64, 1024, 768

LOAD = """
import sys
import jax
from jax_moe import checkpoints
jax.block_until_ready(jax.device_put(jax.numpy.ones(8)))  # the backend's own memory is not the loader's
checkpoints.load_experts(sys.argv[2], 0, progress=False)  # nor is what the first call imports and compiles
start = resident()
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
experts = checkpoints.load_experts(sys.argv[1], 0, experts=eval(sys.argv[3]), progress=False)
jax.block_until_ready(experts)
result = sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
print(peak() - start, result)
"""
STATUS = """
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def resident(): return status("VmRSS")
def peak(): return status("VmHWM")
"""


def big(model_type: str, tool: str) -> dict[str, np.ndarray]:
    """One layer of 85 MB; every expert is the same object, so that writing it costs nothing."""
    rng = np.random.default_rng(0)
    gate_up = [writer.random_matrix(rng, INTERMEDIATE, HIDDEN) for _ in range(2)]
    layer = writer.Layer([gate_up] * EXPERTS, [[writer.random_matrix(rng, HIDDEN, INTERMEDIATE)]] * EXPERTS)
    if tool == "fused":
        return writer.fused(layer, model_type, 0)
    return writer.per_expert(layer, model_type, tool, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("chosen", ["None", "slice(16, 48)"])
@pytest.mark.parametrize(
    ("model_type", "tool", "shards"),
    [("qwen3_moe", "modelopt", 1), ("qwen3_moe", "compressed-tensors", 4), ("llama4_text", "fused", 1)],
)
def test_loading_a_layer_needs_little_more_than_the_layer(tmp_path, model_type, tool, shards, chosen):
    writer.write(
        tmp_path / "big", writer.config_of(model_type, EXPERTS, HIDDEN, INTERMEDIATE), big(model_type, tool), shards
    )
    writer.checkpoint(tmp_path / "small", model_type, tool)
    grown, result = map(int, helpers.run_python(STATUS + LOAD, tmp_path / "big", tmp_path / "small", chosen).split())
    assert result > 30 * 2**20
    print(f"peak {grown / result:.3f} of the result")
    assert grown < 1.15 * result, f"{grown / result:.3f} times the result"
