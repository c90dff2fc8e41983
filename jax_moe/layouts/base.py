"""What a layout is, and what layouts share."""

from typing import Protocol

import jax
import jax.numpy as jnp

from jax_moe import arguments
from jax_moe.experts import Experts, Projection

E, I = "E", "I"  # noqa: E741
"""Axes that a mesh may divide, in ``Layout.partition``: experts, and slices of the intermediate size."""


class Layout(Protocol):
    """How the weights of one layer lie in memory.

    Attributes:
      name: of :attr:`jax_moe.Experts.layout`. It has a version, because converted checkpoints and exported programs
        outlive this library: other bytes are another layout.
      former_names: what earlier versions called these bytes.
      takes_rounded_x: whether w4a4 is multiplied in bfloat16, so that a call takes x as code * block scale.
      partition: Experts with a tuple for each leaf: for each of its axes :data:`E`, :data:`I` or None. Leading axes of
        stacked layers are not among them. None is a leaf that the layout lacks.
    """

    name: str
    former_names: tuple[str, ...]
    takes_rounded_x: bool
    partition: Experts

    def check(self, experts: Experts, hidden_size: int, lead: tuple[int, int]) -> int:
        """Raises unless every leaf is as this layout has it for H and ``lead`` = (L, P); returns I with its padding.

        Raises:
          TypeError, ValueError: the leaf, what it got and what it needs.
        """
        ...

    def why_not_sliced(self, experts: Experts, slices: int) -> str | None:
        """Why I cannot be shared out over so many devices, as "... does not divide <this>"; None: it can."""
        ...

    def slice_unit(self, parts: int) -> int:
        """To a multiple of this :func:`jax_moe.prepare` pads each slice of I on a mesh; ``parts``: P."""
        ...

    def padded_intermediate_size(self, intermediate_size: int, parts: int) -> int:
        """I as the layout has it, where it is in one piece: what :meth:`check` returns; ``parts``: P."""
        ...

    def pack(self, experts: Experts, *, progress: bool, tensor_axes: tuple[str, ...]) -> Experts:
        """Canonical experts of one layer, already checked, in this layout.

        ``tensor_axes``: inside ``shard_map``, the mesh axes that share out I.
        """
        ...

    def check_unpadded(self, experts: Experts, hidden_size: int, intermediate_size: int, slices: int) -> None:
        """Raises unless :meth:`pack` makes experts of this size of such canonical ones, I in ``slices`` slices."""
        ...

    def unpack(self, experts: Experts, hidden_size: int, intermediate_size: int) -> tuple[Experts, jax.Array]:
        """The inverse of :meth:`pack`, and whether it cut off anything but padding: bool ``[1]``."""
        ...

    def check_matrices(self, weights: Projection, lead: int, in_features: int) -> int:
        """As :meth:`check`, of a single projection ``[G, N, C]``: raises unless payload and block scales are as this
        layout has them for ``lead`` = G and C; returns N with the padding that the payload has.
        """
        ...

    def pack_matrices(self, weights: Projection) -> Projection:
        """A canonical projection ``[G, N, C]``, already checked, with leaves as this layout has them."""
        ...

    def unpack_matrix(
        self, payload: jax.Array, out_features: int, in_features: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """Canonical payload ``[N, C/2]`` and block scales ``[N, C/16]`` of one matrix that was packed; None: C with
        its padding.
        """
        ...


def check_scalars(experts: Experts, lead: tuple[int, int], gate_up_rows: int, down_rows: int) -> None:
    """The leaves that every layout has: global scales, input scales and biases."""
    for name, projection, axes, rows, input_scale_shape in (
        ("experts.gate_up", experts.gate_up, lead, gate_up_rows, ()),
        ("experts.down", experts.down, lead[:1], down_rows, lead[:1]),
    ):
        arguments.array(f"{name}.global_scale", projection.global_scale, jnp.float32, axes)
        if projection.input_scale is not None:
            arguments.array(f"{name}.input_scale", projection.input_scale, jnp.float32, input_scale_shape)
        if projection.bias is not None:
            arguments.array(f"{name}.bias", projection.bias, jnp.float32, (*axes, rows))
