"""The canonical layout: that of checkpoints, which CPUs compute with."""

import jax
import jax.numpy as jnp

from jax_moe import arguments, nvfp4
from jax_moe.experts import CANONICAL, Experts, Projection
from jax_moe.layouts import base
from jax_moe.layouts.base import E, I


class Canonical:
    """Rows of codes, packed along the contraction, and their block scales: see :class:`jax_moe.Projection`."""

    name = CANONICAL
    former_names: tuple[str, ...] = ()
    takes_rounded_x = True
    partition = Experts(
        Projection((E, None, I, None), (E, None, I, None), (E, None), (), (E, None, I)),
        Projection((E, None, I), (E, None, I), (E,), (E,), (E, None)),
        CANONICAL,
    )

    def check(self, experts: Experts, hidden_size: int, lead: tuple[int, int]) -> int:
        _, _, intermediate, packed = arguments.array(
            "experts.gate_up.payload", experts.gate_up.payload, None, (*lead, "I", "H/2")
        )
        stored = packed if experts.gate_up.payload.dtype == jnp.float4_e2m1fn else 2 * packed
        if stored != hidden_size and getattr(experts.down.payload, "shape", ())[-2:-1] == (stored,):
            raise ValueError(f"x: got H = {hidden_size}, the experts have H = {stored}")
        if intermediate == 0 or intermediate % nvfp4.BLOCK_SIZE:
            raise ValueError(f"experts: got I = {intermediate}, needs a positive multiple of {nvfp4.BLOCK_SIZE}")
        for name, projection, rows, contraction in (
            ("experts.gate_up", experts.gate_up, intermediate, hidden_size),
            ("experts.down", experts.down, hidden_size, intermediate),
        ):
            axes = lead if projection is experts.gate_up else lead[:1]
            is_float4 = projection.payload.dtype == jnp.float4_e2m1fn
            payload_type = (jnp.float4_e2m1fn, contraction) if is_float4 else (jnp.uint8, contraction // 2)
            arguments.array(f"{name}.payload", projection.payload, payload_type[0], (*axes, rows, payload_type[1]))
            blocks = contraction // nvfp4.BLOCK_SIZE
            arguments.array(f"{name}.block_scale", projection.block_scale, jnp.float8_e4m3fn, (*axes, rows, blocks))
        base.check_scalars(experts, lead, gate_up_rows=intermediate, down_rows=hidden_size)
        return intermediate

    def why_not_sliced(self, experts: Experts, slices: int) -> str | None:
        intermediate, block = experts.gate_up.payload.shape[-2], nvfp4.BLOCK_SIZE
        if intermediate % (slices * block) == 0:
            return None
        return f"I = {intermediate} into slices that are multiples of {block}"

    def slice_unit(self, parts: int) -> int:
        return nvfp4.BLOCK_SIZE

    def padded_intermediate_size(self, intermediate_size: int, parts: int) -> int:
        return intermediate_size

    def pack(self, experts: Experts, *, progress: bool, tensor_axes: tuple[str, ...]) -> Experts:
        return experts

    def check_unpadded(self, experts: Experts, hidden_size: int, intermediate_size: int, slices: int) -> None:
        pass

    def unpack(self, experts: Experts, hidden_size: int, intermediate_size: int) -> tuple[Experts, jax.Array]:
        return experts, jnp.zeros((1,), bool)

    def check_matrices(self, weights: Projection, lead: int, in_features: int) -> int:
        is_float4 = weights.payload.dtype == jnp.float4_e2m1fn
        payload_type = (jnp.float4_e2m1fn, in_features) if is_float4 else (jnp.uint8, in_features // 2)
        _, rows, _ = arguments.array("weights.payload", weights.payload, payload_type[0], (lead, "N", payload_type[1]))
        blocks = in_features // nvfp4.BLOCK_SIZE
        arguments.array("weights.block_scale", weights.block_scale, jnp.float8_e4m3fn, (lead, rows, blocks))
        return rows

    def pack_matrices(self, weights: Projection) -> Projection:
        return weights

    def unpack_matrix(
        self, payload: jax.Array, out_features: int, in_features: int | None
    ) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError("canonical matrices are not packed")
