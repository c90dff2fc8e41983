"""Writes one MoE layer of each model family that transformers has, and what transformers computes with it.

    python tests/checkpoints/generate_blocks.py tests/checkpoints/blocks                 # all families
    python tests/checkpoints/generate_blocks.py OUT deepseek_v3 ...                      # some

Each case is a directory with

* ``config.json`` as transformers saves it, and ``minimal.json``: the sizes only, so that every setting of the router
  and of the activation is the default of the family's configuration class;
* ``model.safetensors``: the layer under the names that transformers saves, its experts in NVFP4 under ModelOpt's names;
* ``expected.npz``: tokens ``x`` (and ``token_ids``), the router's ``ids`` (ascending) and ``weights``, the block's
  output ``y``; where the experts read something else than the router does, that is ``x_experts``, and ``y`` is theirs;
* ``variants.npz``: the same for some ``tokens`` where the config says something else, ``config_variants.VARIANTS``
  in order, ``y`` where the activation is concerned; nothing for those that transformers refuses.

The block's weights are the dequantised ones exactly and it runs in float64. x and the router's weights are small
multiples of powers of two, so that logits have no rounding error in any order of summation, and no token stands where
a small change of x would change its experts. Needs torch and transformers; no GPU and no network.
"""

import dataclasses
import importlib.metadata
import inspect
import json
from pathlib import Path
import re
import sys

import checkpoint_writer
import config_variants
import ml_dtypes
import numpy as np

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS, VOCAB, LATENT_SIZE = 64, 32, 12, 24, 64, 32
LAYERS = 4  # the last one is a MoE layer in every family's default arrangement
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
HEADS = dict(head_dim=32)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
INDEXER = dict(index_n_heads=2, index_head_dim=32, index_topk=4)
LINEAR = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
SPLIT = dict(intermediate_size=96, moe_intermediate_size=INTERMEDIATE)
SHARED = dict(shared_expert_intermediate_size=48)


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer of one family.

    Attributes:
      config: the model type whose configuration class is used.
      sizes: what the configuration class is told; every other key keeps its default.
      block: the MoE module within ``layers.N`` of the model in memory; "" is the decoder layer itself.
      wrap: the model type of a config with vision or audio, around the text model's.
      layer: its number.
      stored_experts: the experts' module within ``layers.N`` as NVFP4 exports name it, where transformers itself
        saves fused tensors.
      strip, prefix: how the published names start, where transformers saves ``strip`` in its place.
    """

    config: str
    sizes: dict
    block: str = "mlp"
    wrap: str | None = None
    layer: int = LAYERS - 1
    stored_experts: str | None = None
    strip: str = ""
    prefix: str = ""


def _deepseek(experts: int = EXPERTS, **more) -> dict:
    return COMMON | LATENT | SPLIT | dict(n_routed_experts=experts) | more


def _without(sizes: dict, *keys: str) -> dict:
    return {key: value for key, value in sizes.items() if key not in keys}


_QWEN = COMMON | SPLIT | dict(num_experts=EXPERTS)
_LOCAL = COMMON | dict(intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
# With both keys, transformers takes intermediate_size for the experts: it is an alias there.
_DEEPSEEK_V4 = _without(_deepseek(o_lora_rank=16, head_dim=32, **INDEXER), "intermediate_size")
_NEMOTRON = (
    _without(COMMON, "num_hidden_layers")
    | HEADS
    | dict(
        layers_block_type=["linear_attention", "full_attention", "mlp", "moe"],
        n_routed_experts=EXPERTS,
        moe_intermediate_size=INTERMEDIATE,
        moe_shared_expert_intermediate_size=48,
        intermediate_size=96,
        mamba_num_heads=2,
        mamba_head_dim=32,
        n_groups=1,
        ssm_state_size=16,
    )
)
_STEP = COMMON | SPLIT | HEADS | dict(n_routed_experts=EXPERTS, share_expert_dim=48)

CASES = {
    "deepseek_v3": Case("deepseek_v3", _deepseek(24)),
    "deepseek_v32": Case("deepseek_v32", _deepseek(24, **INDEXER)),
    "deepseek_v4": Case("deepseek_v4", _DEEPSEEK_V4),
    "deepseek_v4-hash": Case("deepseek_v4", _DEEPSEEK_V4, layer=1, strip="model."),
    "glm4_moe": Case("glm4_moe", COMMON | SPLIT | HEADS | dict(n_routed_experts=EXPERTS)),
    "glm4_moe_lite": Case("glm4_moe_lite", _deepseek()),
    "glm_moe_dsa": Case("glm_moe_dsa", _deepseek(**INDEXER)),
    "dots1": Case(
        "dots1", COMMON | SPLIT | HEADS | dict(n_routed_experts=EXPERTS, n_shared_experts=2, num_experts_per_tok=6)
    ),
    "exaone_moe": Case("exaone_moe", _QWEN | HEADS | dict(sliding_window=16)),
    "kimi_linear": Case(
        "kimi_linear",
        _without(_deepseek(), "n_routed_experts", "q_lora_rank")
        | dict(num_experts=EXPERTS, linear_head_dim=16, linear_num_heads=2),
    ),
    "nemotron_h": Case("nemotron_h", _NEMOTRON, block="mixer"),
    "nemotron_h-latent": Case("nemotron_h", _NEMOTRON | dict(moe_latent_size=LATENT_SIZE), block="mixer"),
    "qwen2_moe": Case("qwen2_moe", _QWEN | SHARED),
    "qwen3_moe": Case("qwen3_moe", _QWEN | HEADS),
    "qwen3_next": Case("qwen3_next", _QWEN | HEADS | SHARED | LINEAR),
    "qwen3_5_moe": Case(
        "qwen3_5_moe_text", _without(_QWEN, "intermediate_size") | HEADS | SHARED | LINEAR, wrap="qwen3_5_moe"
    ),
    "qwen3_vl_moe": Case("qwen3_vl_moe_text", _QWEN | HEADS, wrap="qwen3_vl_moe", stored_experts="mlp.experts"),
    "qwen3_omni_moe": Case("qwen3_omni_moe_text", _QWEN | HEADS, wrap="qwen3_omni_moe", prefix="thinker."),
    "olmoe": Case("olmoe", COMMON | dict(intermediate_size=INTERMEDIATE, num_experts=EXPERTS)),
    "mixtral": Case("mixtral", _LOCAL | HEADS),
    "minimax": Case("minimax", _LOCAL | HEADS),
    "minimax_m2": Case("minimax_m2", _LOCAL | HEADS),
    "minimax_m3": Case(
        "minimax_m3_vl_text",
        _LOCAL | HEADS | dict(shared_intermediate_size=48, dense_intermediate_size=96, rotary_dim=16),
        wrap="minimax_m3_vl",
    ),
    "ernie4_5_moe": Case("ernie4_5_moe", COMMON | SPLIT | dict(moe_num_experts=EXPERTS)),
    "phimoe": Case("phimoe", _LOCAL),
    "granitemoe": Case("granitemoe", _LOCAL, block="block_sparse_moe", stored_experts="block_sparse_moe.experts"),
    "gemma4": Case(
        "gemma4_text",
        COMMON | SPLIT | HEADS | dict(num_experts=EXPERTS, top_k_experts=4, enable_moe_block=True),
        block="",
        wrap="gemma4",
        stored_experts="moe.experts",
    ),
    "step3p7": Case("step3p5", _STEP, wrap="step3p7", stored_experts="moe.experts"),
    "step3p7-limits": Case(
        "step3p5",
        _STEP | dict(swiglu_limits=[0, 0, 0, 7], swiglu_limits_shared=[0, 0, 0, 8]),
        wrap="step3p7",
        stored_experts="moe.experts",
    ),
    "llama4": Case("llama4_text", _LOCAL | HEADS | dict(intermediate_size_mlp=96), block="feed_forward"),
    "gpt_oss": Case("gpt_oss", _LOCAL | HEADS),
}
K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")
ROLES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}


def make_model(case: Case):
    """The whole model without data: it knows the names that its tensors have in files."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CONFIG_MAPPING

    config = CONFIG_MAPPING[case.config](**case.sizes)
    with torch.device("meta"):
        if case.wrap is None:
            model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        elif case.wrap == "qwen3_omni_moe":
            thinker = CONFIG_MAPPING["qwen3_omni_moe_thinker"](text_config=config.to_dict())
            model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(thinker)
            model.set_experts_implementation("eager")
            return model, CONFIG_MAPPING[case.wrap](thinker_config=thinker.to_dict())
        else:
            whole = CONFIG_MAPPING[case.wrap](text_config=config.to_dict())
            model = AutoModelForImageTextToText.from_config(whole, experts_implementation="eager")
    return model, model.config


def variant(rng: np.random.Generator, case: Case, change: dict, block, arrays: dict) -> dict[str, np.ndarray]:
    """What the layer computes for a few tokens under another config; nothing if transformers refuses it."""
    from huggingface_hub.errors import StrictDataclassError
    import torch
    from transformers import CONFIG_MAPPING

    try:
        whole = minimal(case, change)
        config = CONFIG_MAPPING[whole["model_type"]].from_dict(whole).get_text_config()
        config._experts_implementation = "eager"
        if case.block == "":
            other, router = None, type(block.router)(config)
        else:
            layer = {"layer_idx": case.layer} if "layer_idx" in inspect.signature(type(block)).parameters else {}
            other = type(block)(config, **layer).double().eval()
            other.load_state_dict(block.state_dict())
            router = router_of(other)
        router = router.double()
        router.load_state_dict(router_of(block).state_dict())
        mask = steady(rng, router, other or block, arrays["x"].astype(np.float64))
        tokens = np.arange(TOKENS)[mask][:4]
        inputs = [torch.from_numpy(arrays[key][tokens]) for key in ("x", "token_ids") if key in arrays]
        inputs[0] = inputs[0].double()
        ids, weights = routing_of(router, other or block, *inputs)
        found = {"tokens": tokens, "ids": ids.numpy().astype(np.int32), "weights": weights.double().numpy()}
        if "x_experts" not in arrays and any("act" in key or "swiglu" in key for key in change):
            y = other(*(value[None] for value in inputs))
            y = y[0] if isinstance(y, tuple) else y
            found["y"] = y.reshape(len(tokens), -1).numpy().astype(np.float32)
    except (StrictDataclassError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as refusal:
        print("  ", change, type(refusal).__name__, str(refusal).splitlines()[0][:90])
        return {}
    return found


def router_of(block):
    return block.gate if hasattr(block, "gate") else block.router


def grid(rng: np.random.Generator, shape, step: float) -> np.ndarray:
    """Multiples of ``step`` up to 15 times as large: products and sums of a few hundred of them are exact."""
    return rng.integers(-15, 16, shape) * step


def random_matrix(rng: np.random.Generator, rows: int, columns: int) -> checkpoint_writer.Matrix:
    """NVFP4 of moderate size: block scales from 1/2 to 2, global scales that differ between matrices."""
    return checkpoint_writer.Matrix(
        rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8),
        rng.integers(0x30, 0x41, (rows, columns // 16), dtype=np.uint8).view(checkpoint_writer.E4M3),
        np.float32(2.0 ** -rng.integers(3, 6)),
        np.float32(2.0 ** -rng.integers(4, 10)),
    )


def dense(matrix: checkpoint_writer.Matrix) -> np.ndarray:
    """The float64 values of an NVFP4 matrix; low nibble first."""
    codes = np.stack([matrix.payload & 15, matrix.payload >> 4], -1).reshape(len(matrix.payload), -1)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return values * np.repeat(matrix.block_scale.astype(np.float64), 16, 1) * np.float64(matrix.global_scale)


def fill_experts(rng: np.random.Generator, experts) -> checkpoint_writer.Layer:
    """Random NVFP4 experts, and their values in the block's own tensors."""
    import torch

    gated = hasattr(experts, "gate_up_proj")
    transposed = type(experts).__name__ in ("GptOssExperts", "Llama4TextExperts")
    first = experts.gate_up_proj if gated else experts.up_proj
    rows, columns = (first.shape[2], first.shape[1]) if transposed else first.shape[1:]
    parts = 2 if gated else 1
    layer = checkpoint_writer.Layer(
        [[random_matrix(rng, rows // parts, columns) for _ in range(parts)] for _ in range(len(first))],
        [[random_matrix(rng, columns, rows // parts)] for _ in range(len(first))],
    )
    for expert, (gate_up, (down,)) in enumerate(zip(layer.gate_up, layer.down, strict=True)):
        matrices = [dense(matrix) for matrix in gate_up]
        joined = np.stack(matrices, 1).reshape(rows, columns) if _interleaved(experts) else np.concatenate(matrices)
        for tensor, value in ((first, joined), (experts.down_proj, dense(down))):
            tensor[expert] = torch.from_numpy(value.T if transposed else value)
    return layer


def _interleaved(experts) -> bool:
    return type(experts).__name__ == "GptOssExperts"


def fill(rng: np.random.Generator, block, num_experts: int, k: int) -> checkpoint_writer.Layer:
    """Every tensor of a block that has none yet."""
    import torch

    layer = fill_experts(rng, block.experts)
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        shape = tuple(tensor.shape)
        if name.endswith(("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")) and tensor.ndim == 3:
            continue
        if name.endswith("e_score_correction_bias"):
            # Of the size of the scores' differences: sigmoids spread over (0, 1), softmax over 1/E.
            size = 0.03 if "moe_statics" in name else 0.3
            value = rng.normal(size=shape).astype(np.float32) * np.float32(size)
        elif name.endswith("tid2eid"):
            value = np.stack([rng.permutation(num_experts)[:k] for _ in range(shape[0])])
        elif name.endswith(("per_expert_scale", "router.scale")):
            value = 1 + grid(rng, shape, 1 / 32)
        elif re.search(r"shared_experts?\.(gate|up)_proj", name):
            value = grid(rng, shape, 1 / 32)  # to reach the clamps
        else:
            value = grid(rng, shape, 1 / 64)
        tensor.copy_(torch.from_numpy(np.asarray(value)))
    return layer


def routing_of(router, block, *inputs):
    """ids [T, K] ascending and weights [T, K] of tokens, whatever the router returns."""
    import torch

    if hasattr(block, "e_score_correction_bias"):
        inputs = (*inputs, block.e_score_correction_bias)
    outputs = router(*inputs)
    if type(router).__name__ == "Llama4Router":
        weights, ids = outputs[0].topk(router.top_k)
    else:
        weights, ids = outputs[1], outputs[2]
    ids, order = ids.sort(-1)
    weights = torch.gather(weights, 1, order)
    # MiniMax-M3 and Step multiply the sum over experts instead of the weights.
    outside = hasattr(block, "routed_scaling_factor") and not hasattr(router, "routed_scaling_factor")
    return ids, weights * block.routed_scaling_factor if outside else weights


def steady(rng: np.random.Generator, router, block, x: np.ndarray) -> np.ndarray:
    """Which tokens keep their experts, and nearly their weights, where x [T, H] changes by about 1e-4 of itself."""
    import torch

    if hasattr(router, "tid2eid"):
        return np.ones(len(x), bool)
    ids, weights = routing_of(router, block, torch.from_numpy(x))
    mask = np.ones(len(x), bool)
    for _ in range(8):
        nudged = torch.from_numpy(x * (1 + 1e-4 * rng.normal(size=x.shape)))
        other_ids, other_weights = routing_of(router, block, nudged)
        mask &= (other_ids == ids).all(1).numpy()
        mask &= torch.isclose(weights, other_weights, rtol=0.05, atol=1e-3).all(1).numpy()
    return mask


def stored_tensors(case: Case, model, name: str, block, layer: checkpoint_writer.Layer) -> dict[str, np.ndarray]:
    """The block's tensors as a quantised checkpoint has them."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {f"{name}.{key}": value for key, value in block.state_dict().items() if _of_the_block(case, key)}
    saved = {
        case.prefix + key.removeprefix(case.strip): value
        for key, value in revert_weight_conversion(model, state).items()
    }
    tensors = {}
    root = next(re.match(r"(.*?layers\.\d+\.)", key)[1] for key in saved)
    for key, value in saved.items():
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
        per_expert = re.match(r"(.*experts\.(\d+)\.(\w+))\.weight$", key)
        if per_expert and "shared" not in key:
            matrix = _matrices(layer, int(per_expert[2]))[ROLES[per_expert[3]]]
            np.testing.assert_array_equal(value, dense(matrix))
            tensors |= _linear(per_expert[1], matrix)
        elif value.ndim == 3 and case.stored_experts is None:
            continue  # ModelOpt's fused names, below
        elif value.ndim < 3:
            tensors[key] = _as_saved(model, key, value)
    if case.stored_experts is not None:
        names = ("gate_proj", "up_proj", "down_proj")
        for expert in range(len(layer.down)):
            for part, matrix in zip(names, _matrices(layer, expert), strict=True):
                tensors |= _linear(f"{root}{case.stored_experts}.{expert}.{part}", matrix)
    elif case.config in ("llama4_text", "gpt_oss"):
        tensors |= checkpoint_writer.fused(layer, case.config, case.layer)
    return tensors


def _of_the_block(case: Case, key: str) -> bool:
    """Where the block is the decoder layer itself, attention and norms are not part of it."""
    return case.block != "" or key.startswith(("router.", "experts."))


def _matrices(layer: checkpoint_writer.Layer, expert: int) -> list:
    """Gate, up and down; without a gate, up stands for it."""
    gate_up, (down,) = layer.gate_up[expert], layer.down[expert]
    return [gate_up[0], gate_up[-1], down]


def _linear(prefix: str, matrix: checkpoint_writer.Matrix) -> dict[str, np.ndarray]:
    return {
        f"{prefix}.weight": matrix.payload,
        f"{prefix}.weight_scale": matrix.block_scale,
        f"{prefix}.weight_scale_2": np.asarray(matrix.global_scale),
        f"{prefix}.input_scale": np.asarray(matrix.input_scale),
    }


def _as_saved(model, key: str, value: np.ndarray) -> np.ndarray:
    """In the dtype of a bfloat16 model that keeps some modules in float32."""
    if value.dtype == np.int64:
        return value
    if key.endswith(("e_score_correction_bias", "gate.bias", "router_bias")):
        return value.astype(np.float32)
    strict = model._keep_in_fp32_modules_strict or ()
    dtype = np.float32 if any(key.endswith(f".{name}") for name in strict) else checkpoint_writer.BF16
    stored = value.astype(dtype)
    np.testing.assert_array_equal(stored.astype(np.float64), value)
    return stored


def minimal(case: Case, change: dict = {}) -> dict:  # noqa: B006 (not changed)
    """The config with sizes and the number of experts per token only, and a change."""
    from transformers import CONFIG_MAPPING

    defaults = CONFIG_MAPPING[case.config](**case.sizes).to_dict()
    text = {key: defaults[key] for key in K_KEYS if key in defaults}
    text = {"model_type": case.config} | case.sizes | text | change
    text = {key: value for key, value in text.items() if value != config_variants.REMOVE}
    if case.wrap is None:
        return text
    if case.wrap == "qwen3_omni_moe":
        thinker = {"model_type": "qwen3_omni_moe_thinker", "text_config": text}
        return {"model_type": case.wrap, "thinker_config": thinker}
    return {"model_type": case.wrap, "text_config": text}


def generate(name: str, out: Path) -> None:
    import torch

    case = CASES[name]
    rng = np.random.default_rng(list(name.encode()))
    model, config = make_model(case)
    ending = f"layers.{case.layer}.{case.block}".rstrip(".")
    module, block = next((n, m) for n, m in model.named_modules() if n.endswith(ending) and hasattr(m, "experts"))
    block = block.to_empty(device="cpu").eval().double()
    router = router_of(block)
    text = model.config.get_text_config()
    arrays = {}
    with torch.no_grad():
        layer = fill(rng, block, len(block.experts.down_proj), getattr(router, "top_k", 0))
        x = grid(rng, (16 * TOKENS, HIDDEN), 1 / 4)
        x = x[steady(rng, router, block, x)][:TOKENS]
        inputs = [torch.from_numpy(x)]
        if hasattr(router, "tid2eid"):
            arrays["token_ids"] = rng.integers(0, VOCAB, TOKENS)
            inputs.append(torch.from_numpy(arrays["token_ids"]))
        ids, weights = routing_of(router, block, *inputs)
        if case.block == "" or getattr(text, "moe_latent_size", None):
            x_experts = grid(rng, (TOKENS, _input_size(layer)), 1 / 4)
            arrays["x_experts"] = x_experts.astype(np.float32)
            y = block.experts(torch.from_numpy(x_experts), ids, weights.double())
        else:
            y = block(*(value[None] for value in inputs))
    y = y[0] if isinstance(y, tuple) else y
    tensors = stored_tensors(case, model, module, block, layer)
    arrays |= {"x": x.astype(np.float32), "ids": ids.numpy().astype(np.int32), "weights": weights.double().numpy()}
    arrays["y"] = y.reshape(TOKENS, -1).numpy().astype(np.float32)

    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    (out / "minimal.json").write_text(json.dumps(minimal(case), indent=1) + "\n")
    checkpoint_writer.write_file(out / "model.safetensors", tensors)
    np.savez_compressed(out / "expected.npz", **arrays)
    variants = {}
    with torch.no_grad():
        for number, change in enumerate(config_variants.VARIANTS.get(name, ())):
            found = variant(rng, case, change, block, arrays)
            variants |= {f"{number}.{key}": value for key, value in found.items()}
    np.savez_compressed(out / "variants.npz", **variants)


def _input_size(layer: checkpoint_writer.Layer) -> int:
    return 2 * layer.gate_up[0][0].payload.shape[1]


def main() -> None:
    root = Path(sys.argv[1])
    for name in sys.argv[2:] or CASES:
        print(name, flush=True)
        generate(name, root / name)
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    (root / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
