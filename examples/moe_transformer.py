"""A small mixture-of-experts transformer in pure JAX: the model that the other examples train, quantise and shard.

It is a module, which ``language_model.py`` and ``sharded_inference.py`` import; run by itself it does nothing.

Read it for one thing: the MoE layer is an *argument* of :func:`forward`. Training passes :func:`dense_moe`, which is
differentiable and works on plain arrays; inference passes :func:`quantized_moe` (``jax_moe.fused_moe`` on NVFP4
weights) or, in ``sharded_inference.py``, ``jax_moe.sharded_moe``. The rest of the model does not know which.

Shapes: B sequences, S positions, T = B*S tokens, H hidden size, E experts of size I, K experts per token, N layers.
Layers are stacked on a leading axis of size N and run by ``lax.scan``, so a deeper model compiles no slower. It has
RMSNorm, rotary positions, attention with a cache for decoding, and reads bytes: the vocabulary is 0..255.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

import jax_moe
from jax_moe.problem import Precision
from jax_moe.progress import track


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults make 0.8 million parameters, three quarters of them in the experts."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    intermediate: int = 96
    vocabulary: int = 256


Params = dict
MoE = Callable[[jax.Array, Any, jax_moe.Routing], jax.Array]
"""``moe(x [T, H], experts of one layer, Routing) -> float32 [T, H]``; what experts are is between it and the params."""


@functools.partial(jax.jit, static_argnums=1)
def init(key: jax.Array, config: Config) -> Params:
    """Random parameters. Matrices are ``[out, in]``, as NVFP4 weights are: the contraction axis is last."""
    n, h, e, i = config.layers, config.hidden, config.experts, config.intermediate
    keys = iter(jax.random.split(key, 8))

    def matrix(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[-1])

    return {
        "embed": matrix(config.vocabulary, h),
        "unembed": matrix(config.vocabulary, h),
        "norm": jnp.ones(h),
        "layers": {
            "attention_norm": jnp.ones((n, h)),
            "qkv": matrix(n, 3, h, h),
            "out": matrix(n, h, h),
            "moe_norm": jnp.ones((n, h)),
            "router": matrix(n, e, h),
            "experts": {"gate": matrix(n, e, i, h), "up": matrix(n, e, i, h), "down": matrix(n, e, h, i)},
        },
    }


def forward(params: Params, tokens: jax.Array, moe: MoE, config: Config, cache=None, position=0):
    """Logits of the next byte at every position.

    Args:
      params: of :func:`init`; ``params["layers"]["experts"]`` is whatever ``moe`` takes, stacked over layers.
      tokens: ints ``[B, S]``, at positions ``position .. position + S - 1``.
      moe: the MoE layer.
      config: the model's sizes.
      cache: keys and values of earlier positions, from :func:`empty_cache`, or None: no earlier positions.
      position: of ``tokens[:, 0]``.

    Returns:
      float32 logits ``[B, S, V]``, the new cache, and what went into the MoE layers: (x ``[N, T, H]``, router
      logits ``[N, T, E]``, Routing with ``[N, T, K]`` leaves). Under jit, what you don't use costs nothing.
    """

    def block(x, inputs):
        layer, layer_cache = inputs
        y, layer_cache = attention(rms_norm(x, layer["attention_norm"]), layer, layer_cache, position, config)
        x = x + y
        tokens_in = rms_norm(x, layer["moe_norm"]).reshape(-1, config.hidden)
        router_logits = tokens_in @ layer["router"].T
        routing = jax_moe.route(router_logits, config.top_k)
        y = moe(tokens_in, layer["experts"], routing)
        return x + y.reshape(x.shape), (layer_cache, (tokens_in, router_logits, routing))

    x = params["embed"][tokens] * np.sqrt(config.hidden)
    x, (cache, moe_inputs) = jax.lax.scan(block, x, (params["layers"], cache))
    return rms_norm(x, params["norm"]) @ params["unembed"].T, cache, moe_inputs


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """RMSNorm over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding of ``[B, S, heads, D]``: pairs (d, d + D/2) turn by position / 10000^(2d/D)."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attention(x: jax.Array, layer: Params, cache, position, config: Config):
    """Causal self-attention of ``x [B, S, H]`` to itself and to what the cache holds; returns (y, new cache)."""
    batch, length, hidden = x.shape
    q, k, v = ((x @ matrix.T).reshape(batch, length, config.heads, hidden // config.heads) for matrix in layer["qkv"])
    positions = position + jnp.arange(length)
    q, k = rotate(q, positions), rotate(k, positions)
    if cache is not None:
        k, v = (
            jax.lax.dynamic_update_slice(old, new, (0, position, 0, 0)) for old, new in zip(cache, (k, v), strict=True)
        )
        cache = (k, v)
    mask = jnp.arange(k.shape[1]) <= positions[:, None]  # the cache's slots beyond a query's position are empty
    y = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
    return y.reshape(batch, length, hidden) @ layer["out"].T, cache


def empty_cache(batch: int, length: int, config: Config) -> tuple[jax.Array, jax.Array]:
    """A cache for ``length`` positions: keys and values, each ``[N, B, length, heads, D]``."""
    shape = (config.layers, batch, length, config.heads, config.hidden // config.heads)
    return jnp.zeros(shape), jnp.zeros(shape)


# --- The MoE layer, dense and quantised ------------------------------------------------------------------------------


def dense_moe(x: jax.Array, experts: Params, routing: jax_moe.Routing) -> jax.Array:
    """The MoE layer for training: every expert computes every token and the routing picks. Differentiable, K/E wasted.

    The products are of the experts' dtype, float32 or bfloat16, and are summed in float32.
    """
    gate, up, down = experts["gate"], experts["up"], experts["down"]
    num_experts, intermediate, hidden = gate.shape
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    # All experts side by side in one matrix: XLA's CPU backend is twice as fast on this as on einsum("th,eih->tei").
    side_by_side = functools.partial(jnp.reshape, shape=(num_experts * intermediate, hidden))
    x = x.astype(gate.dtype)
    h = jax_moe.SwiGLU()(dot(x, side_by_side(gate).T), dot(x, side_by_side(up).T))
    slots = jax.nn.one_hot(routing.expert_ids, num_experts) * routing.weights[..., None]  # [T, K, E]
    h = h * jnp.repeat(slots.sum(1), intermediate, axis=1)
    return dot(h.astype(down.dtype), side_by_side(down.swapaxes(1, 2)))


def quantized_moe(precision: Precision) -> MoE:
    """The MoE layer for inference: ``jax_moe.fused_moe`` at ``precision`` "w4a16" or "w4a4"."""

    def moe(x, experts, routing):
        x = x.astype(jnp.bfloat16)
        return jax_moe.fused_moe(x, experts, routing, precision=precision, out_dtype=jnp.float32)

    return moe


def quantize(params: Params, tokens: ArrayLike, config: Config) -> Params:
    """The same model with NVFP4 experts, whose input scales are calibrated on ``tokens [B, S]``."""
    _, _, (x, _, routing) = jax.jit(functools.partial(forward, moe=dense_moe, config=config))(params, tokens)

    def quantize_layer(n):
        dense = params["layers"]["experts"]
        experts = jax_moe.quantize_experts(dense["gate"][n], dense["up"][n], dense["down"][n], progress=False)
        experts = jax_moe.calibrate(experts, x[n].astype(jnp.bfloat16), jax.tree.map(lambda leaf: leaf[n], routing))
        return jax_moe.prepare(experts)  # the layout of this device's kernels; on a CPU the experts as they are

    layers = [quantize_layer(n) for n in track(range(config.layers), "quantise layers")]
    return with_experts(params, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))


def with_experts(params: Params, experts) -> Params:
    """``params`` with other experts."""
    return params | {"layers": params["layers"] | {"experts": experts}}


# --- Decoding, and saving ---------------------------------------------------------------------------------------------


def generate(params: Params, prompt, moe: MoE, config: Config, *, new: int, temperature: float = 0.0, seed: int = 0):
    """Continues every row of ``prompt [B, S]`` by ``new`` bytes; the best one each time if ``temperature`` is 0.

    Decoding is a ``lax.scan`` inside one jitted call for a chunk of bytes: within it nothing returns to Python. Between
    chunks the progress bar moves.

    Returns:
      The new bytes, ints ``[B, new]``, and how many were made per second, all rows together, without the first chunk,
      which compiles.
    """
    batch, length = prompt.shape
    chunk = min(32, new)

    def pick(logits, position):
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits / temperature)

    @jax.jit
    def prefill(params, prompt):
        logits, cache, _ = forward(params, prompt, moe, config, empty_cache(batch, length + new + chunk, config))
        return pick(logits[:, -1], length), cache

    @functools.partial(jax.jit, donate_argnames="state")  # the cache is updated in place
    def decode(params, state, positions):
        def step(state, position):
            token, cache = state
            logits, cache, _ = forward(params, token[:, None], moe, config, cache, position)
            return (pick(logits[:, 0], position + 1), cache), token

        return jax.lax.scan(step, state, positions)

    state = prefill(params, prompt)
    pieces, start = [], 0.0
    for first in track(range(length, length + new, chunk), f"generate, {chunk} bytes each"):
        state, tokens = decode(params, state, first + jnp.arange(chunk))
        pieces.append(np.asarray(tokens).T)  # waits for the chunk
        start = start or time.perf_counter()
    speed = batch * chunk * (len(pieces) - 1) / (time.perf_counter() - start)
    return np.concatenate(pieces, axis=1)[:, :new], speed


def save(path: pathlib.Path, params: Params, config: Config) -> None:
    """Writes the model as one ``.npz`` file."""
    leaves = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in jax.tree.leaves_with_path(params)}
    np.savez(path, allow_pickle=False, config=json.dumps(dataclasses.asdict(config)), **leaves)


def load(path: pathlib.Path) -> tuple[Params, Config]:
    """Reads what :func:`save` wrote."""
    with np.load(path) as file:
        config = Config(**json.loads(str(file["config"])))
        like = jax.eval_shape(lambda: init(jax.random.key(0), config))
        return jax.tree.map_with_path(lambda key, _: jnp.asarray(file[jax.tree_util.keystr(key)]), like), config
