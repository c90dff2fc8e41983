"""The router of a MoE layer, read from a checkpoint: what chooses a token's experts, by its hidden state or its id."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from jax_moe import arguments, pytree, routing
from jax_moe.checkpoints.family import module, NUM_EXPERTS, TOP_K
from jax_moe.checkpoints.files import CheckpointError, Files, FLOATS, read_floats, read_rows
from jax_moe.checkpoints.layer import Model


@pytree.register
@dataclasses.dataclass(frozen=True)
class Router:
    """A layer's router: ``router(x)`` is the Routing ``[..., k]`` of ``x`` ``[..., H]`` of any float dtype.

    :func:`load_router` makes one from a checkpoint; without one it is, for example, ``Router(weight, k=8)``.

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
    return jnp.dot(x, weight.T.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _take(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]``; on an explicit mesh it lies where ``ids`` do."""
    place = jax.typeof(ids).sharding
    explicit = AxisType.Explicit in place.mesh.axis_types
    rest = (None,) * (table.ndim - 1)
    out_sharding = NamedSharding(place.mesh, PartitionSpec(*place.spec, *rest)) if explicit else None
    return jnp.asarray(table).at[ids].get(mode="clip", out_sharding=out_sharding)


def open_router(model: Model, layer: int) -> Router | HashRouter:
    """See :func:`jax_moe.checkpoints.load_router`."""
    block, family, settings = model.block(layer), model.family, model.settings(layer)
    num_experts, hidden = settings.integer(*NUM_EXPERTS), settings.integer("hidden_size")
    k, method = settings.integer(*TOP_K, default=family.top_k), family.method(settings)
    candidates = num_experts
    if isinstance(method, routing.DeepSeekV2 | routing.DeepSeekV3):
        candidates = num_experts // method.num_groups * method.top_groups
    if k > candidates or (isinstance(method, routing.SparseMixer) and k != 2):
        expected = "2" if isinstance(method, routing.SparseMixer) else f"at most the {candidates} experts of {method}"
        raise settings.error(settings.key(*TOP_K), k, expected)
    tensors = _Tensors(model.files)
    name = router_module(model, layer)
    linear = f"{name}.proj" if family.normalized_router else name
    weight = tensors.floats(f"{linear}.weight", (num_experts, hidden))
    table = family.token_table(settings)
    if table is not None:
        if not isinstance(method, routing.DeepSeekV3):
            raise TypeError(f"{family.name}: got {method!r} beside a token table, needs DeepSeekV3")
        vocabulary = settings.integer("vocab_size") if "vocab_size" in settings.config else None
        ids = tensors.integers(module(block, table), vocabulary, k, num_experts)
        router = HashRouter(jax.device_put(weight), jax.device_put(ids), method=method)
    else:
        parts: dict[str, np.ndarray | float] = {}
        if family.router_bias:
            parts["bias"] = tensors.floats(f"{linear}.bias", (num_experts,))
        if family.selection_bias and isinstance(method, routing.DeepSeekV3):
            candidates = [module(block, bias) for bias in family.selection_bias]
            chosen = next((bias for bias in candidates if bias in model.files.names()), candidates[0])
            parts["selection_bias"] = tensors.floats(chosen, (num_experts,), (1, num_experts))
        if family.normalized_router:
            weight = weight * tensors.floats(f"{name}.scale", (hidden,)) / np.float32(np.sqrt(hidden))
            parts["expert_scale"] = tensors.floats(f"{name}.per_expert_scale", (num_experts,))
        leaves = {key: jax.device_put(value) for key, value in parts.items()}
        norm_eps = settings.number("rms_norm_eps", default=1e-6) if family.normalized_router else None
        router = Router(jax.device_put(weight), **leaves, k=k, method=method, norm_eps=norm_eps)
    _check_explained(model, layer, tensors.read)
    return router


def router_module(model: Model, layer: int) -> str:
    """The router's module in the files of a layer."""
    candidates = [module(model.block(layer), name) for name in model.family.router]
    present = (name for name in candidates if any(tensor.startswith(f"{name}.") for tensor in model.files.names()))
    return next(present, candidates[0])


def _check_explained(model: Model, layer: int, read: set[str]) -> None:
    """Refuses tensors of the block that nothing reads: leaving one out could make another function of it."""
    block, family = model.block(layer), model.family
    known = [*family.shared_expert, *family.others, *filter(None, [family.shared_expert_gate])]
    others = tuple(f"{module(block, name)}." for name in known)
    left = [name for name in model.beside(layer) if name not in read and not name.startswith(others)]
    if left:
        raise CheckpointError(
            f"{model.files.info(left[0])}: found a tensor that the block of {family.name} does not have, or has no "
            "use for with this configuration's routing; leaving it out could change the result"
        )


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """Reads small tensors, checked, and knows which."""

    files: Files
    read: set[str] = dataclasses.field(default_factory=set)

    def floats(self, name: str, *shapes: tuple[int, ...]) -> np.ndarray:
        """float32, finite, of one of ``shapes``; the first is that of the result."""
        info = self.files.info(name)
        if info.dtype not in FLOATS or info.shape not in shapes:
            raise CheckpointError(f"{info}: found {info.summary}, expected {' or '.join(FLOATS)} {list(shapes[0])}")
        self.read.add(name)
        return read_floats(info).reshape(shapes[0])

    def integers(self, name: str, rows: int | None, columns: int, bound: int) -> np.ndarray:
        """int32 ``[rows, columns]`` (None: any number of rows), each in ``[0, bound)``."""
        info = self.files.info(name)
        if info.dtype not in ("I64", "I32") or len(info.shape) != 2 or info.shape != (rows or info.shape[0], columns):
            raise CheckpointError(f"{info}: found {info.summary}, expected I64 or I32 [{rows or 'V'}, {columns}]")
        values = read_rows(info)
        if ((values < 0) | (values >= bound)).any():
            raise CheckpointError(f"{info}: found experts outside [0, {bound}), expected their ids")
        self.read.add(name)
        return values.astype(np.int32)
