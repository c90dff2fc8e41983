"""Canonical rows of gate_up with I in front of gate and up, padded to 32: simple, and unlike the layouts that exist."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_moe import arguments, nvfp4
from jax_moe.experts import CANONICAL, Experts, Projection
from jax_moe.layouts import base
from jax_moe.layouts.base import E, I

UNIT = 32


class MadeUpLayout:
    former_names = ()

    def __init__(self, name: str):
        self.name = name
        gate_up = Projection((E, I, None, None), (E, I, None, None), (E, None), (), (E, None, I))
        down = Projection((E, None, I), (E, None, I), (E,), (E,), (E, None))
        self.partition = Experts(gate_up, down, name)

    def check(self, experts, hidden_size, lead):
        payload = experts.gate_up.payload
        _, intermediate, _, _ = arguments.array(
            "payload", payload, jnp.uint8, (lead[0], "I", lead[1], hidden_size // 2)
        )
        base.check_scalars(experts, lead, gate_up_rows=intermediate, down_rows=hidden_size)
        return intermediate

    def why_not_sliced(self, experts, slices):
        intermediate = experts.gate_up.payload.shape[-3]
        return None if intermediate % (UNIT * slices) == 0 else f"I = {intermediate} into slices of {UNIT}"

    def slice_unit(self, parts):
        return UNIT

    def padded_intermediate_size(self, intermediate_size, parts):
        return -(-intermediate_size // UNIT) * UNIT

    def pack(self, experts, *, progress, tensor_axes):
        gate_up, down = experts.gate_up, experts.down
        padding = -gate_up.payload.shape[2] % UNIT

        def swap(array):
            return jnp.pad(array, ((0, 0), (0, 0), (0, padding), (0, 0))).swapaxes(1, 2)

        def pad(array, count):
            return jnp.pad(array, ((0, 0), (0, 0), (0, count)))

        bias = None if gate_up.bias is None else pad(gate_up.bias, padding)
        return Experts(
            dataclasses.replace(
                gate_up, payload=swap(gate_up.payload), block_scale=swap(gate_up.block_scale), bias=bias
            ),
            dataclasses.replace(
                down, payload=pad(down.payload, padding // 2), block_scale=pad(down.block_scale, padding // 16)
            ),
            self.name,
        )

    def check_unpadded(self, experts, hidden_size, intermediate_size, slices):
        if experts.gate_up.payload.shape[1] != slices * self.padded_intermediate_size(intermediate_size // slices, 1):
            raise ValueError(f"intermediate_size: got {intermediate_size}")

    def unpack(self, experts, hidden_size, intermediate_size):
        gate_up, down = experts.gate_up, experts.down
        bias = None if gate_up.bias is None else gate_up.bias[:, :, :intermediate_size]
        cut = jnp.any(gate_up.payload[:, intermediate_size:])[None]
        rows, size = slice(intermediate_size), nvfp4.BLOCK_SIZE
        payload, scale = (a.swapaxes(1, 2)[:, :, rows] for a in (gate_up.payload, gate_up.block_scale))
        down_payload, down_scale = down.payload[..., : intermediate_size // 2], down.block_scale
        return Experts(
            dataclasses.replace(gate_up, payload=payload, block_scale=scale, bias=bias),
            dataclasses.replace(down, payload=down_payload, block_scale=down_scale[..., : intermediate_size // size]),
            CANONICAL,
        ), jax.lax.optimization_barrier(cut)
