"""Every format, family, sharding and scale convention, on checkpoints whose content the test chose."""

import dataclasses
import json
import os

import checkpoint_writer as writer
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import checkpoints, nvfp4

FAMILIES = tuple(writer.CONFIGS)
TOOLS = [(family, tool) for family in FAMILIES for tool in writer.SUFFIXES] + [
    ("llama4_text", "fused"),
    ("gpt_oss", "fused"),
]


def expected(layer: writer.Layer, experts: range) -> jax_moe.Experts:
    def stack(projection, field, dtype=None):
        return np.array([[getattr(matrix, field) for matrix in projection[expert]] for expert in experts], dtype)

    every = [matrix.input_scale for matrices in layer.gate_up for matrix in matrices]
    return jax_moe.Experts(
        jax_moe.Projection(
            stack(layer.gate_up, "payload"),
            stack(layer.gate_up, "block_scale"),
            stack(layer.gate_up, "global_scale"),
            max(every),
        ),
        jax_moe.Projection(
            *(stack(layer.down, f)[:, 0] for f in ("payload", "block_scale", "global_scale", "input_scale"))
        ),
    )


def assert_same(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        assert isinstance(ours, jax.Array), name
        theirs = np.asarray(theirs)
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == theirs.shape, name
        assert np.asarray(ours).tobytes() == theirs.tobytes(), name


@pytest.mark.parametrize(("family", "tool"), TOOLS)
@pytest.mark.parametrize("shards", [1, 3])
def test_experts_are_those_in_the_files(tmp_path, family, tool, shards):
    contents = writer.checkpoint(tmp_path, family, tool, layers=(1, 3), shards=shards)
    assert checkpoints.list_layers(tmp_path) == [1, 3]
    for number, layer in contents.items():
        assert_same(checkpoints.load_experts(tmp_path, number), expected(layer, range(4)))


@pytest.mark.parametrize("tool", [*writer.SUFFIXES, "fused"])
@pytest.mark.parametrize("chosen", [slice(1, 3), range(1, 3), slice(-1, None), slice(0, 1)])
def test_local_experts_have_the_input_scale_of_all(tmp_path, tool, chosen):
    layer = writer.checkpoint(tmp_path, "llama4_text", tool)[0]
    wanted = chosen if isinstance(chosen, range) else range(4)[chosen]
    assert_same(checkpoints.load_experts(tmp_path, 0, experts=chosen), expected(layer, wanted))


@pytest.mark.parametrize("tool", list(writer.SUFFIXES))
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_of_any_shape(tmp_path, tool, shape):
    layer = writer.checkpoint(tmp_path, tool=tool, scalar_shape=shape)[0]
    assert_same(checkpoints.load_experts(tmp_path, 0), expected(layer, range(4)))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1), (4, 1, 1), (4, 2)])
def test_fused_scalars_of_any_shape(tmp_path, shape):
    layer = writer.random_layer(0, 4, 2, 32, 48)
    tensors = writer.fused(layer, "llama4_text", 0)
    name = "model.layers.0.feed_forward.experts.gate_up_proj_weight_scale_2"
    values = np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)
    writer.write(tmp_path, writer.config_of("llama4_text", 4, 32, 48), tensors | {name: values})
    got = np.asarray(checkpoints.load_experts(tmp_path, 0).gate_up.global_scale)
    wide = values.reshape({1: (1, 1), 4: (4, 1), 8: (4, 2)}[values.size])
    np.testing.assert_array_equal(got, np.broadcast_to(wide, (4, 2)))


@pytest.mark.parametrize(("kind", "bad"), [("zero", 0.0), ("nan", np.nan), ("inf", np.inf), ("absent", None)])
def test_an_uncalibrated_expert_gets_the_largest_input_scale_and_a_warning(tmp_path, kind, bad):
    layer = writer.random_layer(0, 4, 2, 32, 48)
    tensors = writer.per_expert(layer, "qwen3_moe", "modelopt", 0)
    name = "model.layers.0.mlp.experts.2.down_proj.input_scale"
    if bad is None:
        del tensors[name]
    else:
        tensors[name] = np.float32(bad).reshape(())
    writer.write(tmp_path, writer.config_of("qwen3_moe", 4, 32, 48), tensors)
    with pytest.warns(UserWarning, match="1 input scales are missing"):
        got = checkpoints.load_experts(tmp_path, 0)
    want = [matrices[0].input_scale for matrices in layer.down]
    want[2] = max(want[:2] + want[3:])
    np.testing.assert_array_equal(got.down.input_scale, want)


def test_input_scales_of_fp8_activations_are_not_taken_for_nvfp4_ones(tmp_path):
    layer = writer.random_layer(0, 2, 2, 32, 48)
    config = writer.config_of("qwen3_moe", 2, 32, 48) | {"quantization_config": {"quant_algo": "W4A8_NVFP4_FP8"}}
    writer.write(tmp_path, config, writer.per_expert(layer, "qwen3_moe", "modelopt", 0))
    got = checkpoints.load_experts(tmp_path, 0)
    assert got.gate_up.input_scale is None
    assert got.down.input_scale is None


def test_a_mesh_gets_its_own_part_of_each_leaf(tmp_path):
    layer = writer.checkpoint(tmp_path, "gpt_oss", "fused", intermediate=64)[0]
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("expert", "tensor"))
    got = checkpoints.load_experts(tmp_path, 0, mesh=mesh)
    assert_same(got, expected(layer, range(4)))
    shardings = jax_moe.expert_shardings(got, mesh)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), got, shardings))
    )
    assert got.down.payload.addressable_shards[0].data.shape == (2, 32, 16)
    assert isinstance(got.gate_up.payload.sharding, NamedSharding)


def test_a_mesh_that_does_not_divide_the_experts_is_an_error(tmp_path):
    writer.checkpoint(tmp_path, experts=3)
    with pytest.raises(ValueError, match="expert_axis"):
        checkpoints.load_experts(tmp_path, 0, mesh=Mesh(np.array(jax.devices()[:2]), ("expert",)))


@pytest.mark.parametrize("chosen", [slice(0, 0), slice(0, 4, 2), range(2, 5), range(-1, 2), range(3, 0, -1)])
def test_experts_must_be_a_contiguous_part(tmp_path, chosen):
    writer.checkpoint(tmp_path)
    with pytest.raises(ValueError, match="experts: got"):
        checkpoints.load_experts(tmp_path, 0, experts=chosen)


def test_a_hugging_face_cache_of_links_to_blobs(tmp_path):
    """snapshots/<revision>/<file> -> ../../blobs/<hash>, as huggingface_hub lays it out."""
    layer = writer.checkpoint(tmp_path / "plain", shards=3)[0]
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        os.rename(file, blobs / f"{number:064x}")
        os.symlink(f"../../blobs/{number:064x}", snapshot / file.name)
    assert_same(checkpoints.load_experts(snapshot, 0), expected(layer, range(4)))


def test_files_without_an_index(tmp_path):
    layer = writer.checkpoint(tmp_path, shards=3)[0]
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(checkpoints.load_experts(tmp_path, 0), expected(layer, range(4)))


@pytest.mark.parametrize("family", FAMILIES)
def test_router_beside_the_experts(tmp_path, family):
    writer.checkpoint(tmp_path, family, "modelopt", layers=(2,))
    tensors = writer.router(family, 2, 4, 32)
    router = checkpoints.load_router(tmp_path, 2)
    for name, array in tensors.items():
        field = {"weight": "weight", "bias": "bias", "e_score_correction_bias": "selection_bias"}[name.split(".")[-1]]
        np.testing.assert_array_equal(getattr(router, field), array.astype(np.float32))
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    logits = x @ router.weight.T + (0 if router.bias is None else np.asarray(router.bias))
    want = jax_moe.route(jax.numpy.asarray(logits), 2, router.method, bias=router.selection_bias)
    got = jax.jit(lambda router, x: router(x))(router, x)
    np.testing.assert_array_equal(got.expert_ids, want.expert_ids)
    np.testing.assert_allclose(got.weights, want.weights, rtol=1e-5)


@pytest.mark.parametrize("stored", ["modelopt", "compressed-tensors", "bf16"])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama4_text", "nemotron_h"])
def test_shared_expert_is_gate_then_up_dequantised(tmp_path, family, stored):
    rng = np.random.default_rng(0)
    module = f"{writer.BLOCKS[family].format(0)}.shared_expert{'' if family == 'llama4_text' else 's'}."
    names = writer.PROJECTIONS.get(family, ("gate_proj", "up_proj", "down_proj"))
    shapes = [(80, 32)] * (len(names) - 1) + [(32, 80)]  # its intermediate size is its own
    tensors, dense = writer.router(family, 0, 4, 32), []
    for name, shape in zip(names, shapes, strict=True):
        matrix = writer.random_matrix(rng, *shape)
        scale = np.repeat(matrix.block_scale.astype(np.float32), 16, -1) * matrix.global_scale
        codes = np.stack([matrix.payload & 15, matrix.payload >> 4], -1).reshape(shape)
        dense.append((codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale).astype(writer.BF16))
        if stored == "bf16":
            tensors[f"{module}{name}.weight"] = dense[-1]
        else:
            layer = writer.Layer([[matrix]], [[matrix]])
            for key, array in writer.per_expert(layer, "nemotron_h", stored, 0).items():
                if ".up_proj." in key:
                    tensors[f"{module}{name}.{key.rpartition('.')[2]}"] = array
    tensors |= writer.per_expert(writer.random_layer(0, 4, len(names) - 1, 32, 48), family, "modelopt", 0)
    writer.write(tmp_path, writer.config_of(family, 4, 32, 48), tensors)
    shared = checkpoints.load_shared_expert(tmp_path, 0)
    np.testing.assert_array_equal(shared.gate_up, np.stack(dense[:-1]))
    np.testing.assert_array_equal(shared.down, dense[-1])
    x = rng.normal(size=(5, 32)).astype(writer.BF16)
    activation = checkpoints.moe_options(tmp_path)["activation"]
    parts = [x.astype(np.float32) @ part.astype(np.float32).T for part in dense[:-1]]
    h = np.asarray(activation(*parts)).astype(writer.BF16).astype(np.float32)
    np.testing.assert_allclose(
        shared(x, activation), h @ dense[-1].astype(np.float32).T, rtol=0.02, atol=0.02 * np.abs(h).max()
    )


def test_no_shared_expert(tmp_path):
    writer.checkpoint(tmp_path, "deepseek_v3")
    assert checkpoints.load_shared_expert(tmp_path, 0) is None
    writer.checkpoint(tmp_path, "mixtral")
    assert checkpoints.load_shared_expert(tmp_path, 0) is None


@pytest.mark.parametrize(
    ("family", "config", "method"),
    [
        ("qwen3_moe", {"norm_topk_prob": True}, jax_moe.Softmax(True)),
        ("qwen3_moe", {"norm_topk_prob": False}, jax_moe.Softmax(False)),
        ("mixtral", {}, jax_moe.Softmax(True)),
        ("gpt_oss", {}, jax_moe.Softmax(True)),
        ("llama4_text", {}, jax_moe.Llama4()),
        (
            "deepseek_v3",
            {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "norm_topk_prob": False},
            jax_moe.DeepSeekV3(num_groups=4, top_groups=2, scaling_factor=1.5, renormalize=False),
        ),
        (
            "nemotron_h",
            {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
            jax_moe.DeepSeekV3(num_groups=2, top_groups=1, scaling_factor=2.5, renormalize=True),
        ),
    ],
)
def test_routing_rule_and_k_from_the_config(tmp_path, family, config, method):
    writer.checkpoint(tmp_path, family, experts=8)
    config = writer.config_of(family, 8, 32, 48) | config | {"num_experts_per_tok": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    router = checkpoints.load_router(tmp_path, 0)
    assert router.method == method
    assert router.k == 3


@pytest.mark.parametrize(
    ("family", "config", "options"),
    [
        ("qwen3_moe", {"hidden_act": "silu"}, {"activation": jax_moe.SwiGLU(), "weight_on": "output"}),
        ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}, {"activation": jax_moe.GeGLU(), "weight_on": "output"}),
        ("nemotron_h", {}, {"activation": jax_moe.ReLU2(), "weight_on": "output"}),
        ("llama4_text", {}, {"activation": jax_moe.SwiGLU(), "weight_on": "input"}),
        ("gpt_oss", {}, {"activation": jax_moe.SwiGLU(1.702, 1.0, 7.0), "weight_on": "output"}),
        ("gpt_oss", {"swiglu_limit": 5.0}, {"activation": jax_moe.SwiGLU(1.702, 1.0, 5.0), "weight_on": "output"}),
    ],
)
def test_activation_and_weight_from_the_config(tmp_path, family, config, options):
    writer.checkpoint(tmp_path, family)
    (tmp_path / "config.json").write_text(json.dumps(writer.config_of(family, 4, 32, 48) | config))
    assert checkpoints.moe_options(tmp_path) == options


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_an_unknown_activation_is_an_error(tmp_path, family):
    writer.checkpoint(tmp_path, family)
    change = {"hidden_act": "tanh", "mlp_hidden_act": "tanh"}
    (tmp_path / "config.json").write_text(json.dumps(writer.config_of(family, 4, 32, 48) | change))
    with pytest.raises(checkpoints.CheckpointError, match="hidden_act: found 'tanh'"):
        checkpoints.moe_options(tmp_path)


# --- MXFP4 --------------------------------------------------------------------------------------------------------


def mxfp4(tmp_path, exponents: np.ndarray, payload: np.ndarray | None = None):
    """gpt-oss with one expert, whose gate has block scales 2^exponents ``[I, H/32]``; returns the loaded experts."""
    intermediate, blocks = exponents.shape
    hidden = 32 * blocks
    rng = np.random.default_rng(0)
    gate = rng.integers(0, 256, (intermediate, hidden // 2), dtype=np.uint8) if payload is None else payload
    up = rng.integers(0, 256, (intermediate, hidden // 2), dtype=np.uint8)
    down = rng.integers(0, 256, (1, hidden, intermediate // 32, 16), dtype=np.uint8)
    prefix = "model.layers.0.mlp.experts."
    both = np.stack([gate, up], 1).reshape(1, 2 * intermediate, blocks, 16)
    scales = np.stack([exponents + 127, np.full_like(exponents, 120)], 1).reshape(1, 2 * intermediate, blocks)
    tensors = {
        prefix + "gate_up_proj_blocks": both,
        prefix + "gate_up_proj_scales": scales.astype(np.uint8),
        prefix + "gate_up_proj_bias": rng.normal(size=(1, 2 * intermediate)).astype(writer.BF16),
        prefix + "down_proj_blocks": down,
        prefix + "down_proj_scales": np.full((1, hidden, intermediate // 32), 127, np.uint8),
        prefix + "down_proj_bias": rng.normal(size=(1, hidden)).astype(writer.BF16),
    }
    writer.write(tmp_path, writer.config_of("gpt_oss", 1, hidden, intermediate), tensors)
    return tensors, checkpoints.load_experts(tmp_path, 0)


def mx_values(payload: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    codes = np.stack([payload & 15, payload >> 4], -1).reshape(*payload.shape[:-1], -1)
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * np.repeat(2.0**exponents, 32, -1)


@pytest.mark.parametrize(
    ("top", "span"),
    [*((top, span) for top in (127, 8, 0, -60, -110) for span in (0, 1, 17)), (-119, 8), (-126, 1), (-127, 0)],
)
def test_mxfp4_is_exact_over_the_whole_range(tmp_path, top, span):
    exponents = top - np.random.default_rng(1).integers(0, span + 1, (32, 2))
    exponents[0, 0], exponents[1, 1] = top, top - span
    tensors, got = mxfp4(tmp_path, exponents)
    gate = got.gate_up.payload[0, 0]
    np.testing.assert_array_equal(
        gate, tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"][0, ::2].reshape(32, -1)
    )
    scale = np.repeat(np.asarray(got.gate_up.block_scale[0, 0]).astype(np.float64), 16, -1)
    values = np.asarray(nvfp4.e2m1_to_float(nvfp4.unpack(gate))).astype(np.float64) * scale
    np.testing.assert_array_equal(
        values * float(got.gate_up.global_scale[0, 0]), mx_values(np.asarray(gate), exponents)
    )
    assert float(got.gate_up.global_scale[0, 0]) >= 2.0**-126
    bias = tensors["model.layers.0.mlp.experts.gate_up_proj_bias"].astype(np.float32)
    np.testing.assert_array_equal(got.gate_up.bias[0], bias.reshape(-1, 2).T)


def test_mxfp4_beyond_the_range_says_so(tmp_path):
    exponents = np.zeros((32, 2), int)
    exponents[3, 1] = -18
    with pytest.raises(checkpoints.CheckpointError, match=r"gate_up_proj_scales.*expert 0.*2\^-18 to 2\^0"):
        mxfp4(tmp_path, exponents)


def test_mxfp4_blocks_of_zeros_have_no_say(tmp_path):
    exponents = np.zeros((32, 2), int)
    exponents[3, 1] = -127
    payload = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    payload[3, 16:] = 0x80  # zeros of both signs
    _, got = mxfp4(tmp_path, exponents, payload)
    assert got.gate_up.global_scale[0, 0] == 2.0**-8
    assert np.asarray(got.gate_up.block_scale[0, 0]).astype(np.float32)[3, 2] > 0  # keeps the sign of -0


def test_mxfp4_nan_scale_is_an_error(tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="NaN"):
        mxfp4(tmp_path, np.full((32, 2), 128))


def test_mxfp4_of_deepseek_v4_for_each_expert(tmp_path):
    """Two codes in an I8, and scales of dtype F8_E8M0."""
    rng = np.random.default_rng(0)
    tensors, want = writer.router("deepseek_v3", 0, 2, 32), {}
    for expert in range(2):
        for name, (rows, contraction) in {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}.items():
            at = f"model.layers.0.mlp.experts.{expert}.{name}."
            payload = rng.integers(0, 256, (rows, contraction // 2), dtype=np.uint8)
            exponents = rng.integers(-9, 8, (rows, contraction // 32))
            scale = (exponents + 127).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
            tensors |= {at + "weight": payload.view(np.int8), at + "scale": scale}
            want[expert, name] = mx_values(payload, exponents)
    writer.write(tmp_path, writer.config_of("deepseek_v3", 2, 32, 64), tensors)
    got = checkpoints.load_experts(tmp_path, 0)
    for expert in range(2):
        for part, name in enumerate(("gate_proj", "up_proj")):
            leaves = (
                leaf[expert, part] for leaf in (got.gate_up.payload, got.gate_up.block_scale, got.gate_up.global_scale)
            )
            np.testing.assert_array_equal(nvfp4.dequantize(*leaves), want[expert, name])
        leaves = (leaf[expert] for leaf in (got.down.payload, got.down.block_scale, got.down.global_scale))
        np.testing.assert_array_equal(nvfp4.dequantize(*leaves), want[expert, "down_proj"])


# --- layers that are not in 4 bits --------------------------------------------------------------------------------


def dense_layer(directory, model_type: str, stored: str, *, bias: bool = False) -> dict[str, np.ndarray]:
    """One layer in bf16 or FP8; returns its weights ``[E, N, C]`` and biases ``[E, N]`` in bfloat16, by projection."""
    rng = np.random.default_rng(0)
    names = writer.PROJECTIONS.get(model_type, ("gate_proj", "up_proj", "down_proj"))
    tensors, dense = writer.router(model_type, 0, 4, 32), {}
    for name in names:
        shape = (32, 48) if name == names[-1] else (48, 32)
        matrices, biases = [], []
        for expert in range(4):
            at = f"{writer.BLOCKS[model_type].format(0)}.experts.{expert}.{name}."
            weight = rng.normal(size=shape).astype(writer.BF16)
            if stored == "fp8":
                codes, scale = weight.astype(writer.E4M3), rng.random((shape[0], 1)).astype(np.float32)
                weight = (codes.astype(np.float32) * scale).astype(writer.BF16)
                tensors |= {at + "weight": codes, at + "weight_scale": scale}
            else:
                tensors[at + "weight"] = weight
            matrices.append(weight)
            biases.append(rng.normal(size=shape[0]).astype(writer.BF16))
            if bias:
                tensors[at + "bias"] = biases[-1]
        dense |= {name: np.stack(matrices), f"{name}.bias": np.stack(biases)}
    writer.write(directory, writer.config_of(model_type, 4, 32, 48), tensors)
    return dense


@pytest.mark.parametrize("stored", ["bf16", "fp8"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "nemotron_h"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_layer_is_quantised_as_quantize_experts_would(tmp_path, stored, model_type, bias):
    dense = dense_layer(tmp_path, model_type, stored, bias=bias)
    *gate, up, down = writer.PROJECTIONS.get(model_type, ("gate_proj", "up_proj", "down_proj"))
    biases = {"up_bias": dense[f"{up}.bias"], "down_bias": dense[f"{down}.bias"]} if bias else {}
    if bias and gate:
        biases["gate_bias"] = dense[f"{gate[0]}.bias"]
    want = jax_moe.quantize_experts(dense[gate[0]] if gate else None, dense[up], dense[down], **biases)
    assert_same(checkpoints.load_experts(tmp_path, 0, quantize=True), want)
    part = checkpoints.load_experts(tmp_path, 0, quantize=True, experts=slice(1, 3))
    assert_same(part, jax.tree.map(lambda leaf: leaf[1:3], want))
    with pytest.raises(checkpoints.CheckpointError, match=r"not in NVFP4 or MXFP4; load_experts\(..., quantize=True\)"):
        checkpoints.load_experts(tmp_path, 0)


def test_quantize_leaves_a_layer_in_4_bits_as_it_is(tmp_path):
    layer = writer.checkpoint(tmp_path)[0]
    assert_same(checkpoints.load_experts(tmp_path, 0, quantize=True), expected(layer, range(4)))


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "unexplained", "one bias", "int8"])
def test_a_dense_layer_that_does_not_fit_is_named(tmp_path, damage):
    dense_layer(tmp_path, "qwen3_moe", "bf16")
    at, config = "model.layers.0.mlp.experts.2.up_proj", writer.config_of("qwen3_moe", 4, 32, 48)
    tensors = {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": np.ones(
            (32, 48) if name == "down_proj" else (48, 32), writer.BF16
        )
        for e in range(4)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    tensors |= {
        "missing": {},
        "shape": {f"{at}.weight": np.ones((32, 48), writer.BF16)},
        "nan": {f"{at}.weight": np.full((48, 32), np.nan, writer.BF16)},
        "unexplained": {f"{at}.pre_quant_scale": np.ones(32, np.float32)},
        "one bias": {f"{at}.bias": np.ones(48, np.float32)},
        "int8": {f"{at}.weight": np.ones((48, 32), np.int64)},
    }[damage]
    if damage == "missing":
        del tensors[f"{at}.weight"]
    writer.write(tmp_path, config, tensors)
    with pytest.raises(checkpoints.CheckpointError, match=at.replace(".", r"\.")):
        checkpoints.load_experts(tmp_path, 0, quantize=True)


def test_a_router_made_by_hand_is_checked_when_it_is_called():
    router = checkpoints.Router(jnp.ones((4, 32)), k=2)
    assert router(jnp.ones((3, 32), jnp.bfloat16)).expert_ids.shape == (3, 2)
    for x, error, message in (
        (jnp.ones((3, 16)), ValueError, r"x: got shape \(3, 16\), needs \[..., 32\]"),
        (jnp.ones((3, 32), jnp.int32), TypeError, "x: got dtype int32, needs floats"),
        ([1.0], TypeError, "x: got list, needs an array"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            router(x)
    for change, message in (
        ({"weight": jnp.ones(32)}, r"Router.weight: got shape \(32,\), needs \[E, H\]"),
        ({"bias": jnp.ones(1)}, r"Router.bias: got shape \(1,\), needs \[4\]"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            dataclasses.replace(router, **change)(jnp.ones((3, 32)))


def test_a_shared_expert_is_checked_when_it_is_called():
    shared = checkpoints.SharedExpert(jnp.ones((2, 16, 32)), jnp.ones((32, 16)))
    x, activation = jnp.ones((3, 32)), jax_moe.SwiGLU()
    assert shared(x, activation).shape == x.shape
    with pytest.raises(ValueError, match=r"^x: got shape \(3, 16\), needs \[..., 32\]"):
        shared(x[:, :16], activation)
    with pytest.raises(ValueError, match=r"^SharedExpert.gate_up: got shape \(2, 16, 32\), needs \[1, I, H\]"):
        shared(x, jax_moe.ReLU2())
    with pytest.raises(ValueError, match=r"^SharedExpert.down: got shape \(16, 32\), needs \[32, 16\]"):
        checkpoints.SharedExpert(shared.gate_up, shared.down.T)(x, activation)
    with pytest.raises(TypeError, match=r"^activation: got str"):
        shared(x, "silu")
