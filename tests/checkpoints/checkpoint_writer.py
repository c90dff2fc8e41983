"""Checkpoints written by the test itself: every tensor chosen here, and nothing shared with the code under test."""

import dataclasses
import json
from pathlib import Path
import struct

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
NAMES = {
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int8": "I8",
    "float8_e8m0fnu": "F8_E8M0",
}

CONFIGS = {
    "qwen3_moe": dict(num_experts="E", moe_intermediate_size="I", norm_topk_prob=True, hidden_act="silu"),
    "deepseek_v3": dict(n_routed_experts="E", moe_intermediate_size="I", n_group=2, topk_group=1, hidden_act="silu"),
    "mixtral": dict(num_local_experts="E", intermediate_size="I", hidden_act="silu"),
    "nemotron_h": dict(
        n_routed_experts="E", moe_intermediate_size="I", n_group=1, topk_group=1, mlp_hidden_act="relu2"
    ),
    "llama4_text": dict(num_local_experts="E", intermediate_size="I", hidden_act="silu"),
    "gpt_oss": dict(num_local_experts="E", intermediate_size="I", hidden_act="silu"),
}
BLOCKS = {
    "qwen3_moe": "model.layers.{}.mlp",
    "deepseek_v3": "model.layers.{}.mlp",
    "mixtral": "model.layers.{}.block_sparse_moe",
    "nemotron_h": "backbone.layers.{}.mixer",
    "llama4_text": "model.layers.{}.feed_forward",
    "gpt_oss": "model.layers.{}.mlp",
}
PROJECTIONS = {"mixtral": ("w1", "w3", "w2"), "nemotron_h": ("up_proj", "down_proj")}
SUFFIXES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "quark": ("weight", "weight_scale", "weight_scale_2", "input_scale_2"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}


@dataclasses.dataclass
class Matrix:
    """What a checkpoint says of one projection of one expert; scales in the multiplied convention."""

    payload: np.ndarray
    block_scale: np.ndarray
    global_scale: np.float32
    input_scale: np.float32


@dataclasses.dataclass
class Layer:
    """gate_up ``[E][P]`` and down ``[E][1]``."""

    gate_up: list[list[Matrix]]
    down: list[list[Matrix]]


def random_matrix(rng: np.random.Generator, rows: int, contraction: int) -> Matrix:
    codes = rng.integers(0, 127, (rows, contraction // 16), dtype=np.uint8)  # positive, finite e4m3
    return Matrix(
        rng.integers(0, 256, (rows, contraction // 2), dtype=np.uint8),
        codes.view(E4M3),
        # Powers of two, so that a reciprocal is exact; between projections they differ by up to 2^6.
        np.float32(2.0 ** -rng.integers(4, 10)),
        np.float32(2.0 ** -rng.integers(4, 10)),
    )


def random_layer(seed: int, experts: int, parts: int, hidden: int, intermediate: int) -> Layer:
    rng = np.random.default_rng(seed)
    return Layer(
        [[random_matrix(rng, intermediate, hidden) for _ in range(parts)] for _ in range(experts)],
        [[random_matrix(rng, hidden, intermediate)] for _ in range(experts)],
    )


def config_of(model_type: str, experts: int, hidden: int, intermediate: int) -> dict:
    sizes = {"E": experts, "I": intermediate}
    config = {
        key: sizes.get(value, value) if isinstance(value, str) else value for key, value in CONFIGS[model_type].items()
    }
    return {"model_type": model_type, "hidden_size": hidden, "num_experts_per_tok": min(2, experts), **config}


def per_expert(layer: Layer, model_type: str, tool: str, number: int, scalar_shape=()) -> dict[str, np.ndarray]:
    """Tensors with one name for each expert and projection."""
    payload, block_scale, global_scale, input_scale = SUFFIXES[tool]
    names = PROJECTIONS.get(model_type, ("gate_proj", "up_proj", "down_proj"))
    convert = (lambda s: 1 / s) if tool == "compressed-tensors" else (lambda s: s)
    tensors = {}
    for expert, (gate_up, down) in enumerate(zip(layer.gate_up, layer.down, strict=True)):
        for name, matrix in zip(names, [*gate_up, *down], strict=True):
            prefix = f"{BLOCKS[model_type].format(number)}.experts.{expert}.{name}."
            tensors[prefix + payload] = matrix.payload
            tensors[prefix + block_scale] = matrix.block_scale
            tensors[prefix + global_scale] = np.full(scalar_shape, convert(matrix.global_scale), np.float32)
            tensors[prefix + input_scale] = np.full(scalar_shape, convert(matrix.input_scale), np.float32)
    return tensors


def fused(layer: Layer, model_type: str, number: int) -> dict[str, np.ndarray]:
    """ModelOpt's fused tensors, ``[E, in, out]``; a global scale for each expert and part."""
    prefix = f"{BLOCKS[model_type].format(number)}.experts."
    tensors = {}
    for name, projection in (("gate_up_proj", layer.gate_up), ("down_proj", layer.down)):
        for suffix, field in (("", "payload"), ("_weight_scale", "block_scale")):
            experts = []
            for matrices in projection:
                rows = [getattr(matrix, field) for matrix in matrices]
                if model_type == "gpt_oss":
                    experts.append(np.stack(rows, 1).reshape(-1, rows[0].shape[1]).T)
                else:
                    experts.append(np.concatenate(rows).T)
            tensors[prefix + name + suffix] = np.stack(experts)
        for suffix, field in (("_weight_scale_2", "global_scale"), ("_input_scale", "input_scale")):
            tensors[prefix + name + suffix] = np.array(
                [[getattr(m, field) for m in ms] for ms in projection], np.float32
            )
    return tensors


def write_file(path: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> None:
    header, blobs, position = {"__metadata__": metadata or {"format": "pt"}}, [], 0
    for name, array in tensors.items():
        blobs.append(np.ascontiguousarray(array).tobytes())
        end = position + len(blobs[-1])
        header[name] = {"dtype": NAMES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(blobs))


def write(directory: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_file(directory / "model.safetensors", tensors)
        return directory
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        write_file(directory / file, {name: tensors[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def router(model_type: str, number: int, experts: int, hidden: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    name = "router" if model_type in ("llama4_text", "gpt_oss") else "gate"
    prefix = f"{BLOCKS[model_type].format(number)}.{name}."
    tensors = {prefix + "weight": rng.normal(size=(experts, hidden)).astype(BF16)}
    if model_type in ("deepseek_v3", "nemotron_h"):
        tensors[prefix + "e_score_correction_bias"] = rng.normal(size=experts).astype(np.float32)
    if model_type == "gpt_oss":
        tensors[prefix + "bias"] = rng.normal(size=experts).astype(BF16)
    return tensors


def checkpoint(
    directory: Path,
    model_type: str = "qwen3_moe",
    tool: str = "modelopt",
    *,
    layers: tuple[int, ...] = (0,),
    experts: int = 4,
    hidden: int = 32,
    intermediate: int = 48,
    shards: int = 1,
    scalar_shape: tuple[int, ...] = (),
) -> dict[int, Layer]:
    """Writes a whole checkpoint and returns what is in it. ``tool``: a key of SUFFIXES, or "fused"."""
    parts = 1 if model_type == "nemotron_h" else 2
    contents, tensors = {}, {}
    for number in layers:
        layer = contents[number] = random_layer(number, experts, parts, hidden, intermediate)
        if tool == "fused":
            tensors |= fused(layer, model_type, number)
        else:
            tensors |= per_expert(layer, model_type, tool, number, scalar_shape)
        tensors |= router(model_type, number, experts, hidden)
    write(directory, config_of(model_type, experts, hidden, intermediate), tensors, shards)
    return contents
