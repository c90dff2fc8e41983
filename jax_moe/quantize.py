"""From dense weights to ``Experts``: quantisation, and calibration of the input scales."""

import dataclasses

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jax_moe import activations, arguments, check, nvfp4, placement, reference, stacking
from jax_moe.experts import CANONICAL, Experts, Projection
from jax_moe.problem import Options, WeightOn
from jax_moe.progress import track
from jax_moe.routing import Routing

Dense = jax.Array | np.ndarray
"""Dense weights: on a device, on the host, or a memory map."""


def quantize_experts(
    gate: Dense | None,
    up: Dense,
    down: Dense,
    *,
    gate_bias: Dense | None = None,
    up_bias: Dense | None = None,
    down_bias: Dense | None = None,
    progress: bool = True,
) -> Experts:
    """Quantises one layer's dense experts to NVFP4, one expert at a time.

    Each matrix of each expert gets the global scale amax / (6 * 448). Beyond the result itself, memory holds
    one expert, so ``gate``, ``up`` and ``down`` may be host arrays or memory maps larger than the device.

    Args:
      gate: ``[E, I, H]`` of any float dtype, or None for activations without a gate.
      up: ``[E, I, H]``.
      down: ``[E, H, I]``.
      gate_bias, up_bias: ``[E, I]``, both or neither where there is a gate.
      down_bias: ``[E, H]``.
      progress: show a progress bar on a terminal, if it takes longer than a second.

    Returns:
      Experts in the canonical layout, without input scales.

    Raises:
      TypeError, ValueError: shapes do not fit one another, H or I is not a multiple of 16, or an array is spread over
        devices: quantise what each of them has inside ``jax.shard_map`` over E, or before it is placed.
    """
    num_experts, intermediate, hidden = arguments.floats("up", up, ("E", "I", "H"))
    arguments.floats("down", down, (num_experts, hidden, intermediate))
    for name, array, shape in (
        ("gate", gate, (num_experts, intermediate, hidden)),
        ("gate_bias", gate_bias, (num_experts, intermediate)),
        ("up_bias", up_bias, (num_experts, intermediate)),
        ("down_bias", down_bias, (num_experts, hidden)),
    ):
        if array is not None:
            arguments.floats(name, array, shape)
    if num_experts == 0:
        raise ValueError("up: got E = 0, needs at least one expert")
    for name, size in (("H", hidden), ("I", intermediate)):
        if size == 0 or size % nvfp4.BLOCK_SIZE:
            raise ValueError(f"up: got {name} = {size}, needs a positive multiple of {nvfp4.BLOCK_SIZE}")
    if gate is None and gate_bias is not None:
        raise ValueError("gate_bias: got an array, but there is no gate")
    if gate is not None and (gate_bias is None) != (up_bias is None):
        raise ValueError("gate_bias, up_bias: got only one of them, needs both or neither")

    for name, array in (
        ("gate", gate), ("up", up), ("down", down),
        ("gate_bias", gate_bias), ("up_bias", up_bias), ("down_bias", down_bias),
    ):  # fmt: skip
        arguments.in_one_place(name, array)
    gate, up, down = placement.refuse_to_gather("quantize_experts", (gate, up, down))

    parts = (up,) if gate is None else (gate, up)
    biases = (up_bias,) if gate is None else (gate_bias, up_bias)

    def quantize_expert(expert):
        pair = [quantize_matrix(part) for part in expert[0]]
        return jax.tree.map(lambda *p: jnp.stack(p), *pair), quantize_matrix(expert[1])

    indices = track(range(num_experts), "quantize experts", enabled=progress)
    gate_up_leaves, down_leaves = stacking.map_in_turn(quantize_expert, (parts, down), indices)
    gate_up_bias = None if up_bias is None else jnp.stack([jnp.asarray(b, jnp.float32) for b in biases], axis=1)
    return Experts(
        gate_up=Projection(*gate_up_leaves, bias=gate_up_bias),
        down=Projection(*down_leaves, bias=None if down_bias is None else jnp.asarray(down_bias, jnp.float32)),
    )


def quantize_projection(
    weights: Dense, *, bias: Dense | None = None, input_scale: jax.Array | None = None
) -> Projection:
    """Quantises dense matrices to NVFP4, for :func:`jax_moe.linear` and :func:`jax_moe.ragged_dot`.

    Each gets the global scale amax / (6 * 448); one after the other, as :func:`quantize_experts` does.

    Args:
      weights: ``[N, C]`` or ``[G, N, C]`` of any float dtype, in ``y = x @ W.T`` orientation; C a multiple of 16.
      bias: ``[N]`` or ``[G, N]``, or None.
      input_scale: float32 ``[]`` or ``[G]``, the NVFP4 global scale of what is multiplied with them (w4a4), or None.

    Raises:
      TypeError, ValueError: shapes do not fit one another, or an array is spread over devices.
    """
    *lead, rows, columns = shape = arguments.floats("weights", weights, ("...", "N", "C"))
    if len(lead) > 1 or 0 in shape or columns % nvfp4.BLOCK_SIZE:
        raise ValueError(f"weights: got shape {shape}, needs [N, C] or [G, N, C], C a multiple of {nvfp4.BLOCK_SIZE}")
    if bias is not None:
        arguments.floats("bias", bias, (*lead, rows))
        arguments.in_one_place("bias", bias)
        bias = jnp.asarray(bias, jnp.float32)
    if input_scale is not None:
        arguments.array("input_scale", input_scale, jnp.float32, tuple(lead) if jnp.ndim(input_scale) else ())
    arguments.in_one_place("weights", weights)
    weights = placement.refuse_to_gather("quantize_projection", weights)
    leaves = stacking.map_in_turn(quantize_matrix, weights, range(lead[0])) if lead else quantize_matrix(weights)
    return Projection(*leaves, input_scale=input_scale, bias=bias)


@jax.jit
def quantize_matrix(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Payload, block scale and global scale of a dense ``[N, C]``, as in :func:`quantize_experts`."""
    matrix = matrix.astype(jnp.float32)
    global_scale = nvfp4.global_scale_for(nvfp4.amax(matrix))
    return *nvfp4.quantize(matrix, global_scale), global_scale


def calibrate(
    experts: Experts,
    x: jax.Array,
    routing: Routing,
    *,
    activation: activations.Activation = activations.SwiGLU(),
    weight_on: WeightOn = "output",
) -> Experts:
    """Fills the input scales that ``precision="w4a4"`` needs, from one batch of real activations.

    A scale is amax / (6 * 448) of what the projection reads: x for ``gate_up``, and for ``down`` each expert's
    own w4a16 intermediate. Scales that are already there are only ever raised, by the tokens that reach their
    expert, so that calling this on batch after batch covers them all. Where there are none yet, an expert that no
    token reached takes the largest scale among the others.

    Args:
      experts: canonical layout; all experts of the layer (the scale of x is shared by all of them).
      x: bfloat16 ``[..., H]``, at least one token.
      routing: of these tokens.
      activation, weight_on: as ``fused_moe`` will be called.

    Returns:
      The experts with ``gate_up.input_scale`` (``[]``) and ``down.input_scale`` (``[E]``) set.

    Raises:
      TypeError, ValueError: as ``fused_moe``, or the tokens have nothing to measure: there are none, their values or
        intermediates are not finite, or all zeros where there is no scale yet. Under ``jax.jit`` values are not seen.
    """
    options = Options(
        activation=activation, precision="w4a16", combine="ordered", weight_on=weight_on, out_dtype=jnp.float32,
        command_buffer=True,
    )  # fmt: skip
    check.check(x, experts, routing, options, expert_offset=0, num_experts=None)
    if experts.layout != CANONICAL:
        raise ValueError(f"experts.layout: got {experts.layout!r}, calibration needs {CANONICAL!r}")
    x, routing = check.flatten(x, routing)
    if x.shape[0] == 0:
        raise ValueError("x: got no tokens, calibration needs at least one")
    x_amax, h_amax = _amaxes(experts, x, routing, activation, weight_on)
    if not isinstance(h_amax, jax.core.Tracer):
        _check_amaxes(experts, x_amax, h_amax)
    if experts.down.input_scale is None:
        h_amax = jnp.where(h_amax == 0, jnp.max(h_amax), h_amax)

    def raise_to(projection: Projection, amax: jax.Array) -> Projection:
        scale = nvfp4.global_scale_for(amax)
        if projection.input_scale is not None:
            scale = jnp.where(amax == 0, projection.input_scale, jnp.maximum(scale, projection.input_scale))
        return dataclasses.replace(projection, input_scale=scale)

    return dataclasses.replace(experts, gate_up=raise_to(experts.gate_up, x_amax), down=raise_to(experts.down, h_amax))


def _check_amaxes(experts: Experts, x_amax: jax.Array, h_amax: jax.Array) -> None:
    """Raises where a batch would make scales that no later batch could mend: they are only ever raised."""
    if not jnp.isfinite(x_amax):
        raise ValueError("x: got NaN or infinity, calibration needs finite values")
    if not jnp.isfinite(h_amax).all():
        expert = jnp.argmin(jnp.isfinite(h_amax))
        raise ValueError(f"x: expert {expert} makes NaN or infinity of these tokens, calibration needs finite values")
    if experts.gate_up.input_scale is None and x_amax == 0:
        raise ValueError("x: got only zeros, calibration needs real activations")
    if experts.down.input_scale is None and jnp.max(h_amax) == 0:
        raise ValueError("routing: no token reaches an expert and leaves it with anything but zeros")


def _local_amaxes(where: placement.Placement, experts, x, routing, activation, weight_on):
    """The largest magnitudes of what gate_up reads, ``[]``, and of what each local expert's down reads, ``[L]``."""
    num_experts = experts.down.global_scale.shape[0]
    first = jax.lax.axis_index(where.expert_axes) * num_experts if where.expert_axes else 0

    def expert_amax(expert):
        chosen = routing.expert_ids == expert + first
        if weight_on == "output":
            h = reference.intermediate(x, experts, expert, activation=activation, precision="w4a16")
            return nvfp4.amax(jnp.where(chosen.any(1)[:, None], h, 0))
        amaxes = []
        for slot in range(routing.expert_ids.shape[1]):
            weighted = reference.weighted_input(x, routing.weights[:, slot])
            h = reference.intermediate(weighted, experts, expert, activation=activation, precision="w4a16")
            amaxes.append(nvfp4.amax(jnp.where(chosen[:, slot, None], h, 0)))
        return nvfp4.amax(jnp.stack(amaxes))

    x_amax = nvfp4.amax(x)
    if weight_on == "input":
        x_amax = nvfp4.amax(reference.weighted_input(x[:, None], routing.weights))
    h_amax = jax.lax.map(expert_amax, jnp.arange(num_experts))
    return x_amax, jax.lax.pmax(h_amax, where.tensor_axes) if where.tensor_axes else h_amax


_amaxes = placement.InPlace(
    "calibrate",
    _local_amaxes,
    lambda where, experts, *_: (jax.sharding.PartitionSpec(), where.specs(experts).down.global_scale),
    num_arrays=2,
)
