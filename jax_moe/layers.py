"""What stands beside the experts in a MoE layer: its router, and the expert that every token visits.

Frozen dataclasses registered as pytrees, called on ``x``. ``jax_moe.checkpoints`` reads them from files, and
``jax_moe.nn.MoE`` makes a layer of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_moe import activations, arguments, placement, pytree, routing


@pytree.register
@dataclasses.dataclass(frozen=True)
class Router:
    """A layer's router: ``router(x)`` is the Routing ``[..., k]`` of ``x`` ``[..., H]`` of any float dtype.

    :func:`jax_moe.checkpoints.load_router` reads one; without a checkpoint it is, for example, ``Router(weight, k=8)``.

    Attributes:
      weight: float32 ``[E, H]``.
      bias: float32 ``[E]`` added to the logits (gpt-oss), or None.
      selection_bias: float32 ``[E]`` added to the scores for selection only (DeepSeek-V3 and its heirs), or None.
      expert_scale: float32 ``[E]`` that multiplies the weights of the chosen experts (Gemma 4), or None.
      k: experts per token.
      method: the rule, as for :func:`jax_moe.route`.
      norm_eps: ``x / sqrt(mean(x**2) + norm_eps)`` takes the place of x (Gemma 4); None: x as it is.

    Raises:
      TypeError, ValueError: when it is called: ``x``, an attribute or two of them do not fit.
    """

    weight: jax.Array
    bias: jax.Array | None = None
    selection_bias: jax.Array | None = None
    expert_scale: jax.Array | None = None
    k: int = dataclasses.field(kw_only=True, metadata={"static": True})
    method: routing.Method = dataclasses.field(default=routing.Softmax(), kw_only=True, metadata={"static": True})
    norm_eps: float | None = dataclasses.field(default=None, kw_only=True, metadata={"static": True})

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 ``[..., E]`` for ``x`` ``[..., H]`` of any float dtype, computed in float32; errors as the class."""
        num_experts, _ = arguments.floats("Router.weight", self.weight, ("E", "H"))
        for name in ("bias", "expert_scale"):
            if getattr(self, name) is not None:
                arguments.floats(f"Router.{name}", getattr(self, name), (num_experts,))
        logits = _logits(x, self.weight, self.norm_eps)
        return logits if self.bias is None else logits + jnp.broadcast_to(self.bias.astype(jnp.float32), logits.shape)

    def __call__(self, x: jax.Array) -> routing.Routing:
        chosen = routing.route(self.logits(x), self.k, self.method, bias=self.selection_bias)
        if self.expert_scale is None:
            return chosen
        return dataclasses.replace(chosen, weights=chosen.weights * _take(self.expert_scale, chosen.expert_ids))


@pytree.register
@dataclasses.dataclass(frozen=True)
class HashRouter:
    """A router whose experts are fixed for each token id (DeepSeek-V4's first layers); x has a say in the weights only.

    ``router(x, token_ids)`` is the Routing ``[..., K]`` of ``x`` ``[..., H]`` of any float dtype and integer
    ``token_ids`` ``[...]``. An id outside the vocabulary gets experts of id -1, which no backend runs and debug mode
    reports.

    Attributes:
      weight: float32 ``[E, H]``.
      token_table: int32 ``[V, K]``, the experts of each token id.
      method: how scores become weights: its ``scores``, ``renormalize`` and ``scaling_factor``.

    Raises:
      TypeError, ValueError: when it is called: ``x``, ``token_ids``, an attribute or two of them do not fit.
    """

    weight: jax.Array
    token_table: jax.Array
    method: routing.DeepSeekV3 = dataclasses.field(kw_only=True, metadata={"static": True})

    def __call__(self, x: jax.Array, token_ids: jax.Array) -> routing.Routing:
        logits = _logits(x, self.weight, None)
        arguments.array("token_ids", token_ids, None, x.shape[:-1])
        if not jnp.issubdtype(token_ids.dtype, jnp.integer):
            raise TypeError(f"token_ids: got dtype {token_ids.dtype}, needs integers")
        token_ids = jnp.asarray(token_ids)
        if token_ids.dtype.itemsize < 4:  # too narrow for the vocabulary's size, which they are compared with
            token_ids = token_ids.astype(jnp.int32)
        arguments.array("HashRouter.token_table", self.token_table, jnp.int32, ("V", "K"))
        arguments.instance("HashRouter.method", self.method, routing.DeepSeekV3)
        known = (token_ids >= 0) & (token_ids < self.token_table.shape[0])
        chosen = jnp.where(known[..., None], _take(self.token_table, token_ids), -1)
        scores = routing.score(logits, self.method.scores)
        return routing.Routing(
            chosen, routing.weigh(scores, chosen, self.method.renormalize, self.method.scaling_factor)
        )


def _logits(x: jax.Array, weight: jax.Array, norm_eps: float | None) -> jax.Array:
    _, hidden = arguments.floats("Router.weight", weight, ("E", "H"))
    arguments.floats("x", x, ("...", hidden))
    x = x.astype(jnp.float32)
    if norm_eps is not None:
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + norm_eps)
    return _dot(x, weight)


def _take(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]``; on an explicit mesh it lies where ``ids`` do."""
    place = jax.typeof(ids).sharding
    explicit = AxisType.Explicit in place.mesh.axis_types
    rest = (None,) * (table.ndim - 1)
    out_sharding = NamedSharding(place.mesh, PartitionSpec(*place.spec, *rest)) if explicit else None
    return jnp.asarray(table).at[ids].get(mode="clip", out_sharding=out_sharding)


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
        num_parts = activations.num_parts(activation)
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
        bias = self.gate_up_bias
        # Indexed: JAX iterates over no array that is spread over several processes.
        each = [_add(parts[part], None if bias is None else bias[part]) for part in range(num_parts)]
        h = activation(*each).astype(self.down.dtype)
        y = jnp.einsum("...i,hi->...h", h, self.down, preferred_element_type=jnp.float32, out_sharding=out_sharding)
        y = _add(y, self.down_bias)
        return y if scale is None else y * scale


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.dot(x, weight.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)


def _add(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
