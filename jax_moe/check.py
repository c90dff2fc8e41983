"""Argument checks of the public calls: every mistake is an error while tracing, and names its argument."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import activations, arguments, layouts, nvfp4
from jax_moe.experts import Experts, Projection
from jax_moe.operands import expert_operands
from jax_moe.problem import Combine, Options, OUT_DTYPES, Precision, Problem, WeightOn
from jax_moe.routing import Routing


def check(x, experts, routing, options: Options, *, expert_offset, num_experts) -> Problem:
    """Checks the arguments of :func:`jax_moe.fused_moe` and returns what is static about them.

    Raises:
      TypeError, ValueError: naming the argument, what it got and what it needs.
    """
    arguments.instance("experts", experts, Experts)
    arguments.instance("routing", routing, Routing)
    options = _check_options(options)

    *leading, hidden = arguments.array("x", x, jnp.bfloat16, ("...", "H"))
    *routed, slots = arguments.array("routing.expert_ids", routing.expert_ids, jnp.int32, ("...", "K"))
    if routed != leading:
        raise ValueError(
            f"x, routing.expert_ids: got shapes {tuple(x.shape)} and {tuple(routing.expert_ids.shape)}, need the same "
            "leading axes: [..., H] and [..., K]"
        )
    arguments.array("routing.weights", routing.weights, jnp.float32, (*leading, slots))
    if slots == 0:
        raise ValueError("routing.expert_ids: got K = 0, needs at least one slot per token")
    if not isinstance(expert_offset, int | float | np.number):
        arguments.array("expert_offset", expert_offset, jnp.int32, ())
    elif not 0 <= arguments.integer("expert_offset", expert_offset) < 2**31:
        raise ValueError(f"expert_offset: got {expert_offset}, needs 0 <= expert_offset < 2**31")

    local_experts, intermediate = _check_experts(experts, hidden, options.activation)
    if options.precision == "w4a4":
        for name, projection in (("gate_up", experts.gate_up), ("down", experts.down)):
            if projection.input_scale is None:
                raise ValueError(
                    f"experts.{name}.input_scale: got None, precision='w4a4' needs it; "
                    "jax_moe.calibrate(experts, x, routing) fills the input scales, "
                    "and precision='w4a4_dynamic' needs none"
                )
    if num_experts is not None:
        num_experts = arguments.integer("num_experts", num_experts)
        first = int(expert_offset) if isinstance(expert_offset, int | np.integer) else 0
        if num_experts < first + local_experts:
            needs = f"L = {local_experts}" + (f" after expert_offset = {first}" if first else "")
            raise ValueError(f"num_experts: got {num_experts}, needs at least {needs}")
    return Problem(
        **vars(options),
        num_tokens=math.prod(leading),
        top_k=slots,
        local_experts=local_experts,
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        layout=experts.layout,
        absent=tuple(name for name, leaf in expert_operands(experts).items() if leaf is None),
    )


def flatten(x: jax.Array, routing: Routing) -> tuple[jax.Array, Routing]:
    """``[T, H]`` and leaves ``[T, K]`` of arrays that passed :func:`check`: every leading axis is one of tokens."""
    num_tokens = math.prod(x.shape[:-1])
    return jax.tree.map(lambda array: array.reshape(num_tokens, array.shape[-1]), (x, routing))


def _check_options(options: Options) -> Options:
    """The same, with ``out_dtype`` as a NumPy dtype."""
    arguments.instance("activation", options.activation, activations.Activation)
    _check_activation(options.activation)
    arguments.choice("precision", options.precision, Precision)
    arguments.choice("combine", options.combine, Combine)
    arguments.choice("weight_on", options.weight_on, WeightOn)
    arguments.instance("command_buffer", options.command_buffer, bool)
    arguments.instance("batch_invariant", options.batch_invariant, bool)
    if options.batch_invariant and options.combine != "ordered":
        raise ValueError(
            f"batch_invariant: got True with combine={options.combine!r}, needs combine='ordered': contributions that "
            "are added in any order have no bits to keep"
        )
    return dataclasses.replace(options, out_dtype=arguments.dtype("out_dtype", options.out_dtype, OUT_DTYPES))


def _check_activation(activation: activations.Activation) -> None:
    """Its parameters become attributes of the custom call: finite Python numbers; what is divided by or clamps, > 0."""
    for field in dataclasses.fields(activation):
        value, name = getattr(activation, field.name), f"activation.{field.name}"
        is_limit = "limit" in field.name or isinstance(activation, activations.SiTU)
        if value is None and field.name in ("limit", "linear_beta"):
            continue
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: got {type(value).__name__}, needs a Python number")
        float32, number = jnp.finfo(jnp.float32), float(value)
        if not float(float32.min) <= number <= float(float32.max) or (is_limit and number < float(float32.tiny)):
            raise ValueError(f"{name}: got {value}, needs a finite number{' above 0' if is_limit else ''} in float32")


def _check_experts(experts: Experts, hidden: int, activation: activations.Activation) -> tuple[int, int]:
    """Checks the weights against the hidden size; returns (L, I), where I has the layout's padding."""
    for name, projection in (("experts.gate_up", experts.gate_up), ("experts.down", experts.down)):
        arguments.instance(name, projection, Projection)
    if hidden == 0 or hidden % nvfp4.BLOCK_SIZE:
        raise ValueError(f"x: got H = {hidden}, needs a positive multiple of {nvfp4.BLOCK_SIZE}")
    local_experts, parts = arguments.array(
        "experts.gate_up.global_scale", experts.gate_up.global_scale, jnp.float32, ("L", "P")
    )
    if parts != activations.num_parts(activation):
        raise ValueError(
            f"activation: got {type(activation).__name__}, which has {'a' if activation.gated else 'no'} gate; "
            f"experts.gate_up has P = {parts} ({'gate and up' if parts == 2 else 'up alone' if parts == 1 else '?'})"
        )
    if local_experts == 0:
        raise ValueError("experts: got no expert, needs at least one")
    return local_experts, layouts.get(experts.layout).check(experts, hidden, (local_experts, parts))
