"""``jax_moe.nn.MoE``: the module is its parts, alone and over a mesh, and it comes from a checkpoint in one call."""

from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np
import pytest

import jax_moe
from jax_moe import checkpoints

nnx = pytest.importorskip("flax.nnx", reason="flax is not installed; jax_moe.nn needs it")
from jax_moe.nn import MoE, Quantized  # noqa: E402

DATA = Path(__file__).parent / "checkpoints" / "data"
CASES = sorted(path.name for path in DATA.iterdir())


def tokens(count: int, hidden: int = 64, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, hidden)), dtype)


def by_hand(directory: Path, layer: int, x: jax.Array, **options) -> np.ndarray:
    """The layer from its parts, in float32."""
    experts, router = checkpoints.load_experts(directory, layer), checkpoints.load_router(directory, layer)
    family = checkpoints.moe_options(directory)
    y = jax_moe.fused_moe(x.astype(jnp.bfloat16), experts, router(x), **family, **options, out_dtype=jnp.float32)
    shared = checkpoints.load_shared_expert(directory, layer)
    return np.asarray(y if shared is None else y + shared(x, family["activation"]))


@pytest.mark.parametrize("case", CASES)
def test_a_module_from_a_checkpoint_is_the_layer(case):
    for layer in checkpoints.list_layers(DATA / case):
        module = MoE.from_checkpoint(DATA / case, layer, combine="ordered")
        x = tokens(6, dtype=jnp.float32)
        y = nnx.jit(lambda module, x: module(x))(module, x.reshape(2, 3, 64))
        assert y.shape == (2, 3, 64)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(
            y.reshape(6, 64), by_hand(DATA / case, layer, x, combine="ordered"), rtol=1e-4, atol=1e-5
        )
        assert module(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("axes", [{"expert": 4}, {"tensor": 2}, {"expert": 2, "tensor": 2}, {"expert": 2, "data": 2}])
def test_over_a_mesh_it_computes_the_same_and_moves_no_weights(axes):
    case = DATA / "modelopt-deepseek_v3"
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(list(axes.values())))]).reshape(tuple(axes.values())), tuple(axes))
    module = MoE.from_checkpoint(case, 1, mesh=mesh)
    assert (
        module.experts.gate_up.payload[...].sharding.spec
        == jax_moe.expert_shardings(checkpoints.load_experts(case, 1), mesh).gate_up.payload.spec
    )
    x = tokens(8, dtype=jnp.float32)
    run = nnx.jit(lambda module, x: module(x))
    np.testing.assert_allclose(run(module, x), by_hand(case, 1, x), rtol=1e-4, atol=1e-5)
    graph, state = nnx.split(module)
    hlo = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).compile().as_text()
    assert not [line for line in hlo.splitlines() if "all-gather" in line and "u8[" in line]


def test_variables_carry_their_partition_specs():
    module = MoE.from_checkpoint(DATA / "modelopt-deepseek_v3", 1)
    specs = nnx.get_partition_spec(nnx.state(module))
    flat = {jax.tree_util.keystr(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(
        specs, is_leaf=lambda node: isinstance(node, PartitionSpec))}  # fmt: skip
    payload = next(spec for name, spec in flat.items() if "gate_up" in name and "payload" in name)
    assert payload == PartitionSpec(("expert",), None, ("tensor",), None)
    assert isinstance(module.experts.down.payload, Quantized)
    assert len(jax.tree.leaves(nnx.state(module, Quantized))) == 8
    assert len(jax.tree.leaves(nnx.state(module, nnx.Param))) == 4


def test_w4a4_from_the_checkpoints_own_input_scales():
    case = DATA / "llmcompressor-qwen3_moe"
    x = tokens(5)
    module = MoE.from_checkpoint(case, 0, precision="w4a4", combine="ordered")
    np.testing.assert_allclose(
        np.asarray(module(x), np.float32),
        by_hand(case, 0, x, precision="w4a4", combine="ordered"),
        rtol=2**-7,
        atol=1e-5,
    )


def test_state_round_trip():
    module = MoE.from_checkpoint(DATA / "llmcompressor-gpt_oss", 0)
    graph, state = nnx.split(module)
    again = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    np.testing.assert_array_equal(np.asarray(module(tokens(3)), np.float32), np.asarray(again(tokens(3)), np.float32))


def test_the_core_does_not_import_flax():
    helpers.run_python("import sys, jax_moe, jax_moe.checkpoints; assert not [m for m in sys.modules if 'flax' in m]")


def test_the_decoder_layer_example_agrees_with_transformers():
    """What the recording cannot tell: that attention, norms and residuals around the module are transformers' too."""
    example = Path(__file__).parents[1] / "examples" / "qwen3_layer.py"
    printed = helpers.run_python(f"import runpy; runpy.run_path({str(example)!r}, run_name='__main__')", COLUMNS="200")
    error = float(printed.split("relative error")[1].split()[0])
    assert 0 < error < 3 * 2**-8  # inputs, gate, up and intermediate are rounded to bfloat16, over a residual
