"""Writes tiny whole models with the real tools, and what transformers computes with their dequantised weights.

    python tests/checkpoints/generate_models.py tests/checkpoints/models            # all cases
    python tests/checkpoints/generate_models.py OUT llmcompressor-qwen3_moe ...     # some

Each case is a directory as a tool left it: a randomly initialised Qwen3MoeForCausalLM of two layers, with four query
heads on two of keys and values, a head size that is not H over the number of heads, and norms that are not ones. Beside
it stand a tokenizer of words and ``expected.npz``: tokens ``[2, 24]``, transformers' float32 logits ``[2, 24, V]`` for
them, and what it generates greedily after the first 8. Needs what ``generate.py`` needs.
"""

import importlib.metadata
import json
import os
from pathlib import Path
import subprocess
import sys

import generate

VOCABULARY, LENGTH, PROMPT, NEW = 64, 24, 8, 12
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_experts=8,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
)
CASES = {
    "modelopt-qwen3_moe-experts": generate.Case("modelopt", "qwen3_moe", "NVFP4_EXPERTS_ONLY_CFG"),
    "llmcompressor-qwen3_moe": generate.Case("llmcompressor", "qwen3_moe", "NVFP4"),
}


def make_model(name: str):
    """Parameters of such sizes that attention, experts and every norm matter to the logits."""
    import torch
    from transformers import AutoModelForCausalLM, CONFIG_MAPPING

    torch.manual_seed(5)
    config = CONFIG_MAPPING[name](**SIZES)
    config.dtype = "bfloat16"
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.endswith("norm.weight"):
                tensor.normal_(1, 0.3)
            elif key.endswith("embed_tokens.weight"):
                tensor.normal_(0, 1)
            elif "gate_up_proj" in key:
                tensor.normal_(0, 1.5 * tensor.shape[-1] ** -0.5)
            elif key.endswith("gate.weight"):
                tensor.normal_(0, 0.5)  # logits of order 4: the choice is clear, and weights are not all alike
            else:
                tensor.normal_(0, 1.5 * tensor.shape[-1] ** -0.5)
    return model


def dequantised(case: generate.Case, out: Path):
    """The model in float32: experts are 4-bit numbers exactly, other 4-bit weights as the tool widens them."""
    from safetensors import safe_open
    import torch
    from transformers import AutoModelForCausalLM, CONFIG_MAPPING

    with safe_open(out / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    # Not make_model(...).float(): what was cast to bfloat16 on the way has lost bits of the rotary embedding too.
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[case.model](**SIZES), dtype=torch.float32).eval()

    def experts(layer: str, name: str):
        prefix = f"model.layers.{layer}.mlp.experts."
        return torch.stack([exactly(state, f"{prefix}{expert}.{name}.") for expert in range(SIZES["num_experts"])])

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("gate_up_proj"):
                layer = key.split(".")[2]
                parameter.copy_(torch.cat([experts(layer, "gate_proj"), experts(layer, "up_proj")], 1))
            elif key.endswith("experts.down_proj"):
                parameter.copy_(experts(key.split(".")[2], "down_proj"))
            elif key + "_scale" in state:
                parameter.copy_(generate._linear(case, state, key.removesuffix("weight")))
            else:
                parameter.copy_(state[key])
    return model


def exactly(state: dict, prefix: str):
    """A 4-bit weight in float32; the tools' own decompression rounds to bfloat16, which the op does not."""
    import torch

    packed = state[prefix + ("weight_packed" if prefix + "weight_packed" in state else "weight")]
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([magnitudes, -magnitudes])[codes]
    scaled = values * state[prefix + "weight_scale"].float().repeat_interleave(16, 1)
    if prefix + "weight_scale_2" in state:
        return scaled * state[prefix + "weight_scale_2"]
    return scaled * (1 / state[prefix + "weight_global_scale"])


def expectations(case: generate.Case, out: Path) -> None:
    """Of tokens for which no router and no greedy choice is a close one: roundings must not decide."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    model = dequantised(case, out)
    routers = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda module, inputs: routers.append(inputs[0] @ module.weight.T))

    def gap(values, k: int) -> float:
        best = values.sort(-1, descending=True).values
        return float((best[..., k - 1] - best[..., k]).min())

    def run(tokens):
        routers.clear()
        logits = model(input_ids=tokens).logits
        return logits, gap(torch.cat(routers), SIZES["num_experts_per_tok"])

    best = (0.0,)
    with torch.no_grad():
        for seed in range(200):
            tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
            logits, router_gap = run(tokens)
            if router_gap < best[0]:
                continue
            prompt = tokens[:, :PROMPT]
            generated = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
            following, generated_gap = run(generated)
            choice = gap(following[:, PROMPT - 1 :], 1)
            if min(router_gap, generated_gap, choice) > best[0]:
                best = (min(router_gap, generated_gap, choice), tokens, logits, generated[:, PROMPT:])
    decisive, tokens, logits, generated = best
    versions = {package: importlib.metadata.version(package) for package in generate.PACKAGES}
    expected = {"tool": case.tool, "scheme": case.scheme, "versions": versions, "closest choice": decisive}
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    arrays = {"tokens": tokens.int(), "logits": logits, "generated": generated.int()}
    np.savez(out / "expected.npz", **{name: array.numpy() for name, array in arrays.items()})


def write_tokenizer(out: Path) -> None:
    from tokenizers import decoders, models, pre_tokenizers, Tokenizer

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, "t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(out / "tokenizer.json"))


def main() -> None:
    root = Path(sys.argv[1])
    names = sys.argv[2:] or list(CASES)
    if len(names) > 1:  # the tools patch torch and transformers as they go: each case has a process of its own
        for name in names:
            subprocess.run(
                [sys.executable, __file__, str(root), name], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
            )
        return
    case, out = CASES[names[0]], root / names[0]
    subprocess.run(["rm", "-rf", str(out)], check=True)
    generate.make_model = make_model
    {"modelopt": generate.write_with_modelopt, "llmcompressor": generate.write_with_llmcompressor}[case.tool](case, out)
    for extra in out.iterdir():
        if extra.name not in ("config.json", "model.safetensors"):
            extra.unlink()
    expectations(case, out)
    write_tokenizer(out)


if __name__ == "__main__":
    main()
