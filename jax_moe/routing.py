"""Token to expert assignment."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight.

    Attributes:
      expert_ids: int32 ``[T, K]``, in ``[0, E)``.
      weights: float32 ``[T, K]``.
    """

    expert_ids: jax.Array
    weights: jax.Array
