"""Token to expert assignment: ``Routing``, and the router rules of published models."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_moe import arguments, pytree


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


@dataclasses.dataclass(frozen=True)
class DeepSeekV3:
    """DeepSeek-V3's auxiliary-loss-free router (arXiv:2412.19437, section 2.1.2); also Nemotron-H.

    Scores are sigmoids. *Selection* adds a bias per expert: a group of E/num_groups neighbouring experts
    scores the sum of its two largest biased scores, the ``top_groups`` best groups stay, and the k largest
    biased scores among them are chosen. The *weights* are the unbiased scores, divided by their sum where
    ``renormalize`` says so, times ``scaling_factor``. The defaults are DeepSeek-V3's.
    """

    num_groups: int = 8
    top_groups: int = 4
    scaling_factor: float = 2.5
    renormalize: bool = True


@dataclasses.dataclass(frozen=True)
class Llama4:
    """The k largest logits, weighted by their sigmoids; use it with ``fused_moe(weight_on="input")``."""


Method = Softmax | Sigmoid | DeepSeekV3 | Llama4


def route(logits: jax.Array, k: int, method: Method = Softmax(), *, bias: jax.Array | None = None) -> Routing:
    """Chooses k experts for each token. Ties go to the lower expert id.

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
        raise TypeError(f"method: got {method!r}, needs Softmax, Sigmoid, DeepSeekV3 or Llama4")
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
        case Softmax(renormalize):
            weights, expert_ids = jax.lax.top_k(jax.nn.softmax(logits), k)
        case Sigmoid(renormalize):
            weights, expert_ids = jax.lax.top_k(jax.nn.sigmoid(logits), k)
        case Llama4():
            chosen, expert_ids = jax.lax.top_k(logits, k)
            weights, renormalize = jax.nn.sigmoid(chosen), False
        case DeepSeekV3():
            weights, expert_ids = _grouped_top_k(jax.nn.sigmoid(logits), k, method, bias)
            renormalize = method.renormalize
    if renormalize:
        # Sigmoids of very negative logits all vanish: then the weights are 0, not 0/0. No other sum notices 1e-20.
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    if isinstance(method, DeepSeekV3):
        weights = weights * method.scaling_factor
    return Routing(expert_ids.astype(jnp.int32), weights)


def _grouped_top_k(scores, k: int, method: DeepSeekV3, bias) -> tuple[jax.Array, jax.Array]:
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
    group_scores = jax.lax.top_k(grouped, min(2, group_size))[0].sum(-1)
    kept = jnp.sort(jax.lax.top_k(group_scores, top_groups)[1])  # ascending, so that ties go to the lower expert
    # Only the experts of kept groups are candidates. Masking the others with -inf instead would be a false alarm of
    # jax_debug_infs, and with 0 wrong: a biased score may itself be negative.
    experts = kept[..., None] * group_size + jax.lax.broadcasted_iota(kept.dtype, (*kept.shape, group_size), kept.ndim)
    experts = experts.reshape(*leading, top_groups * group_size)
    _, places = jax.lax.top_k(jnp.take_along_axis(biased, experts, axis=-1), k)
    expert_ids = jnp.take_along_axis(experts, places, axis=-1)
    return jnp.take_along_axis(scores, expert_ids, axis=-1), expert_ids
