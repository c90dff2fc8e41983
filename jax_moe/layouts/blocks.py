"""What the layouts of GPUs share: whole weight blocks, which hold codes *and* block scales.

``payload`` is uint8 ``[E, row_blocks, k_blocks, bytes of a block]``, a block being 128 rows by ``block_k`` values of
the contraction, zero codes where the matrix has none; ``block_scale`` is None, and ``gate_up.bias`` is padded to whole
blocks. So kernels need not branch on a size. Blocks lie along I on axis 1 of ``gate_up.payload`` (64 values of I each
where there is a gate, 128 otherwise) and on axis 2 of ``down.payload`` (``block_k`` values each): mesh axes divide
experts, or these.
"""

from collections.abc import Iterable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import arguments, nvfp4, stacking
from jax_moe.experts import CANONICAL, Experts, Projection
from jax_moe.layouts import base
from jax_moe.layouts.base import E, I
from jax_moe.progress import track

BLOCK_ROWS = 128
E4M3_NAN = 0x7F
_SIGN_BIT = 8


def partition(name: str) -> Experts:
    """``Layout.partition`` of a layout of blocks."""
    return Experts(
        Projection((E, I, None, None), None, (E, None), (), (E, None, I)),
        Projection((E, None, I, None), None, (E,), (E,), (E, None)),
        name,
    )


class Blocks:
    """A layout but for the inside of a block, which a class derived from it has.

    Attributes:
      block_k: values of the contraction in a block.
      block_bytes: bytes of a block.
    """

    name: str
    former_names: tuple[str, ...] = ()
    takes_rounded_x: bool
    partition: Experts
    block_k: int
    block_bytes: int

    def row_order(self, gated: bool) -> np.ndarray:
        """Row of the block (gate before up) that :meth:`encode` gets at each place: int32 ``[128]``."""
        raise NotImplementedError

    def take_scales(self, codes: jax.Array, magnitude: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Codes and block scales as the blocks have them, and where a scale is NaN that they cannot have.

        Args:
          codes: uint8 ``[P, N, C/16, 16]``.
          magnitude: the bits of the e4m3 scales, without the sign (which is in the codes): uint8 ``[P, N, C/16]``.
        """
        return codes, magnitude, jnp.zeros(magnitude.shape, bool)

    def give_scales(self, scales: jax.Array) -> jax.Array:
        """The inverse: e4m3 bits, uint8, of scales as the blocks have them."""
        return scales

    def encode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """Blocks: uint8 ``[..., 128, block_k]`` and ``[..., 128, block_k/16]`` to ``[..., block_bytes]``."""
        raise NotImplementedError

    def decode(self, payload: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The inverse of :meth:`encode`."""
        raise NotImplementedError

    # -- sizes --------------------------------------------------------------------------------------------------

    def _unit(self, parts: int) -> int:
        """Values of I in a block of gate_up."""
        return BLOCK_ROWS // parts

    def check(self, experts: Experts, hidden_size: int, lead: tuple[int, int]) -> int:
        local_experts, parts = lead
        row_blocks, column_blocks = _blocks(hidden_size, BLOCK_ROWS), _blocks(hidden_size, self.block_k)
        _, gate_up_blocks, _, _ = arguments.array(
            "experts.gate_up.payload", experts.gate_up.payload, jnp.uint8,
            (local_experts, "I blocks", column_blocks, self.block_bytes),
        )  # fmt: skip
        _, _, down_blocks, _ = arguments.array(
            "experts.down.payload", experts.down.payload, jnp.uint8,
            (local_experts, row_blocks, "I blocks", self.block_bytes),
        )  # fmt: skip
        padded = gate_up_blocks * self._unit(parts)
        intermediate = min(padded, down_blocks * self.block_k)
        counts = (_blocks(intermediate, self._unit(parts)), _blocks(intermediate, self.block_k))
        if intermediate == 0 or counts != (gate_up_blocks, down_blocks):
            raise ValueError(
                f"experts.down.payload: got {down_blocks} blocks of I, which does not fit gate_up's {gate_up_blocks}"
            )
        for name, projection in (("experts.gate_up", experts.gate_up), ("experts.down", experts.down)):
            if projection.block_scale is not None:
                raise ValueError(
                    f"{name}.block_scale: got an array, needs None: {self.name!r} has the scales in the payload"
                )
        base.check_scalars(experts, lead, gate_up_rows=padded, down_rows=hidden_size)
        return intermediate

    def why_not_sliced(self, experts: Experts, slices: int) -> str | None:
        gate_up, down = counts = experts.gate_up.payload.shape[-3], experts.down.payload.shape[-2]
        advice = "place canonical experts, then prepare them: that pads each slice"
        for blocks in counts:
            if blocks % slices:
                return f"I in {blocks} weight blocks; {advice}"
        unit = self._unit(experts.gate_up.global_scale.shape[-1])
        if slices > 1 and gate_up * unit != down * self.block_k:  # slices of gate_up and of down would be others
            return f"I = {gate_up} * {unit} in gate_up, {down} * {self.block_k} in down alike; {advice}"
        return None

    def slice_unit(self, parts: int) -> int:
        return max(self._unit(parts), self.block_k)  # whole blocks of gate_up and of down alike: they must match

    def padded_intermediate_size(self, intermediate_size: int, parts: int) -> int:
        # What both projections have: the smaller of their blocks decides, the larger ones end in more padding.
        unit = min(self._unit(parts), self.block_k)
        return _blocks(intermediate_size, unit) * unit

    def check_unpadded(self, experts: Experts, hidden_size: int, intermediate_size: int, slices: int) -> None:
        rows, columns = experts.down.payload.shape[1], experts.gate_up.payload.shape[2]
        _check_size("hidden_size", hidden_size, (rows, BLOCK_ROWS), (columns, self.block_k))
        parts = experts.gate_up.global_scale.shape[1]
        # A slice is padded to whole blocks of both projections; where I is in one piece, each keeps to its own.
        units = [self._unit(parts), self.block_k]
        counts = [experts.gate_up.payload.shape[1], experts.down.payload.shape[2]]
        if slices > 1:
            unit = self.slice_unit(parts)
            counts = [count * own // (slices * unit) for count, own in zip(counts, units, strict=True)]
            units = [unit, unit]
        _check_size("intermediate_size", intermediate_size, *zip(counts, units, strict=True), slices=slices)

    # -- packing ------------------------------------------------------------------------------------------------

    def pack(self, experts: Experts, *, progress: bool, tensor_axes: tuple[str, ...]) -> Experts:
        gate_up, down = experts.gate_up, experts.down
        num_experts, parts, intermediate, _ = gate_up.payload.shape
        indices = track(range(num_experts), "prepare gate_up", enabled=progress)
        prepared_gate_up = self._pack_projection(gate_up, indices, tensor_axes)
        indices = track(range(num_experts), "prepare down", enabled=progress)
        prepared_down = self._pack_projection(_with_a_part(down), indices, tensor_axes)
        if gate_up.bias is not None:
            padding = prepared_gate_up.payload.shape[1] * self._unit(parts) - intermediate
            bias = jnp.pad(gate_up.bias, ((0, 0), (0, 0), (0, padding)))
            prepared_gate_up = dataclasses.replace(prepared_gate_up, bias=bias)
        return Experts(gate_up=prepared_gate_up, down=prepared_down, layout=self.name)

    def _pack_projection(self, projection: Projection, indices: Iterable[int], tensor_axes) -> Projection:
        """``projection`` with leaves ``[E, P, N, C/2]`` and ``[E, P, N, C/16]``."""
        operands = nvfp4.payload_bytes(projection.payload), projection.block_scale
        payload, nan = stacking.map_in_turn(lambda expert: _pack_expert(*expert, layout=self), operands, indices)
        if tensor_axes:  # the other slices' scales count too
            nan = jax.lax.pmax(nan.astype(jnp.int32), tensor_axes) > 0
        if projection.global_scale.ndim == 1:
            nan = nan[:, 0]
        return dataclasses.replace(
            projection,
            payload=payload,
            block_scale=None,
            global_scale=jnp.where(nan, jnp.nan, projection.global_scale),
        )

    def unpack(self, experts: Experts, hidden_size: int, intermediate_size: int) -> tuple[Experts, jax.Array]:
        gate_up, down = experts.gate_up, experts.down
        parts = gate_up.global_scale.shape[1]
        codes, scales = jax.lax.map(functools.partial(_unpack_expert, layout=self, parts=parts), gate_up.payload)
        bias = None if gate_up.bias is None else gate_up.bias[:, :, :intermediate_size]
        cut = jnp.any(codes[:, :, intermediate_size:])[None]
        canonical_gate_up = dataclasses.replace(
            gate_up,
            payload=nvfp4.pack(codes[:, :, :intermediate_size, :hidden_size]),
            block_scale=scales[:, :, :intermediate_size, : hidden_size // nvfp4.BLOCK_SIZE],
            bias=bias,
        )
        codes, scales = jax.lax.map(functools.partial(_unpack_expert, layout=self, parts=1), down.payload)
        canonical_down = dataclasses.replace(
            down,
            payload=nvfp4.pack(codes[:, 0, :hidden_size, :intermediate_size]),
            block_scale=scales[:, 0, :hidden_size, : intermediate_size // nvfp4.BLOCK_SIZE],
        )
        return Experts(gate_up=canonical_gate_up, down=canonical_down, layout=CANONICAL), cut

    # -- single projections -------------------------------------------------------------------------------------

    def check_matrices(self, weights: Projection, lead: int, in_features: int) -> int:
        columns = _blocks(in_features, self.block_k)
        _, row_blocks, _, _ = arguments.array(
            "weights.payload", weights.payload, jnp.uint8, (lead, "N blocks", columns, self.block_bytes)
        )
        if weights.block_scale is not None:
            raise ValueError(
                f"weights.block_scale: got an array, needs None: {self.name!r} has the scales in the payload"
            )
        return row_blocks * BLOCK_ROWS

    def pack_matrices(self, weights: Projection) -> Projection:
        return self._pack_projection(_with_a_part(weights), range(weights.global_scale.shape[0]), ())

    def unpack_matrix(
        self, payload: jax.Array, out_features: int, in_features: int | None
    ) -> tuple[jax.Array, jax.Array]:
        codes, scales = _unpack_expert(payload, layout=self, parts=1)
        num_scales = in_features and in_features // nvfp4.BLOCK_SIZE
        return nvfp4.pack(codes[0, :out_features, :in_features]), scales[0, :out_features, :num_scales]


def _with_a_part(projection: Projection) -> Projection:
    """``[E, N, C]`` as ``[E, 1, N, C]``."""
    return dataclasses.replace(
        projection, payload=projection.payload[:, None], block_scale=projection.block_scale[:, None]
    )


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _check_size(name: str, size: int, *blocks: tuple[int, int], slices: int = 1) -> None:
    """Raises unless ``size``, of which each slice is so many ``blocks`` (count, values), is one that :meth:`pack` pads
    to that.
    """
    least = max((count - 1) * unit for count, unit in blocks) + nvfp4.BLOCK_SIZE
    most = min(count * unit for count, unit in blocks)
    if size % (slices * nvfp4.BLOCK_SIZE) or not slices * least <= size <= slices * most:
        raise ValueError(
            f"{name}: got {size}, needs a multiple of {slices * nvfp4.BLOCK_SIZE} "
            f"from {slices * least} to {slices * most}"
        )


@functools.partial(jax.jit, static_argnames="layout")
def _pack_expert(payload: jax.Array, block_scale: jax.Array, *, layout: Blocks) -> tuple[jax.Array, jax.Array]:
    """One expert: ``[P, N, C/2]``, ``[P, N, C/16]`` to ``[row_blocks, k_blocks, bytes]``, and which of P have a NaN."""
    parts, rows, _ = payload.shape
    rows_per_block = BLOCK_ROWS // parts
    bits = jax.lax.bitcast_convert_type(block_scale, jnp.uint8)
    flip = jnp.where(bits >> 7 == 1, jnp.uint8(_SIGN_BIT), jnp.uint8(0))  # the blocks' scales have no sign
    codes = nvfp4.unpack(payload).reshape(*bits.shape, nvfp4.BLOCK_SIZE) ^ flip[..., None]
    codes, scales, nan = layout.take_scales(codes, bits & 0x7F)

    columns = bits.shape[2] * nvfp4.BLOCK_SIZE
    k_blocks, pad_rows = _blocks(columns, layout.block_k), -rows % rows_per_block

    # [P, N, C] -> [row_block, k_block, P * rows_per_block, width of a block], rows in the layout's order
    def blocks(array: jax.Array, width: int) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, pad_rows), (0, k_blocks * width - array.shape[2])))
        array = array.reshape(parts, -1, rows_per_block, k_blocks, width)
        array = array.transpose(1, 3, 0, 2, 4).reshape(-1, k_blocks, BLOCK_ROWS, width)
        return jnp.take(array, jnp.asarray(layout.row_order(parts == 2)), axis=2)

    codes = blocks(codes.reshape(parts, rows, columns), layout.block_k)
    scales = blocks(scales, layout.block_k // nvfp4.BLOCK_SIZE)
    return layout.encode(codes, scales), jnp.any(nan, axis=(1, 2))


def _unpack_expert(payload: jax.Array, *, layout: Blocks, parts: int) -> tuple[jax.Array, jax.Array]:
    """Inverse of ``_pack_expert``, padding included: codes ``[P, N, C]`` and e4m3 scales ``[P, N, C/16]``."""
    row_blocks, k_blocks, _ = payload.shape
    codes, scales = layout.decode(payload)
    order = jnp.asarray(np.argsort(layout.row_order(parts == 2)))

    def matrix(array: jax.Array) -> jax.Array:
        array = jnp.take(array, order, axis=2)
        array = array.reshape(row_blocks, k_blocks, parts, -1, array.shape[-1]).transpose(2, 0, 3, 1, 4)
        return array.reshape(parts, -1, k_blocks * array.shape[-1])

    scales = layout.give_scales(matrix(scales))
    return matrix(codes), jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
