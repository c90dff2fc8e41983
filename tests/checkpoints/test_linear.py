"""Linear layers beside the experts: every format, dequantised; nothing left out, nothing that is not a number."""

import hashlib
import json
from pathlib import Path

import checkpoint_writer as writer
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_moe
from jax_moe import checkpoints, nvfp4

MODULE = "model.layers.0.self_attn.q_proj"
N, C = 200, 320  # of no block size a multiple, but of 16 and 32
E8M0 = ml_dtypes.float8_e8m0fnu


def codes(rng, shape=(N, C)) -> np.ndarray:
    """Every e4m3 number, at random."""
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    return rng.choice(finite, shape).view(writer.E4M3)


def powers(rng, shape) -> np.ndarray:
    return rng.integers(110, 130, shape, dtype=np.uint8)


def scales(rng, shape) -> np.ndarray:
    return np.exp(rng.normal(-5, 1, shape)).astype(np.float32)


# The scale's name, its values, and how many rows and columns of the weight each is for.
FP8 = {
    "per tensor": ("weight_scale", lambda rng: scales(rng, ()), (N, C)),
    "per tensor, one value": ("weight_scale", lambda rng: scales(rng, (1,)), (N, C)),
    "per channel": ("weight_scale", lambda rng: scales(rng, (N,)), (1, C)),
    "per channel, a column": ("weight_scale", lambda rng: scales(rng, (N, 1)), (1, C)),
    "per channel, bf16": ("weight_scale", lambda rng: scales(rng, (N, 1)).astype(writer.BF16), (1, C)),
    "blocks (DeepSeek-V3)": ("weight_scale_inv", lambda rng: scales(rng, (2, 3)), (128, 128)),
    "blocks, bf16": ("weight_scale_inv", lambda rng: scales(rng, (2, 3)).astype(writer.BF16), (128, 128)),
    "blocks (ModelOpt)": ("weight_scale", lambda rng: scales(rng, (2, 1, 3, 1)), (128, 128)),
    "blocks, e8m0 (DeepSeek-V4)": ("scale", lambda rng: powers(rng, (2, 3)).view(E8M0), (128, 128)),
    "MXFP8": ("weight_scale", lambda rng: powers(rng, (N, C // 32)), (1, 32)),
    "MXFP8, inverse by name": ("weight_scale_inv", lambda rng: powers(rng, (N, C // 32)), (1, 32)),
}


def in_float64(scale: np.ndarray) -> np.ndarray:
    return np.exp2(scale.astype(np.float64) - 127) if scale.dtype == np.uint8 else scale.astype(np.float64)


def spread(scale: np.ndarray, block: tuple[int, int], shape=(N, C)) -> np.ndarray:
    """float64 scales of every value."""
    grid = in_float64(scale).reshape([-(-n // b) for n, b in zip(shape, block, strict=True)])
    return np.kron(grid, np.ones(block))[: shape[0], : shape[1]]


def rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(writer.BF16)


def write(directory, tensors, config=None) -> None:
    config = writer.config_of("qwen3_moe", 4, 32, 48) if config is None else config
    writer.write(directory, config, {f"{MODULE}.{name}": np.asarray(value) for name, value in tensors.items()})


def assert_bits(got: jax.Array, want: np.ndarray) -> None:
    assert isinstance(got, jax.Array)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert np.asarray(got).tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", FP8)
def test_fp8_is_code_times_scale(tmp_path, kind):
    rng = np.random.default_rng(0)
    name, draw, block = FP8[kind]
    weight, scale = codes(rng), draw(rng)
    write(tmp_path, {"weight": weight, name: scale, "input_scale": np.float32(0.5)})
    assert_bits(checkpoints.load_linear(tmp_path, MODULE), rounded(weight.astype(np.float64) * spread(scale, block)))


def test_fp8_of_many_rows_is_read_in_pieces(tmp_path):
    rng = np.random.default_rng(1)
    weight, scale = codes(rng, (2500, 16)), scales(rng, (20, 1))
    write(tmp_path, {"weight": weight, "weight_scale_inv": scale})
    want = rounded(weight.astype(np.float64) * spread(scale, (128, 128), weight.shape))
    assert_bits(checkpoints.load_linear(tmp_path, MODULE), want)


def test_compressed_tensors_own_files():
    """As it wrote them (generate_linears.py), against its own decompression."""
    data = Path(__file__).parent / "linears"
    digests = json.loads((data / "expected.json").read_text())["sha256"]
    for module, digest in digests.items():
        weight = checkpoints.load_linear(data, module)
        assert hashlib.sha256(np.asarray(weight).tobytes()).hexdigest() == digest, module
    assert len(digests) == 3


@pytest.mark.parametrize("tool", writer.SUFFIXES)
@pytest.mark.parametrize("bias", [False, True])
def test_nvfp4_with_and_without_a_bias(tmp_path, tool, bias):
    rng = np.random.default_rng(2)
    matrix = writer.random_matrix(rng, 96, 64)
    scale = 1 / matrix.global_scale if tool == "compressed-tensors" else matrix.global_scale
    tensors = dict(
        zip(writer.SUFFIXES[tool], (matrix.payload, matrix.block_scale, np.float32(scale), np.float32(1)), strict=True)
    )
    values = rng.normal(size=96).astype(writer.BF16)
    write(tmp_path, tensors | ({"bias": values} if bias else {}))
    pairs = np.stack([matrix.payload & 15, matrix.payload >> 4], -1).reshape(96, 64)
    dense = pairs.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * spread(matrix.block_scale, (1, 16), (96, 64))
    assert_bits(checkpoints.load_linear(tmp_path, MODULE), rounded(dense * float(matrix.global_scale)))
    if bias:  # the documented way to it
        assert_bits(checkpoints.load_tensor(tmp_path, f"{MODULE}.bias"), values)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, writer.BF16])
def test_floats_are_rounded_once(tmp_path, dtype):
    weight = np.random.default_rng(3).normal(size=(2500, 20)).astype(dtype)
    write(
        tmp_path, {"weight": weight, "bias": np.zeros(2500, dtype), "k_scale": np.float32(1), "k_bias": np.float32(1)}
    )
    assert_bits(checkpoints.load_linear(tmp_path, MODULE), weight.astype(writer.BF16))


def changed(array, index, value) -> np.ndarray:
    array = np.array(array)
    array[index] = value
    return array


RNG = np.random.default_rng(4)
GOOD = {"weight": codes(RNG), "weight_scale": scales(RNG, (N, 1))}
BF16 = {"weight": np.ones((N, C), writer.BF16)}
MX = {"weight": codes(RNG), "weight_scale": powers(RNG, (N, C // 32))}
WRONG = {
    "a NaN weight": (GOOD | {"weight": changed(GOOD["weight"], (199, 3), np.nan)}, "weight", "NaN"),
    "a NaN scale": (GOOD | {"weight_scale": changed(GOOD["weight_scale"], 5, np.nan)}, "weight_scale", "nan"),
    "an infinite scale": (GOOD | {"weight_scale": changed(GOOD["weight_scale"], 5, np.inf)}, "weight_scale", "inf"),
    "a NaN e8m0 scale": (MX | {"weight_scale": changed(MX["weight_scale"], (199, 9), 255)}, "weight_scale", "255"),
    "a NaN bias": (GOOD | {"bias": changed(np.ones(N, np.float32), 7, np.nan)}, "bias", "nan"),
    "a NaN bf16 weight": ({"weight": changed(BF16["weight"], (150, 1), np.nan)}, "weight", "nan"),
    "an infinite bf16 weight": ({"weight": changed(BF16["weight"], (150, 1), -np.inf)}, "weight", "-inf"),
    "a scale for every third row": (GOOD | {"weight_scale": scales(RNG, (67, 1))}, "weight_scale", r"F32 \[67, 1\]"),
    "an integer scale": (GOOD | {"weight_scale": np.ones((), np.int64)}, "weight_scale", "I64"),
    "no scale": ({"weight": GOOD["weight"]}, "weight", "with 0 scales"),
    "two scales": (GOOD | {"weight_scale_inv": np.float32(1)}, "weight", "with 2 scales"),
    "a bias of another size": (BF16 | {"bias": np.ones(C, np.float32)}, "bias", r"F32 \[320\]"),
    "AWQ's scale of x": (GOOD | {"pre_quant_scale": np.ones(C, np.float32)}, "pre_quant_scale", "does not have"),
    "a residual of low rank": (BF16 | {"svdquant_lora_a": np.ones((2, C), writer.BF16)}, "svdquant_lora_a", "does not"),
    "a zero point": (GOOD | {"weight_zero_point": np.ones(N, np.float32)}, "weight_zero_point", "does not have"),
    "int8": ({"weight": np.ones((N, C), np.int8), "weight_scale": scales(RNG, (N, 1))}, "weight", "I8"),
    "one axis": ({"weight": np.ones(N, writer.BF16)}, "weight", r"BF16 \[200\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path, name):
    tensors, tensor, reason = WRONG[name]
    write(tmp_path, tensors)
    with pytest.raises(checkpoints.CheckpointError, match=reason) as error:
        checkpoints.load_linear(tmp_path, MODULE)
    assert f"{tmp_path / 'model.safetensors'}: {MODULE}.{tensor}: " in str(error.value)


def test_a_nvfp4_linear_with_a_nan_block_scale_is_named(tmp_path):
    matrix = writer.random_matrix(np.random.default_rng(5), 96, 64)
    scale = changed(matrix.block_scale.view(np.uint8), (95, 3), 0x7F).view(writer.E4M3)
    write(tmp_path, {"weight": matrix.payload, "weight_scale": scale, "weight_scale_2": np.float32(1)})
    with pytest.raises(checkpoints.CheckpointError, match=r"q_proj\.weight_scale: .*block scale of nan"):
        checkpoints.load_linear(tmp_path, MODULE)


def test_fp8_shared_experts_stand_beside_nvfp4_experts(tmp_path):
    """Nemotron-3-Super's recipe: NVFP4 experts keep their input scales, the FP8 shared expert becomes bfloat16."""
    rng = np.random.default_rng(6)
    block = writer.BLOCKS["nemotron_h"].format(1)
    layer = writer.random_layer(1, 4, 1, 32, 48)
    tensors = writer.per_expert(layer, "nemotron_h", "modelopt", 1) | writer.router("nemotron_h", 1, 4, 32)
    want = {}
    for name, shape in (("up_proj", (80, 32)), ("down_proj", (32, 80))):
        weight, scale = codes(rng, shape), scales(rng, ())
        at = f"{block}.shared_experts.{name}."
        tensors |= {at + "weight": weight, at + "weight_scale": scale, at + "input_scale": np.ones((), np.float32)}
        want[name] = rounded(weight.astype(np.float64) * float(scale))
    layers = {f"{block}.experts.{e}.{n}": {"quant_algo": "NVFP4"} for e in range(4) for n in ("up_proj", "down_proj")}
    layers |= {f"{block}.shared_experts.{name}": {"quant_algo": "FP8"} for name in want}
    writer.write(tmp_path, writer.config_of("nemotron_h", 4, 32, 48), tensors)
    quantization = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    shared = checkpoints.load_shared_expert(tmp_path, 1)
    assert_bits(shared.gate_up, want["up_proj"][None])
    assert_bits(shared.down, want["down_proj"])
    scale = max(matrix.input_scale for matrices in layer.gate_up for matrix in matrices)
    assert checkpoints.load_experts(tmp_path, 1).gate_up.input_scale == scale
    assert checkpoints.moe_options(tmp_path)["activation"] == jax_moe.ReLU2()


TOOLS = ["modelopt-qwen3_moe", "llmcompressor-qwen3_moe", "modelopt-qwen3_moe-mxfp4"]


@pytest.mark.parametrize("case", TOOLS)
def test_a_projection_of_a_tools_file_is_what_load_linear_widens(case):
    directory = Path(__file__).parent / "data" / case
    for name in ("q_proj", "o_proj"):
        module = f"model.layers.0.self_attn.{name}"
        projection = checkpoints.load_projection(directory, module)
        values = nvfp4.dequantize(projection.payload, projection.block_scale, projection.global_scale)
        widened = checkpoints.load_linear(directory, module)
        np.testing.assert_array_equal(np.asarray(values.astype(jnp.bfloat16)), np.asarray(widened))
        assert projection.global_scale.shape == ()
        assert (projection.input_scale is None) == case.endswith("mxfp4")
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, widened.shape[1])), jnp.bfloat16)
        y = jax_moe.linear(x, projection, out_dtype=jnp.float32)
        np.testing.assert_allclose(y, x.astype(jnp.float32) @ values.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tool", ["modelopt", "compressed-tensors"])
def test_a_projection_has_the_files_scales_and_bias(tmp_path, tool):
    rng = np.random.default_rng(1)
    matrix, bias = writer.random_matrix(rng, 32, 48), rng.normal(size=32).astype(np.float32)
    suffixes, invert = writer.SUFFIXES[tool], tool == "compressed-tensors"
    scalars = [1 / s if invert else s for s in (matrix.global_scale, matrix.input_scale)]
    values = [matrix.payload, matrix.block_scale, *(np.full((1,), s, np.float32) for s in scalars)]
    tensors = {f"a.b.{suffix}": value for suffix, value in zip(suffixes, values, strict=True)} | {"a.b.bias": bias}
    writer.write(tmp_path, {}, tensors)
    projection = checkpoints.load_projection(tmp_path, "a.b")
    np.testing.assert_array_equal(projection.payload, matrix.payload)
    np.testing.assert_array_equal(np.asarray(projection.block_scale), matrix.block_scale)
    assert (projection.global_scale, projection.input_scale) == (matrix.global_scale, matrix.input_scale)
    np.testing.assert_array_equal(projection.bias, bias)
    writer.write(tmp_path, {}, tensors | {"a.b.pre_quant_scale": bias})
    with pytest.raises(checkpoints.CheckpointError, match=r"a\.b\.pre_quant_scale: found a tensor that a linear layer"):
        checkpoints.load_projection(tmp_path, "a.b")


def test_a_projection_in_another_format_is_named():
    directory = Path(__file__).parent / "data" / "modelopt-qwen3_moe-experts"
    with pytest.raises(checkpoints.CheckpointError, match=r"q_proj\.weight: found BF16 .* expected .* in NVFP4"):
        checkpoints.load_projection(directory, "model.layers.0.self_attn.q_proj")
    with pytest.raises(checkpoints.CheckpointError, match=r"nothing\.weight: found no such tensor"):
        checkpoints.load_projection(directory, "nothing")
