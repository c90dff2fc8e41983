"""``Experts``: the NVFP4 weights of one MoE layer, as a pytree of plain arrays."""

import dataclasses
from typing import Any

from jax_moe import pytree

CANONICAL = "canonical"
"""The layout of checkpoints, which CPUs compute with; ``jax_moe/layouts/`` has all of them."""

Leaf = Any
"""A ``jax.Array``; in a tree of the same structure, what stands for one: a PartitionSpec, a ShapeDtypeStruct."""


@pytree.register
@dataclasses.dataclass(frozen=True)
class Projection:
    """NVFP4 weights of one linear map of every expert, in ``y = x @ W.T`` orientation.

    For ``gate_up`` the lead axes are ``[E, P]`` with P = 2 (gate, then up) or P = 1 (activations without a
    gate), N = I and the contraction length C = H. For ``down`` they are ``[E]``, N = H and C = I.

    Attributes:
      payload: uint8 ``[*lead, N, C/2]``, e2m1 codes packed along C, even index in the low nibble.
      block_scale: float8_e4m3fn ``[*lead, N, C/16]``; None in a prepared layout, whose payload has them inside.
      global_scale: float32 ``[*lead]``, multiplied; gate and up each have their own.
      input_scale: float32, the NVFP4 global scale of this projection's *input* (w4a4): scalar ``[]`` for
        ``gate_up``, ``[E]`` for ``down``; None until :func:`jax_moe.calibrate` or a checkpoint sets it.
      bias: float32 ``[*lead, N]``, added after the global scale, or None.
    """

    payload: Leaf
    block_scale: Leaf  # never an empty array: jaxlib 0.11.2 crashes where a sharded one reaches a custom call
    global_scale: Leaf
    input_scale: Leaf = None
    bias: Leaf = None


@pytree.register
@dataclasses.dataclass(frozen=True)
class PreparedProjection(Projection):
    """A single projection in the layout of a GPU's kernels, for :func:`jax_moe.ragged_dot` or :func:`jax_moe.linear`.

    :func:`jax_moe.prepare` makes one.

    Attributes:
      layout: that the weights were repacked to.
      out_features: N without the padding of ``payload``.
    """

    layout: str = dataclasses.field(kw_only=True, metadata={"static": True})
    out_features: int = dataclasses.field(kw_only=True, metadata={"static": True})


@pytree.register
@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of one MoE layer.

    All leaves but ``gate_up.input_scale`` (a scalar) lead with the expert axis, so that a layer can be
    stacked for ``lax.scan``, sharded with ``NamedSharding`` and saved by any pytree checkpointer.

    Attributes:
      gate_up: ``[E, P, I, H]`` logical; P = 2 is gate then up, P = 1 has no gate.
      down: ``[E, H, I]`` logical.
      layout: ``"canonical"``, or the layout that :func:`jax_moe.prepare` repacked the weights to.
    """

    gate_up: Projection
    down: Projection
    layout: str = dataclasses.field(default=CANONICAL, metadata={"static": True})
