"""What stands beside the experts in a MoE layer: the router, and the expert that every token visits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import activations, arguments, pytree, routing
from jax_moe.checkpoints import linear
from jax_moe.checkpoints.families import NUM_EXPERTS, size, TOP_K
from jax_moe.checkpoints.files import CheckpointError, Files, read_rows
from jax_moe.checkpoints.layer import Model

_FLOATS = ("F32", "BF16", "F16")


@pytree.register
@dataclasses.dataclass(frozen=True)
class Router:
    """A layer's router: ``router(x)`` is the Routing of ``x`` ``[T, H]`` of any float dtype.

    :func:`load_router` makes one from a checkpoint; without one it is, for example, ``Router(weight, k=8)``.

    Attributes:
      weight: float32 ``[E, H]``.
      bias: float32 ``[E]`` added to the logits (gpt-oss), or None.
      selection_bias: float32 ``[E]`` added to the scores for selection only (DeepSeek-V3, Nemotron-H), or None.
      k: experts per token.
      method: the rule, as for :func:`jax_moe.route`.

    Raises:
      TypeError, ValueError: when it is called: ``x``, an attribute or two of them do not fit.
    """

    weight: jax.Array
    bias: jax.Array | None = None
    selection_bias: jax.Array | None = None
    k: int = dataclasses.field(kw_only=True, metadata={"static": True})
    method: routing.Method = dataclasses.field(default=routing.Softmax(), kw_only=True, metadata={"static": True})

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 ``[T, E]`` for ``x`` ``[T, H]`` of any float dtype, computed in float32; errors as the class."""
        num_experts, hidden = arguments.floats("Router.weight", self.weight, ("E", "H"))
        if self.bias is not None:
            arguments.floats("Router.bias", self.bias, (num_experts,))
        arguments.floats("x", x, ("T", hidden))
        logits = jnp.dot(x.astype(jnp.float32), self.weight.T, precision=jax.lax.Precision.HIGHEST)
        return logits if self.bias is None else logits + self.bias

    def __call__(self, x: jax.Array) -> routing.Routing:
        return routing.route(self.logits(x), self.k, self.method, bias=self.selection_bias)


@pytree.register
@dataclasses.dataclass(frozen=True)
class SharedExpert:
    """The dense MLP that every token visits beside its routed experts.

    Attributes:
      gate_up: bfloat16 ``[P, I, H]``; P = 2 is gate then up, P = 1 has no gate.
      down: bfloat16 ``[H, I]``.
    """

    gate_up: jax.Array
    down: jax.Array

    def __call__(self, x: jax.Array, activation: activations.Activation) -> jax.Array:
        """``x`` ``[T, H]`` of any float dtype to float32 ``[T, H]``; sums and activation in float32.

        Raises:
          TypeError, ValueError: ``x``, an attribute or the activation does not fit.
        """
        arguments.instance("activation", activation, activations.Activation)
        num_parts = 2 if activation.gated else 1
        _, intermediate, hidden = arguments.floats("SharedExpert.gate_up", self.gate_up, (num_parts, "I", "H"))
        arguments.floats("SharedExpert.down", self.down, (hidden, intermediate))
        arguments.floats("x", x, ("T", hidden))
        parts = jnp.einsum(
            "th,pih->pti", x.astype(self.gate_up.dtype), self.gate_up, preferred_element_type=jnp.float32
        )
        h = activation(*parts).astype(self.down.dtype)
        return jnp.einsum("ti,hi->th", h, self.down, preferred_element_type=jnp.float32)


def open_router(model: Model, layer: int) -> Router:
    """See :func:`jax_moe.checkpoints.load_router`."""
    block, config, where = model.block(layer), model.config, model.config_file
    num_experts, hidden = size(config, where, *NUM_EXPERTS), size(config, where, "hidden_size")
    k = size(config, where, *TOP_K)
    if k > num_experts:
        raise CheckpointError(f"{where}: {TOP_K[0]}: found {k}, expected at most the {num_experts} experts")
    prefix = f"{block}.{model.family.router}."
    return Router(
        weight=jax.device_put(_floats(model.files, prefix + "weight", (num_experts, hidden))),
        bias=_optional(model.files, prefix + "bias", num_experts),
        selection_bias=_optional(model.files, prefix + "e_score_correction_bias", num_experts),
        k=k,
        method=model.family.method(config),
    )


def open_shared_expert(model: Model, layer: int) -> SharedExpert | None:
    """See :func:`jax_moe.checkpoints.load_shared_expert`."""
    block = model.block(layer)
    if model.family.shared_expert is None:
        return None
    prefix = f"{block}.{model.family.shared_expert}."
    if not any(name.startswith(prefix) for name in model.files.names()):
        return None
    hidden = size(model.config, model.config_file, "hidden_size")
    *parts, down = (
        jnp.asarray(linear.read_linear(model.files, prefix + name).weight) for name in model.family.projections[0]
    )
    for matrix, shape in [(part, (parts[0].shape[0], hidden)) for part in parts] + [
        (down, (hidden, parts[0].shape[0]))
    ]:
        if matrix.shape != shape:
            raise CheckpointError(
                f"{model.files.directory}: {prefix}*: found {list(matrix.shape)}, expected {list(shape)}"
            )
    return SharedExpert(jnp.stack(parts), down)


def _optional(files: Files, name: str, num_experts: int) -> jax.Array | None:
    return jax.device_put(_floats(files, name, (num_experts,))) if name in files.names() else None


def _floats(files: Files, name: str, shape: tuple[int, ...]) -> np.ndarray:
    info = files.info(name)
    if info.dtype not in _FLOATS or info.shape != shape:
        raise CheckpointError(f"{info}: found {info.summary}, expected {' or '.join(_FLOATS)} {list(shape)}")
    return read_rows(info).astype(np.float32)
