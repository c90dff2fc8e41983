"""Writes tiny checkpoints with the real tools, and what the tools make of them.

    python tests/checkpoints/generate.py tests/checkpoints/data            # all cases
    python tests/checkpoints/generate.py OUT modelopt-mixtral ...          # some

Each case is a directory as the tool left it (a randomly initialised transformers model with one or two layers), plus
``expected.json`` (tool versions, and the SHA-256 of the tool's own decompression of each projection to bfloat16) and
``expected.npz`` (tokens, and the output of the transformers layer that runs on the decompressed weights, in float32).
Needs torch, transformers, compressed-tensors, llmcompressor and nvidia-modelopt; no GPU and no network.
"""

import dataclasses
import hashlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import os
from pathlib import Path
import subprocess
import sys
from unittest import mock

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS = 64, 96, 4, 12
COMMON = dict(
    vocab_size=32,
    hidden_size=HIDDEN,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
)
SIZES = {
    "qwen3_moe": dict(
        COMMON,
        intermediate_size=64,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "mixtral": dict(COMMON, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, num_experts_per_tok=2),
    "deepseek_v3": dict(
        {key: value for key, value in COMMON.items() if key != "head_dim"},
        num_hidden_layers=2,
        first_k_dense_replace=1,
        intermediate_size=64,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
    ),
    "nemotron_h": dict(
        {key: value for key, value in COMMON.items() if key != "num_hidden_layers"},
        layers_block_type=["attention", "moe"],
        moe_intermediate_size=INTERMEDIATE,
        moe_shared_expert_intermediate_size=48,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
        n_shared_experts=1,
        mamba_num_heads=2,
        mamba_head_dim=32,
        ssm_state_size=16,
        intermediate_size=64,
    ),
    "llama4_text": dict(
        COMMON,
        intermediate_size=INTERMEDIATE,
        intermediate_size_mlp=64,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        pad_token_id=0,
    ),
    "gpt_oss": dict(
        COMMON,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    ),
}
VISION = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    vision_output_dim=64,
    image_size=28,
    patch_size=14,
    projector_input_dim=64,
    projector_output_dim=64,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A tool, a model and the tool's name for the quantisation."""

    tool: str
    model: str
    scheme: str


CASES = {
    **{f"modelopt-{model}": Case("modelopt", model, "NVFP4_DEFAULT_CFG") for model in (*SIZES, "llama4")},
    "modelopt-qwen3_moe-w4a16": Case("modelopt", "qwen3_moe", "W4A16_NVFP4_CFG"),
    "modelopt-qwen3_moe-experts": Case("modelopt", "qwen3_moe", "NVFP4_EXPERTS_ONLY_CFG"),
    "modelopt-qwen3_moe-mxfp4": Case("modelopt", "qwen3_moe", "MXFP4_DEFAULT_CFG"),
    "modelopt-gpt_oss-openai": Case("openai", "gpt_oss", "MXFP4"),
    **{
        f"llmcompressor-{model}": Case("llmcompressor", model, "NVFP4")
        for model in ("qwen3_moe", "mixtral", "deepseek_v3", "nemotron_h", "llama4", "gpt_oss")
    },
    "llmcompressor-mixtral-w4a16": Case("llmcompressor", "mixtral", "NVFP4A16"),
    "llmcompressor-mixtral-mxfp4": Case("llmcompressor", "mixtral", "MXFP4A16"),
}
PACKAGES = ("torch", "transformers", "compressed-tensors", "llmcompressor", "nvidia-modelopt")


def make_config(name: str):
    from transformers import CONFIG_MAPPING

    if name == "llama4":
        return CONFIG_MAPPING[name](text_config=make_config("llama4_text").to_dict(), vision_config=VISION)
    return CONFIG_MAPPING[name](**SIZES[name])


def make_model(name: str):
    """A random model whose routers decide clearly, and whose gates and ups have different ranges."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(sum(name.encode()))
    config = make_config(name)
    config.dtype = "bfloat16"
    auto = AutoModelForImageTextToText if name == "llama4" else AutoModelForCausalLM
    model = auto.from_config(config).to(torch.bfloat16).eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith(("gate.weight", "router.weight")):
                tensor.normal_(0, 1)
            elif key.endswith(("e_score_correction_bias", "router.bias", "_proj_bias")):
                tensor.normal_(0, 0.2)
            elif ".experts." in key:
                tensor.normal_(0, 0.05)
                for expert in range(tensor.shape[0]):
                    tensor[expert] *= 1 + expert
                if "gate_up" in key and name == "gpt_oss":
                    tensor[..., 1::2] *= 4
                elif "gate_up" in key and "llama4" in name:
                    tensor[..., tensor.shape[-1] // 2 :] *= 4
                elif "gate_up" in key:
                    tensor[:, tensor.shape[1] // 2 :] *= 4
    return model


def tokens():
    import torch

    return torch.randint(0, COMMON["vocab_size"], (8, 16), generator=torch.Generator().manual_seed(0))


def write_with_modelopt(case: Case, out: Path) -> None:
    import copy

    from modelopt.torch.export import export_hf_checkpoint
    import modelopt.torch.quantization as mtq
    import torch

    model = make_model(case.model)
    mtq.quantize(model, copy.deepcopy(getattr(mtq, case.scheme)), lambda m: m(input_ids=tokens()))
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=out)


def write_with_llmcompressor(case: Case, out: Path) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import models, Tokenizer
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(COMMON["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "t0")), pad_token="t0")
    dense = out.with_name(out.name + ".dense")
    make_model(case.model).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    sys.meta_path.insert(0, _NoTorchvision())
    auto = AutoModelForImageTextToText if case.model == "llama4" else AutoModelForCausalLM
    with load_quantizable_moe(auto):
        model = auto.from_pretrained(dense, dtype="bfloat16")
    ids = tokens()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    ignore = ["re:.*lm_head", "re:.*gate$", "re:.*router$", "re:.*vision_model.*", "re:.*multi_modal_projector.*"]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=QuantizationModifier(targets="Linear", scheme=case.scheme, ignore=ignore),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
        moe_calibrate_all_experts=True,
        pipeline="basic",
    )
    model.save_pretrained(out, save_compressed=True)
    subprocess.run(["rm", "-r", str(dense)], check=True)


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """llmcompressor imports every image model of transformers; torchvision has no build that fits torch's CPU one."""

    def find_spec(self, name, path=None, target=None):
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec):
        return mock.MagicMock()

    def exec_module(self, module):
        pass


def write_openai(case: Case, out: Path) -> None:
    """gpt-oss as published: ModelOpt's MXFP4 quantiser, in OpenAI's names. transformers writes it on a GPU only."""
    from modelopt.torch.quantization.qtensor import MXFP4QTensor
    from safetensors.torch import save_file

    model = make_model(case.model)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    for key in [key for key in state if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        dense = state.pop(key).transpose(1, 2).contiguous()
        quantized, scales = MXFP4QTensor.quantize(dense, block_size=32)
        state[key + "_blocks"] = quantized._quantized_data.reshape(*dense.shape[:2], -1, 16).contiguous()
        state[key + "_scales"] = scales.reshape(*dense.shape[:2], -1).contiguous()
    out.mkdir(parents=True)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (out / "config.json").write_text(json.dumps(config, indent=1))


def decompress(case: Case, out: Path) -> dict:
    """``layer -> (gate [E, I, H] or None, up, down [E, H, I])`` in bfloat16, by the tool's own code."""
    from safetensors import safe_open
    import torch

    with safe_open(out / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    layers = {}
    for layer in sorted({int(key.split("layers.")[1].split(".")[0]) for key in state if ".experts." in key}):
        prefix = next(
            key.split("experts.")[0] + "experts." for key in state if f"layers.{layer}." in key and ".experts." in key
        )
        if case.tool == "openai":
            from transformers.integrations.mxfp4 import convert_moe_packed_tensors

            gate_up, down = (
                convert_moe_packed_tensors(state[f"{prefix}{name}_blocks"], state[f"{prefix}{name}_scales"]).transpose(
                    1, 2
                )
                for name in ("gate_up_proj", "down_proj")
            )
            layers[layer] = (gate_up[:, 0::2], gate_up[:, 1::2], down)
        elif f"{prefix}gate_up_proj" in state:  # ModelOpt's fused experts: [E, in / 2, out]
            fused = []
            for name in ("gate_up_proj", "down_proj"):
                packed = state[prefix + name].transpose(1, 2).contiguous()
                scale = state[f"{prefix}{name}_weight_scale"].transpose(1, 2).contiguous()
                fused.append(_modelopt(packed, scale, state[f"{prefix}{name}_weight_scale_2"]))
            gate_up, down = fused
            half = gate_up.shape[1] // 2
            halves = (
                (gate_up[:, 0::2], gate_up[:, 1::2])
                if case.model == "gpt_oss"
                else (gate_up[:, :half], gate_up[:, half:])
            )
            layers[layer] = (*halves, down)
        else:
            names = {key[len(prefix) :].split(".")[1] for key in state if key.startswith(prefix)}
            order = ("w1", "w3", "w2") if "w1" in names else ("gate_proj", "up_proj", "down_proj")
            count = 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))
            layers[layer] = tuple(
                torch.stack([_linear(case, state, f"{prefix}{expert}.{name}.") for expert in range(count)])
                if name in names
                else None
                for name in order
            )
    return layers


def _linear(case: Case, state: dict, prefix: str):
    scale = state[prefix + "weight_scale"]
    if case.tool == "modelopt":
        return _modelopt(state[prefix + "weight"], scale, state.get(prefix + "weight_scale_2"))
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    name = "mxfp4-pack-quantized" if case.scheme.startswith("MXFP4") else "nvfp4-pack-quantized"
    linear = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    compressor = BaseCompressor.get_value_from_registry(name)
    return compressor.decompress(linear, preset_name_to_scheme(case.scheme, ["Linear"]))["weight"]


def _modelopt(packed, scale, double_scale):
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor
    import torch

    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    if double_scale is None:
        tensor = MXFP4QTensor(torch.Size(shape), torch.bfloat16, packed)
        return tensor.dequantize(dtype=torch.bfloat16, scale=scale, block_sizes={-1: 32})
    tensor = NVFP4QTensor(torch.Size(shape), torch.bfloat16, packed)
    return tensor.dequantize(dtype=torch.bfloat16, scale=scale, double_scale=double_scale, block_sizes={-1: 16})


def expectations(case: Case, out: Path) -> None:
    """Runs each transformers MoE layer, in float32, on the decompressed weights."""
    import numpy as np
    import torch

    model = make_model(case.model)
    digests, arrays = {}, {}
    for layer, (gate, up, down) in decompress(case, out).items():
        parts = {"gate": gate, "up": up, "down": down}
        for name, weight in parts.items():
            if weight is not None:
                # Plus zero: ModelOpt decompresses the code of -0 to +0, compressed-tensors to -0.
                bits = (weight + 0.0).contiguous().view(torch.int16).numpy()
                digests[f"{layer}.{name}"] = hashlib.sha256(bits.tobytes()).hexdigest()
        block = next(m for n, m in model.named_modules() if n.endswith(f"layers.{layer}.{_block_name(case.model)}"))
        gate_up = up if gate is None else torch.cat([gate, up], 1)
        if case.model == "gpt_oss":
            gate_up = torch.stack([gate, up], 2).flatten(1, 2)
        if case.model == "gpt_oss" or "llama4" in case.model:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        block = block.float()
        with torch.no_grad():
            getattr(block.experts, "up_proj" if gate is None else "gate_up_proj").copy_(gate_up)
            block.experts.down_proj.copy_(down)
            for module in ("shared_expert", "shared_experts"):
                if hasattr(block, module):  # tested on its own: the routed experts are what the op computes
                    for parameter in getattr(block, module).parameters():
                        parameter.zero_()
            x = (
                torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(layer))
                .to(torch.bfloat16)
                .float()
            )
            y = block(x)
        y = y[0] if isinstance(y, tuple) else y
        arrays[f"x{layer}"], arrays[f"y{layer}"] = x.reshape(TOKENS, HIDDEN).numpy(), y.reshape(TOKENS, HIDDEN).numpy()
    if case.scheme == "NVFP4_EXPERTS_ONLY_CFG":
        arrays |= decoder_layer(model)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    expected = {"tool": case.tool, "scheme": case.scheme, "versions": versions, "sha256": digests}
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    np.savez(out / "expected.npz", **arrays)


def decoder_layer(model) -> dict:
    """The whole first decoder layer, attention included, for ``examples/qwen3_layer.py``."""
    import torch

    model = model.float()
    x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16).float()
    positions = torch.arange(TOKENS)[None]
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        y = model.model.layers[0](
            x, attention_mask=mask, position_ids=positions, position_embeddings=model.model.rotary_emb(x, positions)
        )
    y = y[0] if isinstance(y, tuple) else y
    return {"decoder_x": x[0].numpy(), "decoder_y": y.reshape(TOKENS, HIDDEN).numpy()}


def _block_name(model: str) -> str:
    return {"nemotron_h": "mixer", "llama4": "feed_forward", "llama4_text": "feed_forward"}.get(model, "mlp")


def generate(name: str, out: Path) -> None:
    case = CASES[name]
    {"modelopt": write_with_modelopt, "llmcompressor": write_with_llmcompressor, "openai": write_openai}[case.tool](
        case, out
    )
    kept = {"config.json", "hf_quant_config.json", "model.safetensors"}
    for extra in out.iterdir():
        if extra.name not in kept:
            extra.unlink()
    expectations(case, out)


def main() -> None:
    root = Path(sys.argv[1])
    names = sys.argv[2:] or list(CASES)
    if len(names) == 1:
        generate(names[0], root / names[0])
        return
    # The tools patch torch and transformers as they go: each case has a process of its own.
    for name in names:
        print(name, flush=True)
        subprocess.run(["rm", "-rf", str(root / name)], check=True)
        subprocess.run(
            [sys.executable, __file__, str(root), name], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )


if __name__ == "__main__":
    main()
