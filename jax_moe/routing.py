"""Token to expert assignment: ``Routing``, and the router rules of published models."""

import dataclasses
import functools
from typing import get_args, Literal

import jax
import jax.numpy as jnp

from jax_moe import arguments, pytree, steady


@pytree.register
@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight.

    Attributes:
      expert_ids: int32 ``[..., K]``, in ``[0, E)``; the leading axes are those of the tokens.
      weights: float32 ``[..., K]``.
    """

    expert_ids: jax.Array
    weights: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """``[..., K]``, of both."""
        return self.expert_ids.shape


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Softmax over all experts, then the k largest.

    ``renormalize`` divides the k weights by their sum, which equals a softmax over the k largest logits
    (Mixtral, Qwen3-MoE with ``norm_topk_prob``, gpt-oss).
    """

    renormalize: bool = True


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """Sigmoid of each logit, then the k largest; ``renormalize`` divides the k weights by their sum."""

    renormalize: bool = False


Scores = Literal["sigmoid", "softmax", "sqrtsoftplus"]
"""Scores of the experts, from logits z: ``sqrtsoftplus`` is sqrt(log(1 + exp(z))), DeepSeek-V4's default."""


@dataclasses.dataclass(frozen=True)
class DeepSeekV2:
    """DeepSeek-V2's device-limited router (arXiv:2405.04434, section 2.2.2; ``group_limited_greedy``).

    A group of E/num_groups neighbouring experts scores the largest score in it, the ``top_groups`` best groups stay,
    and the k largest scores among them are chosen (one group: among all, ``greedy``). They are the weights, divided by
    their sum where ``renormalize`` says so, times ``scaling_factor``. The defaults are DeepSeek-V2's.
    """

    num_groups: int = 8
    top_groups: int = 3
    scaling_factor: float = 16.0
    renormalize: bool = False
    scores: Scores = "softmax"


@dataclasses.dataclass(frozen=True)
class DeepSeekV3:
    """DeepSeek-V3's auxiliary-loss-free router (arXiv:2412.19437, section 2.1.2; ``noaux_tc``), and its many heirs.

    *Selection* adds a bias per expert to the scores: a group of E/num_groups neighbouring experts scores the sum of its
    two largest biased scores, the ``top_groups`` best groups stay, and the k largest biased scores among them are
    chosen. The *weights* are the unbiased scores, divided by their sum where ``renormalize`` says so, times
    ``scaling_factor``. The defaults are DeepSeek-V3's. With one group it is also the rule of MiniMax-M2 and Step-3.5,
    of DeepSeek-V4 (``scores="sqrtsoftplus"``) and of ERNIE 4.5 (``scores="softmax"``).
    """

    num_groups: int = 8
    top_groups: int = 4
    scaling_factor: float = 2.5
    renormalize: bool = True
    scores: Scores = "sigmoid"


@dataclasses.dataclass(frozen=True)
class SparseMixer:
    """Phi-3.5-MoE's router (arXiv:2409.12136, appendix; transformers 5.24 has it as ``sparsemixer``); k is 2.

    The experts of the two largest logits are chosen. With m the logit of a chosen one, its weight is a softmax over
    the experts, without one chosen before it, whose logit z has ``(m - z) / max(abs(z), m) <= 2 * jitter``. The
    weights do not add up to 1.
    """

    jitter: float = 0.01


@dataclasses.dataclass(frozen=True)
class Llama4:
    """The k largest logits, weighted by their sigmoids; use it with ``fused_moe(weight_on="input")``."""


Method = Softmax | Sigmoid | DeepSeekV2 | DeepSeekV3 | SparseMixer | Llama4


def route(logits: jax.Array, k: int, method: Method = Softmax(), *, bias: jax.Array | None = None) -> Routing:
    """Chooses k experts for each token. Ties go to the lower expert id.

    The bits of a token's routing depend on its own logits alone: not on other tokens or how many there are, nor on
    ``jax.jit`` (``docs/determinism.md``).

    Args:
      logits: ``[..., E]``, any float dtype; everything is computed in float32.
      k: experts per token, ``1 <= k <= E``.
      method: the router's rule.
      bias: float ``[E]``, DeepSeekV3 only: added to the scores for selection, not for the weights.

    Returns:
      Routing with ``[..., k]`` leaves, the best expert first.

    Raises:
      TypeError, ValueError: an argument does not fit the above.
    """
    if not isinstance(method, Method):
        names = ", ".join(known.__name__ for known in get_args(Method))
        raise TypeError(f"method: got {method!r}, needs one of {names}")
    *_, num_experts = arguments.floats("logits", logits, ("...", "E"))
    k = arguments.integer("k", k)
    if not 1 <= k <= num_experts:
        raise ValueError(f"k: got {k}, needs 1 <= k <= E = {num_experts}")
    if bias is not None and not isinstance(method, DeepSeekV3):
        raise ValueError(f"bias: got an array, but {type(method).__name__} has no selection bias")
    if bias is not None:
        arguments.floats("bias", bias, (num_experts,))
    logits = logits.astype(jnp.float32)

    match method:
        case Softmax(renormalize=True):
            chosen, expert_ids = _top_k(logits, k)
            weights = steady.softmax(chosen)
        case Softmax():
            weights, expert_ids = _top_k(steady.softmax(logits), k)
        case Sigmoid(renormalize):
            weights, expert_ids = _top_k(steady.sigmoid(logits), k)
            weights = _normalized(weights) if renormalize else weights
        case Llama4():
            chosen, expert_ids = _top_k(logits, k)
            weights = steady.sigmoid(chosen)
        case SparseMixer(jitter):
            weights, expert_ids = _sparse_mixer(logits, k, jitter)
        case DeepSeekV2() | DeepSeekV3():
            scores = score(logits, method.scores)
            expert_ids = _grouped_top_k(scores, k, method, bias)
            weights = weigh(scores, expert_ids, method.renormalize, method.scaling_factor)
    return Routing(expert_ids.astype(jnp.int32), weights)


def score(logits: jax.Array, scores: Scores) -> jax.Array:
    """float32 scores of float32 logits ``[..., E]``.

    Raises:
      ValueError: ``scores`` is not one of ``Scores``.
    """
    arguments.choice("method.scores", scores, Scores)
    match scores:
        case "sigmoid":
            return steady.sigmoid(logits)
        case "softmax":
            return steady.softmax(logits)
        case "sqrtsoftplus":
            return steady.square_root(steady.softplus(logits))


def weigh(scores: jax.Array, expert_ids: jax.Array, renormalize: bool, scaling_factor: float) -> jax.Array:
    """Weights ``[..., K]`` of experts ``[..., K]`` that were chosen already, from scores ``[..., E]``."""
    weights = jnp.take_along_axis(scores, expert_ids, axis=-1, mode="clip")
    return (_normalized(weights) if renormalize else weights) * scaling_factor


@functools.partial(jax.jit, static_argnames="k")
def _top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """``jax.lax.top_k``, whose indices are right on a mesh of GPUs, too.

    Of values that are spread over a mesh, a program that returns the indices as they are may return wrong ones
    (openxla/xla#49005; zeros on two H200s with jaxlib 0.11.2, where ``top_k`` ran eagerly, a program of its own). With
    an operation on them that XLA cannot drop they are right.
    """
    largest, places = jax.lax.top_k(values, k)
    return largest, jnp.minimum(places, values.shape[-1] - 1)


def _normalized(weights: jax.Array) -> jax.Array:
    # Sigmoids of very negative logits all vanish: then the weights are 0, not 0/0. No other sum notices 1e-20.
    # Numerator and denominator are divided by the largest weight first, so that no derivative is too large for float32,
    # and one of what is added up is 1. What both are divided by has no derivative of its own.
    largest = jax.lax.stop_gradient(jnp.maximum(weights.max(-1, keepdims=True), 1e-20))
    weights = steady.quotient(weights, largest)
    floor = steady.quotient(jnp.full_like(largest, 1e-20), largest)
    return steady.quotient(weights, steady.sum_of_parts(weights) + floor)


def _sparse_mixer(logits: jax.Array, k: int, jitter: float) -> tuple[jax.Array, jax.Array]:
    if k != 2:
        raise ValueError(f"k: got {k}, needs 2, which SparseMixer is defined for")
    largest, expert_ids = _top_k(logits, k)
    first = expert_ids[..., :1] == jax.lax.broadcasted_iota(expert_ids.dtype, logits.shape, logits.ndim - 1)

    def weight(largest: jax.Array, candidates: jax.Array | bool) -> jax.Array:
        magnitude = jnp.maximum(jnp.abs(logits), largest)
        distance = steady.quotient(largest - logits, jnp.where(magnitude == 0, 1.0, magnitude))
        near = candidates & ~(distance > 2 * jitter)
        exponentials = steady.exp_of_difference(jnp.where(near, logits, largest), largest)
        total = steady.sum_of_parts(jnp.where(near, exponentials, 0.0))
        return steady.quotient(jnp.ones_like(total), total)

    return jnp.concatenate([weight(largest[..., :1], True), weight(largest[..., 1:], ~first)], axis=-1), expert_ids


def _grouped_top_k(scores: jax.Array, k: int, method: DeepSeekV2 | DeepSeekV3, bias: jax.Array | None) -> jax.Array:
    *leading, num_experts = scores.shape
    groups, top_groups = method.num_groups, method.top_groups
    if groups < 1 or num_experts % groups:
        raise ValueError(f"method.num_groups: got {groups}, needs a divisor of E = {num_experts}")
    group_size = num_experts // groups
    if not 1 <= top_groups <= groups or k > top_groups * group_size:
        raise ValueError(
            f"method.top_groups: got {top_groups}, needs 1 <= top_groups <= {groups} groups of {group_size} experts, "
            f"enough for k = {k}"
        )

    biased = scores if bias is None else scores + jnp.broadcast_to(bias.astype(jnp.float32), scores.shape)
    grouped = biased.reshape(*leading, groups, group_size)
    best = 1 if isinstance(method, DeepSeekV2) else min(2, group_size)
    group_scores = _top_k(grouped, best)[0].sum(-1)
    kept = jnp.sort(_top_k(group_scores, top_groups)[1])  # ascending, so that ties go to the lower expert
    # Only the experts of kept groups are candidates. Masking the others with -inf instead would be a false alarm of
    # jax_debug_infs, and with 0 wrong: a biased score may itself be negative.
    experts = kept[..., None] * group_size + jax.lax.broadcasted_iota(kept.dtype, (*kept.shape, group_size), kept.ndim)
    experts = experts.reshape(*leading, top_groups * group_size)
    _, places = _top_k(jnp.take_along_axis(biased, experts, axis=-1), k)
    return jnp.take_along_axis(experts, places, axis=-1)
