"""Qwen3-MoE in plain JAX: from a published NVFP4 checkpoint to logits, with a cache of keys and values.

It is a module, which ``generate.py`` and ``benchmarks/whole_model.py`` import; run by itself it does nothing. It shows
how ``jax_moe`` sits in a whole model: a router and experts for each layer, and everything else in ordinary JAX.

The model is functions and a dict of arrays, not a class: a layer is a dict, so a stack of layers for ``jax.lax.scan``
is one ``jax.tree.map``, and what is sharded, donated or saved is what you see. (``qwen3_layer.py`` has flax's form.)

Shapes: B sequences, S positions, T = B*S tokens, H hidden size, V vocabulary, N layers. Sums are float32. What is
multiplied, weights and activations alike, is of ``Config.dtype``: bfloat16, or float32 to compare with something else.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_moe
from jax_moe import checkpoints
from jax_moe.progress import track


@dataclasses.dataclass(frozen=True)
class Config:
    """What the model's arrays do not say by their shapes.

    Attributes:
      layers: N.
      kv_heads, head_dim: of the attention; the query heads share the keys and values of ``kv_heads``, in order.
      theta: the base of the rotary embedding.
      norm_eps: what RMSNorm adds to the mean of squares.
      dtype: of what is multiplied, and of the cache.
    """

    layers: int
    kv_heads: int
    head_dim: int
    theta: float
    norm_eps: float
    dtype: Any = jnp.bfloat16


Params = dict[str, Any]
"""``embed`` and ``unembed`` [V, H], ``norm`` [H], and ``layers``: a list of dicts, or one dict of stacked arrays."""
Weight = jax.Array | jax_moe.Projection | jax_moe.PreparedProjection
"""``[N, C]`` of ``Config.dtype``, or in NVFP4."""
Cache = Any
"""Keys and values ``[B, S, kv_heads, head_dim]`` of each layer: a list of pairs, or a pair of stacked arrays."""
MoE = Callable[[jax.Array, jax_moe.Experts, jax_moe.Routing], jax.Array]
"""``moe(x [T, H], experts of one layer, Routing) -> float32 [T, H]``."""


# --- The model --------------------------------------------------------------------------------------------------------


def forward(
    params: Params, tokens: jax.Array, moe: MoE, config: Config, cache: Cache = None, position: jax.Array | int = 0
) -> tuple[jax.Array, Cache]:
    """The last hidden states of ``tokens``, which :func:`logits` turns into logits.

    Args:
      params: of :func:`load`.
      tokens: ints ``[B, S]``, at positions ``position .. position + S - 1``.
      moe: the MoE layer, of :func:`moe_layer`.
      config: the model's numbers.
      cache: keys and values of the earlier positions, with room for these; None: there are no earlier positions.
      position: of ``tokens[:, 0]``.

    Returns:
      float32 ``[B, S, H]``, normalised; and the cache with these positions. Without a cache, it is one of S positions.
    """

    def block(x, inputs):
        layer, layer_cache = inputs
        y, layer_cache = attention(rms_norm(x, layer["attention_norm"], config), layer, layer_cache, position, config)
        x = x + y
        moe_in = rms_norm(x, layer["moe_norm"], config).reshape(-1, x.shape[-1])
        y = moe(moe_in.astype(jnp.bfloat16), layer["experts"], layer["router"](moe_in))
        return x + y.reshape(x.shape), layer_cache

    x = params["embed"][tokens].astype(jnp.float32)
    x, cache = over_layers(block, x, params["layers"], cache)
    return rms_norm(x, params["norm"], config), cache


def over_layers(block, x, layers, cache):
    """``x`` through all layers: a scan over stacked ones, or one after another in the program."""
    if isinstance(layers, dict):
        return jax.lax.scan(block, x, (layers, cache))
    caches = []
    for layer, layer_cache in zip(layers, cache or [None] * len(layers), strict=True):
        x, layer_cache = block(x, (layer, layer_cache))
        caches.append(layer_cache)
    return x, caches


def logits(params: Params, x: jax.Array) -> jax.Array:
    """float32 ``[..., V]`` of the hidden states ``x [..., H]``."""
    return linear(x, params["unembed"])


def linear(x: jax.Array, weight: Weight) -> jax.Array:
    """float32 ``x [..., C]`` times ``weight [N, C]`` transposed. Every dense product of the model is made here."""
    if not isinstance(weight, jax.Array):
        return jax_moe.linear(x.astype(jnp.bfloat16), weight, out_dtype=jnp.float32)
    return jnp.einsum("...c,nc->...n", x.astype(weight.dtype), weight, preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, config: Config) -> jax.Array:
    """``x / rms(x) * weight`` over the last axis, in float32."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * weight


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding of ``[B, S, heads, D]``: the pair (d, d + D/2) turns by position / theta^(2d/D)."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(x: jax.Array, layer: Params, cache: Cache, position, config: Config) -> tuple[jax.Array, Cache]:
    """Causal attention of ``x [B, S, H]`` to itself and to what the cache holds: (float32 y ``[B, S, H]``, cache)."""
    batch, length, _ = x.shape

    def heads(name: str) -> jax.Array:
        return linear(x, layer[name]).reshape(batch, length, -1, config.head_dim)

    positions = position + jnp.arange(length)
    query = rotate(rms_norm(heads("query"), layer["query_norm"], config), positions, config.theta)
    key = rotate(rms_norm(heads("key"), layer["key_norm"], config), positions, config.theta)
    query, key, value = (a.astype(config.dtype) for a in (query, key, heads("value")))
    if cache is None:
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    else:
        key, value = (
            jax.lax.dynamic_update_slice(old, new, (0, position, 0, 0))
            for old, new in zip(cache, (key, value), strict=True)
        )
        mask = jnp.arange(key.shape[1]) <= positions[:, None]  # what lies behind a position is not there yet
        y = jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])
    return linear(y.reshape(batch, length, -1), layer["output"]), (key, value)


def moe_layer(mesh: Mesh | None = None, **options: Any) -> MoE:
    """The MoE layer, on one device or with its experts spread over ``mesh``; ``options`` as for ``fused_moe``."""

    def moe(x, experts, routing):
        if mesh is None:
            return jax_moe.fused_moe(x, experts, routing, out_dtype=jnp.float32, **options)
        return jax_moe.sharded_moe(x, experts, routing, mesh=mesh, out_dtype=jnp.float32, **options)

    return moe


def with_room(cache: Cache, length: int) -> Cache:
    """``cache`` with room for ``length`` positions in all."""

    def pad(array):  # [..., S, kv_heads, head_dim]
        widths = [(0, 0)] * array.ndim
        widths[-3] = (0, length - array.shape[-3])
        return jnp.pad(array, widths)

    return jax.tree.map(pad, cache)


# --- Loading ----------------------------------------------------------------------------------------------------------


def load(
    directory: str | os.PathLike[str] | checkpoints.Model,
    *,
    mesh: Mesh | None = None,
    precision: jax_moe.Precision = "w4a16",
    dtype: Any = jnp.bfloat16,
    stack: bool = False,
    widen: bool = True,
) -> tuple[Params, Config]:
    """Reads a checkpoint, layer by layer, each prepared for this device's kernels as it comes.

    Args:
      directory: of the checkpoint, or what ``checkpoints.open_model`` returned for it.
      mesh: spread the experts over it; everything else is on all of its devices.
      precision: what the experts will be run in.
      dtype: of everything beside the experts and the router; FP8 weights are widened to it.
      widen: 4-bit weights of the attention are widened to it, too; otherwise ``jax_moe.linear`` multiplies them as they
        are: a quarter of the bytes. That is for one device.
      stack: stack the layers, for a scan. Memory holds one layer twice.

    Raises:
      CheckpointError: there is no whole Qwen3-MoE checkpoint in it, or it has something that this model does not.
    """
    checkpoint = directory if isinstance(directory, checkpoints.Model) else checkpoints.open_model(directory)
    config = read_config(checkpoint, dtype)

    def place(array: jax.Array) -> jax.Array:
        return array if mesh is None else jax.device_put(array, NamedSharding(mesh, PartitionSpec()))

    def weight(name: str) -> jax.Array:
        return place(checkpoints.load_linear(checkpoint, name).astype(dtype))

    def attention_weight(name: str) -> Weight:
        try:
            return weight(name) if widen else jax_moe.prepare(checkpoints.load_projection(checkpoint, name))
        except checkpoints.CheckpointError:
            return weight(name)  # not in 4 bits; or it says what is wrong

    def norm(name: str) -> jax.Array:
        return place(checkpoints.load_tensor(checkpoint, f"{name}.weight").astype(jnp.float32))

    def load_layer(number: int) -> Params:
        prefix = f"model.layers.{number}"
        experts = checkpoints.load_experts(checkpoint, number, mesh=mesh, progress=False)
        return {
            "attention_norm": norm(f"{prefix}.input_layernorm"),
            "query": attention_weight(f"{prefix}.self_attn.q_proj"),
            "key": attention_weight(f"{prefix}.self_attn.k_proj"),
            "value": attention_weight(f"{prefix}.self_attn.v_proj"),
            "output": attention_weight(f"{prefix}.self_attn.o_proj"),
            "query_norm": norm(f"{prefix}.self_attn.q_norm"),
            "key_norm": norm(f"{prefix}.self_attn.k_norm"),
            "moe_norm": norm(f"{prefix}.post_attention_layernorm"),
            "router": jax.tree.map(place, checkpoints.load_router(checkpoint, number)),
            "experts": jax_moe.prepare(experts, precision=precision, progress=False),
        }

    layers = map(load_layer, track(range(config.layers), "load layers"))
    embed = weight("model.embed_tokens")
    is_tied = checkpoint.settings().flag("tie_word_embeddings", default=False)
    return {
        "embed": embed,
        "layers": stack_layers(layers, config.layers, mesh) if stack else list(layers),
        "norm": norm("model.norm"),
        "unembed": embed if is_tied else weight("lm_head"),
    }, config


def read_config(checkpoint: checkpoints.Model, dtype: Any = jnp.bfloat16) -> Config:
    """The model's numbers from ``config.json``; what this file does not compute is an error."""
    settings = checkpoint.settings()
    settings.choice("model_type", known=("qwen3_moe",))
    for key in ("attention_bias", "use_sliding_window"):
        settings.only(key, False)
    layers = settings.integer("num_hidden_layers")
    if checkpoints.list_layers(checkpoint) != list(range(layers)):
        raise settings.error("num_hidden_layers", layers, "that every layer has experts, and no other does")
    heads = settings.integer("num_attention_heads")
    rope = settings.value("rope_parameters") or settings.config  # the second until transformers 4
    rope = checkpoints.Settings({"rope_type": "default"} | rope, settings.where)
    scaling = checkpoints.Settings({"rope_type": "default"} | (settings.value("rope_scaling") or {}), settings.where)
    for each in (rope, scaling):
        each.choice("rope_type", "type", known=("default",))
    return Config(
        layers=layers,
        kv_heads=settings.integer("num_key_value_heads"),
        head_dim=settings.integer("head_dim", default=settings.integer("hidden_size") // heads),
        theta=rope.number("rope_theta"),
        norm_eps=settings.number("rms_norm_eps", default=1e-6),
        dtype=dtype,
    )


def stack_layers(layers: Iterator[Params], count: int, mesh: Mesh | None = None) -> Params:
    """One dict of arrays ``[N, ...]`` of ``count`` layers, each put in its place as it comes."""

    def room(leaf: jax.Array) -> jax.Array:
        spec = getattr(leaf.sharding, "spec", ())
        place = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, *spec))
        return jnp.zeros((count, *leaf.shape), leaf.dtype, device=place)

    stack: Params = {}
    for number, layer in enumerate(layers):
        stack = stack or jax.tree.map(room, layer)
        stack = jax.block_until_ready(_insert(stack, layer, number))  # else layers that were read wait in memory
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: Params, layer: Params, number: int) -> Params:
    return jax.tree.map(lambda s, leaf: jax.lax.dynamic_update_index_in_dim(s, leaf, number, 0), stack, layer)
