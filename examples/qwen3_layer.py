"""One decoder layer of a Qwen3-MoE checkpoint in JAX, next to what transformers computes for it.

Run it:  python examples/qwen3_layer.py [CHECKPOINT]        (needs flax: pip install '.[nn]'; about 5 s)

The default checkpoint is a tiny one that nvidia-modelopt wrote (experts in NVFP4, the rest in bfloat16; random
weights). The mixture-of-experts half is one line, ``MoE.from_checkpoint``; the attention around it is plain ``jnp``,
so that the page shows how the module sits in a model. transformers' output for the tiny checkpoint is recorded beside
it (``tests/checkpoints/generate.py`` made both); for any other checkpoint, transformers and torch have to be
installed. For the tiny one it printed:

    layer 0 of modelopt-qwen3_moe-experts: 12 tokens, H = 64
    ours, first values:          [-8.185267   2.7882442 -1.1476004 -0.9557683]
    recorded from transformers: [-8.232107   2.7922678 -1.1965792 -0.9450086]
    relative error 4.2e-03 (the experts' inputs and intermediates are bfloat16 here, float32 there)
"""

import json
from pathlib import Path
from typing import Annotated

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
import typer

from jax_moe import checkpoints, nvfp4
from jax_moe.nn import MoE

TINY = Path(__file__).resolve().parents[1] / "tests" / "checkpoints" / "data" / "modelopt-qwen3_moe-experts"
LAYER = 0
TOKENS = 12


class RMSNorm(nnx.Module):
    """``x / rms(x) * weight`` over the last axis, in float32."""

    def __init__(self, weight: jax.Array, epsilon: float):
        self.weight, self.epsilon = nnx.Param(weight.astype(jnp.float32)), epsilon

    def __call__(self, x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon) * self.weight


class Attention(nnx.Module):
    """Causal grouped-query attention with normalised queries and keys, in float32."""

    def __init__(self, directory: Path, prefix: str, config: dict):
        def projection(name: str) -> nnx.Param:
            return nnx.Param(checkpoints.load_linear(directory, f"{prefix}{name}_proj").astype(jnp.float32))

        def norm(name: str) -> RMSNorm:
            return RMSNorm(checkpoints.load_tensor(directory, f"{prefix}{name}_norm.weight"), config["rms_norm_eps"])

        self.query, self.key, self.value, self.output = (projection(name) for name in "qkvo")
        self.query_norm, self.key_norm = norm("q"), norm("k")
        self.head_dim = config["head_dim"]
        rope = config.get("rope_parameters") or config
        self.theta = float(rope["rope_theta"])

    def __call__(self, x):
        def heads(weight):
            return (x @ weight[...].T).reshape(len(x), -1, self.head_dim)

        query, key = self.rotate(self.query_norm(heads(self.query))), self.rotate(self.key_norm(heads(self.key)))
        y = jax.nn.dot_product_attention(query[None], key[None], heads(self.value)[None], is_causal=True)
        return y.reshape(len(x), -1) @ self.output[...].T

    def rotate(self, x):
        """Rotary position embedding on the two halves of a head (Su et al. 2021)."""
        half = self.head_dim // 2
        angles = jnp.arange(len(x))[:, None] / self.theta ** (jnp.arange(half) / half)
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        first, second = x[..., :half], x[..., half:]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


class DecoderLayer(nnx.Module):
    """Attention and mixture of experts, each behind a norm and beside a residual."""

    def __init__(self, directory: Path, layer: int):
        config = json.loads((directory / "config.json").read_text())
        prefix = f"model.layers.{layer}."
        self.attention = Attention(directory, f"{prefix}self_attn.", config)
        self.input_norm, self.moe_norm = (
            RMSNorm(checkpoints.load_tensor(directory, f"{prefix}{name}_layernorm.weight"), config["rms_norm_eps"])
            for name in ("input", "post_attention")
        )
        self.moe = MoE.from_checkpoint(directory, layer)

    def __call__(self, x):
        x = x + self.attention(self.input_norm(x))
        return x + self.moe(self.moe_norm(x))


def transformers_layer(directory: Path, layer: int, x: np.ndarray) -> np.ndarray:
    """The same layer in float32 by transformers, whose experts get our dequantised weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    config.num_hidden_layers = layer + 1
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    decoder = model.model.layers[layer]
    experts = checkpoints.load_experts(directory, layer)
    gate_up, down = (
        np.array(nvfp4.dequantize(p.payload, p.block_scale, p.global_scale[..., None]))
        for p in (experts.gate_up, experts.down)
    )
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("gate_up_proj"):
                parameter.copy_(torch.from_numpy(gate_up).flatten(1, 2))
            elif name.endswith("experts.down_proj"):
                parameter.copy_(torch.from_numpy(down))
            elif name.endswith("_proj.weight"):
                dense = checkpoints.load_linear(directory, f"model.layers.{layer}.{name.removesuffix('.weight')}")
                parameter.copy_(torch.from_numpy(np.array(dense.astype(jnp.float32))))
            else:
                tensor = checkpoints.load_tensor(directory, f"model.layers.{layer}.{name}")
                parameter.copy_(torch.from_numpy(np.array(tensor.astype(jnp.float32))))
        inputs, positions = torch.from_numpy(x)[None], torch.arange(len(x))[None]
        mask = torch.full((len(x), len(x)), float("-inf")).triu(1)[None, None]
        rotary = model.model.rotary_emb(inputs, positions)
        y = decoder(inputs, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return np.asarray(y[0] if isinstance(y, tuple) else y).reshape(x.shape)


def main(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", exists=True, file_okay=False, resolve_path=True, show_default="a tiny one"
        ),
    ] = TINY,
) -> None:
    """Run the first layer of a Qwen3-MoE checkpoint here and in transformers, and print how far the two differ."""
    module = DecoderLayer(directory, LAYER)
    if directory == TINY:
        recorded = np.load(directory / "expected.npz")
        x, want, source = recorded["decoder_x"], recorded["decoder_y"], "recorded from transformers"
    else:
        x = np.random.default_rng(0).normal(size=(TOKENS, module.input_norm.weight.shape[0])).astype(np.float32)
        want, source = transformers_layer(directory, LAYER, x), "computed by transformers"
    got = nnx.jit(lambda module, x: module(x))(module, x)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    console = Console()
    console.print(f"layer {LAYER} of {directory.name}: {len(x)} tokens, H = {x.shape[1]}")
    console.print(f"ours, first values:          {np.asarray(got[0, :4])}")
    console.print(f"{source}: {want[0, :4]}")
    console.print(
        f"relative error {error:.1e} (the experts' inputs and intermediates are bfloat16 here, float32 there)"
    )


if __name__ == "__main__":
    typer.run(main)
