"""The oracle: the op written to be read, in plain ``jnp``, one expert after another.

It runs every token through every local expert and keeps what the routing asks for, so it is slow, needs no
sorting and has no indices to get wrong. All arithmetic is float32 at the highest precision on dequantised
weights; the rounding points are those of docs/numerics.md. Its derivative goes straight through the roundings, as the
op's does: ``derivative.py`` is made of :func:`expert_mlp`.
"""

import jax
import jax.numpy as jnp

from jax_moe import activations, check, nvfp4
from jax_moe.experts import CANONICAL, Experts, Projection
from jax_moe.problem import Combine, Precision, WeightOn
from jax_moe.routing import Routing

__all__ = ["fused_moe", "ragged_dot"]


def project(x: jax.Array, weights: Projection, input_scale: jax.Array | float) -> jax.Array:
    """``input_scale * global_scale * (x @ W.T) + bias`` in float32.

    Args:
      x: ``[T, C]``, without its global scale.
      weights: one matrix: payload ``[N, C/2]``, block_scale ``[N, C/16]``, global_scale ``[]``, bias ``[N]``.
      input_scale: the global scale of ``x``: one, or ``[T]``, one of each row.

    Returns:
      float32 ``[T, N]``.
    """
    matrix = nvfp4.dequantize(weights.payload, weights.block_scale)
    products = jnp.dot(x.astype(jnp.float32), matrix.T, precision=jax.lax.Precision.HIGHEST)
    scaled = products * (_over_rows(input_scale) * weights.global_scale)
    return scaled if weights.bias is None else scaled + weights.bias[None]


def intermediate(
    x: jax.Array,
    experts: Experts,
    expert: jax.Array | int,
    *,
    activation: activations.Activation,
    precision: str,
    x_is_rounded: bool = False,
) -> jax.Array:
    """The fp32 intermediate ``[T, I]`` of one local expert, before it is rounded for GEMM2."""
    input_scale: jax.Array | float = 1.0
    if precision != "w4a16":
        input_scale = _input_scale(x, precision, experts.gate_up.input_scale)
        if x_is_rounded:
            x = _straight_through(x, jax.lax.stop_gradient(x), input_scale)
        else:
            x = _quantize_dequantize(x, input_scale)
    gate_up = _select(experts.gate_up, expert)
    num_parts = gate_up.global_scale.shape[0]
    return activation(*(project(x, _select(gate_up, part), input_scale) for part in range(num_parts)))


def expert_mlp(
    x: jax.Array,
    experts: Experts,
    expert: jax.Array | int,
    *,
    activation: activations.Activation,
    precision: str,
    x_is_rounded: bool = False,
) -> jax.Array:
    """float32 ``[T, H]``: all rows of ``x`` ``[T, H]``, values that bfloat16 can hold, through one local expert.

    ``x_is_rounded``: of w4a4, as ``Problem.x_form`` says; its tangent is that of what was rounded.
    """
    h = intermediate(x, experts, expert, activation=activation, precision=precision, x_is_rounded=x_is_rounded)
    down = _select(experts.down, expert)
    if precision != "w4a4":
        h = _round_to_bfloat16(h)
    if precision == "w4a16":
        return project(h, down, 1.0)
    scale = _input_scale(h, precision, down.input_scale)
    return project(_quantize_dequantize(h, scale), down, scale)


def fused_moe(
    x: jax.Array,
    experts: Experts,
    routing: Routing,
    *,
    activation: activations.Activation = activations.SwiGLU(),
    precision: Precision = "w4a16",
    combine: Combine = "atomic",
    weight_on: WeightOn = "output",
    expert_offset: jax.Array | int = 0,
    num_experts: int | None = None,
    out_dtype=jnp.bfloat16,
    command_buffer: bool = True,
    batch_invariant: bool = False,
) -> jax.Array:
    """What :func:`jax_moe.fused_moe` computes, up to the order of float32 sums; the same arguments and result.

    ``combine``, ``num_experts``, ``command_buffer`` and ``batch_invariant`` say how it is computed, so they have no
    effect here.

    Raises:
      ValueError: the experts are prepared for a GPU; :func:`jax_moe.unprepare` undoes that.
    """
    del combine, num_experts, command_buffer, batch_invariant
    if experts.layout != CANONICAL:
        raise ValueError(
            f"experts.layout: got {experts.layout!r}, the reference needs {CANONICAL!r}; see jax_moe.unprepare"
        )
    shape = x.shape
    x, routing = check.flatten(x, routing)
    x = x.astype(jnp.float32)  # the same values, and the experts' parts of its derivative are added in float32
    local_experts = experts.down.global_scale.shape[0]
    num_slots = routing.expert_ids.shape[1]

    def add_expert(total, expert):
        chosen = routing.expert_ids == expert + expert_offset
        weights = jnp.where(chosen, routing.weights, 0)
        if weight_on == "output":
            y = expert_mlp(x, experts, expert, activation=activation, precision=precision)
            return total + jnp.where(chosen.any(1)[:, None], weights.sum(1)[:, None] * y, 0), None
        for slot in range(num_slots):
            y = expert_mlp(
                weighted_input(x, weights[:, slot]), experts, expert, activation=activation, precision=precision
            )
            total = total + jnp.where(chosen[:, slot, None], y, 0)
        return total, None

    total, _ = jax.lax.scan(add_expert, jnp.zeros(x.shape, jnp.float32), jnp.arange(local_experts))
    return total.reshape(shape).astype(out_dtype)


def ragged_dot(
    x: jax.Array,
    weights: Projection,
    group_sizes: jax.Array,
    *,
    precision: Precision = "w4a16",
    group_offset: jax.Array | int = 0,
    out_dtype=jnp.bfloat16,
    command_buffer: bool = True,
    batch_invariant: bool = False,
) -> jax.Array:
    """What :func:`jax_moe.ragged_dot` computes, up to the order of float32 sums; the same arguments and result."""
    del command_buffer, batch_invariant
    x = x.astype(jnp.float32)
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])
    total = jnp.zeros((x.shape[0], weights.payload.shape[1]), jnp.float32)
    for local in range(weights.global_scale.shape[0]):
        matrix, group = _select(weights, local), local + group_offset
        scale: jax.Array | float = 1.0
        rounded = x
        if precision != "w4a16":
            scale = _input_scale(x, precision, matrix.input_scale)
            rounded = _quantize_dequantize(x, scale)
        has_size = (group >= 0) & (group < ends.size)
        end, size = (jnp.where(has_size, array[jnp.clip(group, 0, ends.size - 1)], 0) for array in (ends, group_sizes))
        is_mine = (row >= end - size) & (row < end)
        total = jnp.where(is_mine[:, None], project(rounded, matrix, scale), total)
    return total.astype(out_dtype)


def weighted_input(x: jax.Array, weights: jax.Array) -> jax.Array:
    """``weight_on="input"``: x times its routing weight, rounded to bfloat16; ``[..., H]`` and ``[...]``."""
    return _round_to_bfloat16(x.astype(jnp.float32) * weights[..., None])


def _round_to_bfloat16(values: jax.Array) -> jax.Array:
    """float32 that bfloat16 can hold."""
    # Not by a cast: XLA's GPU backend drops a cast and the one back (xla_allow_excess_precision).
    rounded = jax.lax.reduce_precision(jax.lax.stop_gradient(values), exponent_bits=8, mantissa_bits=7)
    return _straight_through(values, rounded, jnp.float32(1))


def _quantize_dequantize(values: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 values of what ``values`` become in NVFP4 under a global scale, without that scale."""
    values = values.astype(jnp.float32)
    rounded = nvfp4.quantize_dequantize(jax.lax.stop_gradient(values), scale)
    return _straight_through(values, rounded.astype(jnp.float32), scale)


@jax.custom_jvp
def _straight_through(values: jax.Array, rounded: jax.Array, scale: jax.Array) -> jax.Array:
    """``rounded``, with the derivative of ``values / scale``, which it is but for the rounding.

    ``scale``: one, or ``[T]``, one of each row.
    """
    del values, scale
    return rounded


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    _, rounded, scale = primals
    return rounded, tangents[0] / _over_rows(scale)


def _over_rows(scale: jax.Array | float) -> jax.Array:
    """One scale as it is, ``[T]`` as ``[T, 1]``: what rows ``[T, C]`` are multiplied by."""
    scale = jnp.asarray(scale)
    return scale[:, None] if scale.ndim else scale


def _select(tree, index):
    """Indexes the lead axis of every leaf that has one."""
    return jax.tree.map(lambda leaf: leaf[index] if leaf.ndim else leaf, tree)


def _input_scale(values: jax.Array, precision: str, given: jax.Array | None) -> jax.Array:
    """The global scale of ``values`` ``[T, C]``: ``given``, or ``[T]``, made of them and constant."""
    if precision == "w4a4_dynamic":
        return nvfp4.row_scale(jax.lax.stop_gradient(values))
    if given is None:
        raise ValueError("experts: precision='w4a4' needs the input scales that jax_moe.calibrate() fills")
    return given
