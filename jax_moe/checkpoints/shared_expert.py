"""The expert that every token visits beside its routed experts."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from jax_moe import activations, arguments, placement, pytree
from jax_moe.checkpoints.family import GATED, module
from jax_moe.checkpoints.files import CheckpointError
from jax_moe.checkpoints.layer import Model
from jax_moe.checkpoints.linear import Linear, read_linear


@pytree.register
@dataclasses.dataclass(frozen=True)
class SharedExpert:
    """The dense MLP that every token visits beside its routed experts.

    Attributes:
      gate_up: bfloat16 ``[P, I, H]``; P = 2 is gate then up, P = 1 has no gate.
      down: bfloat16 ``[H, I]``.
      gate_up_bias: float32 ``[P, I]``, or None.
      down_bias: float32 ``[H]``, or None.
      gate: float32 ``[1, H]``: the result is multiplied by ``sigmoid(x @ gate.T)`` (Qwen2-MoE, Qwen3-Next); or None.
      activation: its own, if that differs from the routed experts' (Step-3.5's clamps); or None.
    """

    gate_up: jax.Array
    down: jax.Array
    gate_up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None
    gate: jax.Array | None = None
    activation: activations.Activation | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, x: jax.Array, activation: activations.Activation) -> jax.Array:
        """``x`` ``[..., H]`` of any float dtype to float32 ``[..., H]``; sums and activation in float32.

        Args:
          x: the tokens.
          activation: that of the routed experts; the expert's own takes its place.

        Raises:
          TypeError, ValueError: ``x``, an attribute or the activation does not fit.
        """
        activation = activation if self.activation is None else self.activation
        arguments.instance("activation", activation, activations.Activation)
        num_parts = 2 if activation.gated else 1
        _, intermediate, hidden = arguments.floats("SharedExpert.gate_up", self.gate_up, (num_parts, "I", "H"))
        arguments.floats("SharedExpert.down", self.down, (hidden, intermediate))
        optional = {"gate_up_bias": (num_parts, intermediate), "down_bias": (hidden,), "gate": (1, hidden)}
        for name, shape in optional.items():
            if getattr(self, name) is not None:
                arguments.floats(f"SharedExpert.{name}", getattr(self, name), shape)
        arguments.floats("x", x, ("...", hidden))
        scale = None if self.gate is None else jax.nn.sigmoid(_dot(x.astype(jnp.float32), self.gate))
        out_sharding = None
        if AxisType.Explicit in (mesh := jax.typeof(self.down).sharding.mesh).axis_types:
            # The sum over I goes to where x is. What shares the devices of I is gathered from them first.
            spread, tokens = placement.axis_names(jax.typeof(self.down).sharding.spec[1]), jax.typeof(x).sharding.spec
            out_sharding = NamedSharding(mesh, tokens)
            rest = [tuple(name for name in placement.axis_names(a) if name not in spread) or None for a in tokens]
            x = jax.reshard(x, NamedSharding(mesh, PartitionSpec(*rest)))
        parts = jnp.einsum(
            "...h,pih->p...i", x.astype(self.gate_up.dtype), self.gate_up, preferred_element_type=jnp.float32
        )
        biases = [None] * num_parts if self.gate_up_bias is None else self.gate_up_bias
        h = activation(*map(_add, parts, biases)).astype(self.down.dtype)
        y = jnp.einsum("...i,hi->...h", h, self.down, preferred_element_type=jnp.float32, out_sharding=out_sharding)
        y = _add(y, self.down_bias)
        return y if scale is None else y * scale


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.dot(x, weight.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)


def _add(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)


def open_shared_expert(model: Model, layer: int) -> SharedExpert | None:
    """See :func:`jax_moe.checkpoints.load_shared_expert`."""
    block, family, settings = model.block(layer), model.family, model.settings(layer)
    names = model.files.names()
    candidates = [module(block, name) for name in family.shared_expert]
    expert = next((name for name in candidates if any(tensor.startswith(f"{name}.") for tensor in names)), None)
    if expert is None:
        key = settings.key("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
        if candidates and settings.value(key):
            raise settings.error(key, settings.value(key), f"none, because there is no {candidates[0]} in the files")
        return None

    projections = [names_ for names_ in (*family.projections, GATED) if len(names_) == len(family.projections[0])]
    chosen = next(
        (each for each in projections if any(tensor.startswith(f"{expert}.{each[0]}.") for tensor in names)),
        projections[0],
    )
    *parts, down = (read_linear(model.files, f"{expert}.{name}") for name in chosen)
    hidden, intermediate = settings.integer("hidden_size"), parts[0].weight.shape[0]
    shapes = [(intermediate, hidden)] * len(parts) + [(hidden, intermediate)]
    for linear, shape, name in zip([*parts, down], shapes, chosen, strict=True):
        if linear.weight.shape != shape:
            raise CheckpointError(
                f"{model.files.directory}: {expert}.{name}: found {list(linear.weight.shape)}, expected {list(shape)}"
            )
    used = tuple(f"{expert}.{name}." for name in chosen)
    left = [name for name in names if name.startswith(f"{expert}.") and not name.startswith(used)]
    if left:
        raise CheckpointError(f"{model.files.info(min(left))}: found a tensor that a shared expert does not have")

    gate = None
    if family.shared_expert_gate is not None:
        name = module(block, family.shared_expert_gate)
        linear = read_linear(model.files, name)
        if linear.weight.shape != (1, hidden) or linear.bias is not None:
            raise CheckpointError(
                f"{model.files.directory}: {name}: found {list(linear.weight.shape)}, expected [1, {hidden}], no bias"
            )
        gate = jax.device_put(linear.weight.astype(np.float32))
    activation = None if family.shared_activation is None else family.shared_activation(settings)
    return SharedExpert(
        jnp.stack([jnp.asarray(part.weight) for part in parts]),
        jax.device_put(down.weight),
        _stack_biases(parts),
        None if down.bias is None else jax.device_put(down.bias),
        gate,
        activation=activation,
    )


def _stack_biases(parts: list[Linear]) -> jax.Array | None:
    if all(part.bias is None for part in parts):
        return None
    zeros = np.zeros(parts[0].weight.shape[0], np.float32)
    return jnp.stack([jnp.asarray(zeros if part.bias is None else part.bias) for part in parts])
