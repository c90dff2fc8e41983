"""``fused_moe``: the op and its operands."""

import dataclasses
import functools

import jax
from jax.interpreters import ad
import jax.numpy as jnp
import numpy as np

from jax_moe import activations, check, custom_call, derivative, nvfp4, primitive, settings
from jax_moe.experts import Experts
from jax_moe.operands import expert_operands
from jax_moe.problem import Combine, Options, Precision, Problem, WeightOn
from jax_moe.routing import Routing


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
    """Mixture-of-experts MLP with NVFP4 weights, as one XLA custom call.

    ``y[t] = sum over slots k of weights[t, k] * down(activation(gate(x[t]), up(x[t])))`` with the matrices of
    expert ``expert_ids[t, k]``. ``docs/numerics.md`` says where each rounding happens;
    ``jax_moe.reference.fused_moe`` is the same function in readable ``jnp``.

    ``jax.vmap`` over x and routing makes more tokens of the same call. ``jax.grad`` with respect to x and
    ``routing.weights`` goes through the experts, which are frozen, and straight through the roundings of activations
    (the derivative of each is taken as 1). It is for adapters (LoRA) elsewhere in a model and for routers; speed comes
    later: about 2 (forward mode) or 3 (reverse) times the multiplications of the op, in float32 and plain JAX, with
    the dense weights of one expert in memory at a time.

    Args:
      x: bfloat16 ``[..., H]`` tokens: T of them over any leading axes, none or T = 0 included.
      experts: the L local experts, ``[L, P, I, H]`` and ``[L, H, I]``; H and I multiples of 16. On a GPU they must
        have gone through :func:`jax_moe.prepare`, and L is at most 512.
      routing: int32 ``[..., K]`` expert ids and float32 ``[..., K]`` weights, with the leading axes of x. Ids are
        global: a route whose id is not in ``[expert_offset, expert_offset + L)`` adds nothing, which is how expert
        parallelism divides the work.
        A negative or too large id is skipped too, but is a caller's bug: with ``JAX_MOE_DEBUG=1`` in the
        environment while tracing, the program raises when it meets one (and cannot be exported).
      activation: SwiGLU, GeGLU, ReLU2 or SiTU; P = 2 for gated ones, else 1.
      precision: ``"w4a16"`` multiplies bfloat16 activations; ``"w4a4"`` also quantises x and the intermediate
        to NVFP4, with the experts' input scales; ``"w4a4_dynamic"`` does so with a scale that it finds for each row,
        and leaves the experts' input scales aside, if they have any.
      combine: ``"atomic"`` adds each contribution to the zeroed output, in ``out_dtype`` and any order: fastest, but on
        a GPU not reproducible, and with a bfloat16 output rounded at each of up to K additions. ``"ordered"`` sums
        them in float32 in slot order and rounds once; bitwise reproducible.
      weight_on: ``"output"`` weights each expert's output; ``"input"`` multiplies x by the routing weight,
        rounded to bfloat16, instead (Llama-4).
      expert_offset: global id of the first local expert; an int or an int32 scalar, traced or not.
      num_experts: E, the number of experts that routes may name, at least L. It affects only speed (GPU kernels are
        chosen for T*K/E tokens an expert; if None, as if E = L) and ``JAX_MOE_DEBUG``: without E it can report
        negative ids but not too large ones.
      out_dtype: bfloat16 or float32.
      command_buffer: whether XLA may record the call into a command buffer (a CUDA graph); no effect on a CPU.
      batch_invariant: a token's result is the same bit for bit in any batch, whatever its size: all GPU kernels that a
        call may be made of sum in one order, which makes some calls of few tokens slower (``docs/determinism.md``).
        Needs ``combine="ordered"``; no effect on a CPU, where it always holds. Derivatives are not meant.

    Returns:
      ``[..., H]`` of ``out_dtype``. Tokens with no local expert are exact zeros.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype, shape or value; raised while tracing.
      NotImplementedError: mapped by ``jax.vmap`` over experts or ``expert_offset``, or differentiated with respect to
        experts.
      FloatingPointError: ``jax_debug_nans`` or ``jax_debug_infs`` is set, and the output has one.
    """
    options = Options(
        activation=activation, precision=precision, combine=combine, weight_on=weight_on, out_dtype=out_dtype,
        command_buffer=command_buffer, batch_invariant=batch_invariant,
    )  # fmt: skip
    problem = check.check(x, experts, routing, options, expert_offset=expert_offset, num_experts=num_experts)
    debug_ids(routing, num_experts)
    return bind(problem, x, experts, routing, expert_offset)


def bind(
    problem: Problem, x: jax.Array, experts: Experts, routing: Routing, expert_offset, parcels: jax.Array | None = None
) -> jax.Array:
    """The op on arguments that were checked: what :func:`fused_moe` returns for them.

    ``parcels``: those that x and the routing came in (``exchange.gather_parcels``).
    """
    flat_x, flat = check.flatten(x, routing)
    weights = expert_operands(experts)
    for name in ("gate_up.payload", "down.payload"):
        weights[name] = nvfp4.payload_bytes(weights[name])
    if parcels is not None:
        problem = dataclasses.replace(problem, x_form="parcels")
    given = (flat_x, flat.expert_ids, flat.weights, jnp.asarray(expert_offset, jnp.int32), *weights.values(), parcels)
    operands = custom_call.vary_alike(*(jnp.asarray(operand) for operand in given if operand is not None))
    return primitive.fused_moe_p.bind(*operands, problem=problem).reshape(x.shape)


def debug_ids(routing: Routing, num_experts: int | None) -> None:
    """If ``JAX_MOE_DEBUG`` is set, makes the program raise where it meets an id that no expert has."""
    if settings.debugging():
        jax.debug.callback(functools.partial(_raise_on_bad_id, num_experts=num_experts), routing.expert_ids)


def _raise_on_bad_id(expert_ids: np.ndarray, num_experts: int | None) -> None:
    bad = (expert_ids < 0) | (num_experts is not None and expert_ids >= num_experts)
    for *token, slot in np.argwhere(bad)[:1]:
        where = f"token {', '.join(map(str, token))}, slot {slot}" if token else f"slot {slot}"
        limit = "" if num_experts is None else f" < E = {num_experts}"
        raise ValueError(
            f"routing.expert_ids: got {expert_ids[*token, slot]} for {where} ({bad.sum()} such ids), "
            f"needs 0 <= id{limit}"
        )


ad.primitive_jvps[primitive.fused_moe_p] = derivative.jvp  # here, because the derivative is made of the primitive
