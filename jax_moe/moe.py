"""``fused_moe``: the op, its argument checks and its operands."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import activations, ffi, nvfp4, plan
from jax_moe.experts import CANONICAL, Experts, Projection
from jax_moe.routing import Routing


def fused_moe(
    x: jax.Array,
    experts: Experts,
    routing: Routing,
    *,
    activation: activations.Activation = activations.SwiGLU(),
    precision: plan.Precision = "w4a16",
    combine: plan.Combine = "atomic",
    weight_on: plan.WeightOn = "output",
    expert_offset: jax.Array | int = 0,
    num_experts: int | None = None,
    out_dtype=jnp.bfloat16,
) -> jax.Array:
    """Mixture-of-experts MLP with NVFP4 weights, as one XLA custom call.

    ``y[t] = sum over slots k of weights[t, k] * down(activation(gate(x[t]), up(x[t])))`` with the matrices of
    expert ``expert_ids[t, k]``. DESIGN section 3 and ``docs/numerics.md`` say where each rounding happens;
    ``jax_moe.reference.fused_moe`` is the same function in readable ``jnp``.

    Args:
      x: bfloat16 ``[T, H]`` tokens. T = 0 is fine.
      experts: the L local experts, ``[L, P, I, H]`` and ``[L, H, I]``; H and I multiples of 16.
      routing: int32 ``[T, K]`` expert ids and float32 ``[T, K]`` weights. Ids are global: a route whose id is not
        in ``[expert_offset, expert_offset + L)`` adds nothing, which is how expert parallelism divides the work.
        A negative or too large id is skipped too, but is a caller's bug: with ``JAX_MOE_DEBUG=1`` in the
        environment while tracing, the program raises when it meets one.
      activation: SwiGLU, GeGLU, ReLU2 or SiTU; P = 2 for gated ones, else 1.
      precision: ``"w4a16"`` multiplies bfloat16 activations; ``"w4a4"`` also quantises x and the intermediate
        to NVFP4, with the experts' input scales.
      combine: ``"atomic"`` adds the contributions into the zeroed output in any order; ``"ordered"`` sums them
        in float32 in slot order, and is bitwise reproducible.
      weight_on: ``"output"`` weights each expert's output; ``"input"`` multiplies x by the routing weight,
        rounded to bfloat16, instead (Llama-4).
      expert_offset: global id of the first local expert; an int or an int32 scalar, traced or not.
      num_experts: E, the number of experts in all; only ``JAX_MOE_DEBUG`` uses it (without it, only a negative id
        is known to be wrong).
      out_dtype: bfloat16 or float32.

    Returns:
      ``[T, H]`` of ``out_dtype``. Tokens with no local expert are exact zeros.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype, shape or value; raised while tracing.
      NotImplementedError: under vmap or grad.
    """
    problem = check(
        x, experts, routing, activation=activation, precision=precision, combine=combine, weight_on=weight_on,
        expert_offset=expert_offset, out_dtype=out_dtype,
    )  # fmt: skip
    if os.environ.get("JAX_MOE_DEBUG", "0") != "0":
        jax.debug.callback(functools.partial(_raise_on_bad_id, num_experts=num_experts), routing.expert_ids)
    tokens = (x, routing.expert_ids, routing.weights, jnp.asarray(expert_offset, jnp.int32))
    weights = (*_operands(experts.gate_up), *_operands(experts.down))
    operands = _vary_alike(*map(jnp.asarray, tokens + weights))
    return ffi.fused_moe_p.bind(*operands, problem=problem)


def check(x, experts, routing, *, activation, precision, combine, weight_on, expert_offset, out_dtype) -> plan.Problem:
    """Checks the arguments of :func:`fused_moe` and returns what is static about them.

    Raises:
      TypeError, ValueError: naming the argument, what it got and what it needs.
    """
    _check_type("experts", experts, Experts)
    _check_type("routing", routing, Routing)
    _check_type("activation", activation, activations.Activation)
    _check_choice("precision", precision, plan.Precision)
    _check_choice("combine", combine, plan.Combine)
    _check_choice("weight_on", weight_on, plan.WeightOn)
    out_dtype = jnp.dtype(out_dtype)
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"out_dtype: got {out_dtype}, needs bfloat16 or float32")

    tokens, hidden = _check_array("x", x, jnp.bfloat16, ("T", "H"))
    _, slots = _check_array("routing.expert_ids", routing.expert_ids, jnp.int32, (tokens, "K"))
    _check_array("routing.weights", routing.weights, jnp.float32, (tokens, slots))
    if slots == 0:
        raise ValueError("routing.expert_ids: got K = 0, needs at least one slot per token")
    if not isinstance(expert_offset, int):
        _check_array("expert_offset", expert_offset, jnp.int32, ())
    elif not 0 <= expert_offset < 2**31:
        raise ValueError(f"expert_offset: got {expert_offset}, needs 0 <= expert_offset < 2**31")

    local_experts, intermediate = _check_experts(experts, hidden, parts=2 if activation.gated else 1)
    if precision == "w4a4":
        for name, projection in (("gate_up", experts.gate_up), ("down", experts.down)):
            if projection.input_scale is None:
                raise ValueError(
                    f"experts.{name}.input_scale: got None, precision='w4a4' needs it; "
                    "jax_moe.calibrate(experts, x, routing) fills the input scales"
                )
    return plan.Problem(
        num_tokens=tokens,
        top_k=slots,
        num_experts=local_experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=activation,
        precision=precision,
        combine=combine,
        weight_on=weight_on,
        out_dtype=out_dtype,
        layout=experts.layout,
    )


def _raise_on_bad_id(expert_ids: np.ndarray, num_experts: int | None) -> None:
    bad = (expert_ids < 0) | (num_experts is not None and expert_ids >= num_experts)
    for token, slot in np.argwhere(bad)[:1]:
        limit = "" if num_experts is None else f" < E = {num_experts}"
        raise ValueError(
            f"routing.expert_ids: got {expert_ids[token, slot]} for token {token}, slot {slot} ({bad.sum()} such ids), "
            f"needs 0 <= id{limit}"
        )


def _check_experts(experts: Experts, hidden: int, parts: int) -> tuple[int, int]:
    """Checks canonical weights against the hidden size; returns (L, I)."""
    if experts.layout != CANONICAL:
        raise ValueError(f"experts.layout: got {experts.layout!r}, needs {CANONICAL!r}")
    gate_up, down = experts.gate_up, experts.down
    for name, projection in (("experts.gate_up", gate_up), ("experts.down", down)):
        _check_type(name, projection, Projection)
    local_experts, _, intermediate, _ = _check_array(
        "experts.gate_up.payload", gate_up.payload, None, ("L", parts, "I", "H/2")
    )
    for name, size in (("x: H", hidden), ("experts: I", intermediate)):
        if size == 0 or size % nvfp4.BLOCK_SIZE:
            raise ValueError(f"{name}: got {size}, needs a positive multiple of {nvfp4.BLOCK_SIZE}")
    if local_experts == 0:
        raise ValueError("experts: got no expert, needs at least one")
    _check_projection("experts.gate_up", gate_up, (local_experts, parts), intermediate, hidden, ())
    _check_projection("experts.down", down, (local_experts,), hidden, intermediate, (local_experts,))
    return local_experts, intermediate


def _check_projection(name, projection: Projection, lead, rows, contraction, input_scale_shape) -> None:
    payload = projection.payload
    if payload.dtype == jnp.float4_e2m1fn:
        _check_array(f"{name}.payload", payload, jnp.float4_e2m1fn, (*lead, rows, contraction))
    else:
        _check_array(f"{name}.payload", payload, jnp.uint8, (*lead, rows, contraction // 2))
    blocks = contraction // nvfp4.BLOCK_SIZE
    _check_array(f"{name}.block_scale", projection.block_scale, jnp.float8_e4m3fn, (*lead, rows, blocks))
    _check_array(f"{name}.global_scale", projection.global_scale, jnp.float32, lead)
    if projection.input_scale is not None:
        _check_array(f"{name}.input_scale", projection.input_scale, jnp.float32, input_scale_shape)
    if projection.bias is not None:
        _check_array(f"{name}.bias", projection.bias, jnp.float32, (*lead, rows))


def _check_array(name: str, array, dtype, shape) -> tuple[int, ...]:
    """Checks dtype (None: any) and shape, where a string stands for any size; returns the shape."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"{name}: got {type(array).__name__}, needs an array")
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"{name}: got dtype {array.dtype}, needs {jnp.dtype(dtype)}")
    matches = len(array.shape) == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(array.shape, shape, strict=True)
    )
    if not matches:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: got shape {tuple(array.shape)}, needs [{wanted}]")
    return tuple(array.shape)


def _check_type(name: str, value, expected) -> None:
    if not isinstance(value, expected):
        names = " or ".join(cls.__name__ for cls in getattr(expected, "__args__", (expected,)))
        raise TypeError(f"{name}: got {type(value).__name__}, needs {names}")


def _check_choice(name: str, value, choices) -> None:
    allowed = choices.__args__
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(map(repr, allowed))}")


def _operands(projection: Projection) -> tuple[jax.Array, ...]:
    """The five operands of a projection; an absent one is an empty float32 array, as ``ffi/problem.h`` expects."""
    payload = projection.payload
    if payload.dtype == jnp.float4_e2m1fn:
        payload = payload.view(jnp.uint8)  # XLA counts a packed float4 as a byte each: only uint8 is unambiguous
    absent = jnp.zeros((0,), jnp.float32)
    input_scale = absent if projection.input_scale is None else projection.input_scale
    bias = absent if projection.bias is None else projection.bias
    return payload, projection.block_scale, projection.global_scale, input_scale, bias


def _vary_alike(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """Inside ``shard_map``, marks every operand as varying over each mesh axis that any of them varies over."""
    varying = [frozenset(jax.typeof(operand).mat.varying) for operand in operands]
    union = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(operand, tuple(union - axes), to="varying") if union - axes else operand
        for operand, axes in zip(operands, varying, strict=True)
    )
