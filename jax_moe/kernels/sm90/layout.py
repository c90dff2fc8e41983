"""The layout of Hopper's ``wgmma``: weights as the registers of a warpgroup hold them.

``payload`` is uint8 ``[E, row_blocks, k_blocks, 4608]`` with the codes *and* block scales of 128 x 64 weight blocks
(``device/weight_block.py`` says which bit lies where), ``block_scale`` is None, and ``gate_up.bias`` is
padded to whole weight blocks. These lie along I on axis 1 of ``gate_up.payload`` (64 values of I each where there is a
gate, 128 otherwise) and on axis 2 of ``down.payload`` (64 values each): mesh axes divide experts, or these. The scales
have no NaN: one makes the global scale of its expert and part NaN.
"""

from collections.abc import Iterable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import arguments, nvfp4, stacking
from jax_moe.experts import CANONICAL, Experts, Projection
from jax_moe.kernels.device import bf16_weights
from jax_moe.kernels.sm90.device.weight_block import BLOCK_BYTES, BLOCK_K, BLOCK_ROWS, CODE_BYTES
from jax_moe.layouts import base
from jax_moe.layouts.base import E, I
from jax_moe.progress import track

_E4M3_NAN = 0x7F
_SIGN_BIT = 8
_ZERO = 0  # e5m3 code of a zero scale
_E5M3_FIRST = 13  # e5m3 exponent of 2**-9, the smallest e4m3: see bf16_weights.SCALE_EXPONENT


class Wgmma:
    """Whole 128 x 64 blocks, so that the kernels need not branch on a size."""

    name = "wgmma_v1"
    former_names: tuple[str, ...] = ("sm_90a",)
    partition = Experts(
        Projection((E, I, None, None), None, (E, None), (), (E, None, I)),
        Projection((E, None, I, None), None, (E,), (E,), (E, None)),
        name,
    )

    def check(self, experts: Experts, hidden_size: int, lead: tuple[int, int]) -> int:
        local_experts, parts = lead
        row_blocks, column_blocks = (-(-hidden_size // size) for size in (BLOCK_ROWS, BLOCK_K))
        _, gate_up_blocks, _, _ = arguments.array(
            "experts.gate_up.payload", experts.gate_up.payload, jnp.uint8,
            (local_experts, "I blocks", column_blocks, BLOCK_BYTES),
        )  # fmt: skip
        padded = gate_up_blocks * BLOCK_ROWS // parts
        _, _, down_blocks, _ = arguments.array(
            "experts.down.payload", experts.down.payload, jnp.uint8,
            (local_experts, row_blocks, "I blocks", BLOCK_BYTES),
        )  # fmt: skip
        intermediate = down_blocks * BLOCK_K
        if gate_up_blocks == 0 or not 0 <= padded - intermediate < BLOCK_ROWS // parts:
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
        for blocks in (experts.gate_up.payload.shape[-3], experts.down.payload.shape[-2]):
            if blocks % slices:
                return f"I in {blocks} weight blocks; place canonical experts, then prepare them: that pads each slice"
        return None

    def slice_unit(self, parts: int) -> int:
        return BLOCK_ROWS // parts  # whole weight blocks of gate_up and of down alike: they must match

    def padded_intermediate_size(self, intermediate_size: int) -> int:
        return -(-intermediate_size // BLOCK_K) * BLOCK_K

    def pack(self, experts: Experts, *, progress: bool, tensor_axes: tuple[str, ...]) -> Experts:
        gate_up, down = experts.gate_up, experts.down
        num_experts, parts, intermediate, _ = gate_up.payload.shape
        gated = parts == 2
        prepared_gate_up = _pack_projection(
            gate_up, gated, track(range(num_experts), "prepare gate_up", enabled=progress), tensor_axes
        )
        lifted = dataclasses.replace(down, payload=down.payload[:, None], block_scale=down.block_scale[:, None])
        prepared_down = _pack_projection(
            lifted, False, track(range(num_experts), "prepare down", enabled=progress), tensor_axes
        )
        if gate_up.bias is not None:
            row_blocks = prepared_gate_up.payload.shape[1]
            padding = row_blocks * BLOCK_ROWS // parts - intermediate
            bias = jnp.pad(gate_up.bias, ((0, 0), (0, 0), (0, padding)))
            prepared_gate_up = dataclasses.replace(prepared_gate_up, bias=bias)
        return Experts(gate_up=prepared_gate_up, down=prepared_down, layout=self.name)

    def check_unpadded(self, experts: Experts, hidden_size: int, intermediate_size: int, slices: int) -> None:
        block, size = BLOCK_K, nvfp4.BLOCK_SIZE
        blocks = experts.gate_up.payload.shape[2]
        if -(-hidden_size // block) != blocks or hidden_size % size:
            least, most = (blocks - 1) * block + size, blocks * block
            raise ValueError(f"hidden_size: got {hidden_size}, needs a multiple of {size} from {least} to {most}")
        slice_unit = self.slice_unit(experts.gate_up.global_scale.shape[1])
        # A slice is padded to whole blocks of gate_up; where I is in one piece, down keeps to its own smaller ones.
        unit = slice_unit if slices > 1 else block
        most = experts.down.payload.shape[2] // slices * block
        least = most - unit + size
        part, units = intermediate_size // slices, experts.gate_up.payload.shape[1] // slices
        if intermediate_size % (slices * size) or not least <= part <= most or -(-part // slice_unit) != units:
            raise ValueError(
                f"intermediate_size: got {intermediate_size}, needs a multiple of {slices * size} "
                f"from {slices * least} to {slices * most}"
            )

    def unpack(self, experts: Experts, hidden_size: int, intermediate_size: int) -> tuple[Experts, jax.Array]:
        gate_up, down = experts.gate_up, experts.down
        parts = gate_up.global_scale.shape[1]
        codes, scales = jax.lax.map(functools.partial(_unpack_expert, parts=parts), gate_up.payload)
        bias = None if gate_up.bias is None else gate_up.bias[:, :, :intermediate_size]
        cut = jnp.any(codes[:, :, intermediate_size:])[None]
        canonical_gate_up = dataclasses.replace(
            gate_up,
            payload=nvfp4.pack(codes[:, :, :intermediate_size, :hidden_size]),
            block_scale=scales[:, :, :intermediate_size, : hidden_size // nvfp4.BLOCK_SIZE],
            bias=bias,
        )
        codes, scales = jax.lax.map(functools.partial(_unpack_expert, parts=1), down.payload)
        canonical_down = dataclasses.replace(
            down,
            payload=nvfp4.pack(codes[:, 0, :hidden_size, :intermediate_size]),
            block_scale=scales[:, 0, :hidden_size, : intermediate_size // nvfp4.BLOCK_SIZE],
        )
        return Experts(gate_up=canonical_gate_up, down=canonical_down, layout=CANONICAL), cut


def _pack_projection(projection: Projection, gated: bool, indices: Iterable[int], tensor_axes) -> Projection:
    """``projection`` with leaves ``[E, P, N, C/2]`` and ``[E, P, N, C/16]``."""
    operands = nvfp4.payload_bytes(projection.payload), projection.block_scale
    payload, nan = stacking.map_in_turn(lambda expert: _pack_expert(*expert, gated=gated), operands, indices)
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


@functools.partial(jax.jit, static_argnames="gated")
def _pack_expert(payload: jax.Array, block_scale: jax.Array, *, gated: bool) -> tuple[jax.Array, jax.Array]:
    """One expert: ``[P, N, C/2]``, ``[P, N, C/16]`` to ``[row_blocks, k_blocks, 4608]``, and which of P have a NaN."""
    parts, rows, _ = payload.shape
    rows_per_block = BLOCK_ROWS // parts
    codes = nvfp4.unpack(payload)
    bits = jax.lax.bitcast_convert_type(block_scale, jnp.uint8)
    magnitude = bits & 0x7F
    # The prepared scales have neither sign nor e4m3's NaN, and a zero one is not zero but leaves its codes to be.
    flip = jnp.where(bits >> 7 == 1, jnp.uint8(_SIGN_BIT), jnp.uint8(0))
    codes = codes.reshape(*bits.shape, nvfp4.BLOCK_SIZE) ^ flip[..., None]
    codes = jnp.where((magnitude == 0)[..., None], jnp.uint8(0), codes).reshape(parts, rows, -1)
    scales = jnp.asarray(_E5M3_OF_E4M3)[magnitude]

    pad_rows = -rows % rows_per_block
    pad_k = -codes.shape[2] % BLOCK_K
    codes = jnp.pad(codes, ((0, 0), (0, pad_rows), (0, pad_k)))
    scales = jnp.pad(scales, ((0, 0), (0, pad_rows), (0, pad_k // nvfp4.BLOCK_SIZE)), constant_values=_ZERO)
    k_blocks = codes.shape[2] // BLOCK_K

    # [P, N, C] -> [row_block, k_block, P * rows_per_block, 64], rows in the order of the register layout
    def blocks(array: jax.Array, width: int) -> jax.Array:
        array = array.reshape(parts, -1, rows_per_block, k_blocks, width)
        array = array.transpose(1, 3, 0, 2, 4).reshape(-1, k_blocks, BLOCK_ROWS, width)
        return jnp.take(array, jnp.asarray(_row_order(gated)), axis=2)

    codes = blocks(codes, BLOCK_K)  # rows are now [half, warp, group, upper]
    codes = codes.reshape(*codes.shape[:2], 2, 4, 8, 2, 4, 2, 4, 2)  # ..., upper, [step, k >= 8, quad, upper_value]
    codes = codes.transpose(
        0, 1, 2, 3, 4, 8, 6, 7, 5, 9
    )  # row_block, k_block, half, warp, group, quad, step, pair, value
    codes = codes.reshape(*codes.shape[:7], 4, 2).astype(jnp.uint32)
    words = jnp.zeros(codes.shape[:7], jnp.uint32)
    for pair in range(4):
        for value in range(2):
            for bit in range(4):
                place = bf16_weights.code_bit(pair, value, bit)
                words |= ((codes[..., pair, value] >> bit) & 1) << place

    scales = blocks(scales, BLOCK_K // nvfp4.BLOCK_SIZE).reshape(-1, k_blocks, 2, 4, 8, 2, 4)
    scales = scales.transpose(0, 1, 3, 4, 2, 5, 6).astype(jnp.uint32)  # warp, group, half, upper, step
    scale_words = jnp.zeros(scales.shape[:-1], jnp.uint32)
    for step in range(4):
        for bit in range(8):
            scale_words |= ((scales[..., step] >> bit) & 1) << bf16_weights.scale_bit(step, bit)

    def as_bytes(array: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(array.reshape(*array.shape[:2], -1), jnp.uint8).reshape(
            -1, k_blocks, array[0, 0].size * 4
        )

    return jnp.concatenate([as_bytes(words), as_bytes(scale_words)], axis=-1), jnp.any(
        magnitude == _E4M3_NAN, axis=(1, 2)
    )


def _unpack_expert(payload: jax.Array, *, parts: int) -> tuple[jax.Array, jax.Array]:
    """Inverse of ``_pack_expert``, padding included: codes ``[P, N, C]`` and e4m3 scales ``[P, N, C/16]``."""
    row_blocks, k_blocks, _ = payload.shape
    words = jax.lax.bitcast_convert_type(payload.reshape(row_blocks, k_blocks, -1, 4), jnp.uint32)
    words, scale_words = jnp.split(words, [CODE_BYTES // 4], axis=-1)
    words = words.reshape(row_blocks, k_blocks, 2, 4, 8, 4, 4)
    codes = jnp.stack(
        [
            jnp.stack(
                [
                    sum((words >> bf16_weights.code_bit(pair, value, bit) & 1) << bit for bit in range(4))
                    for value in range(2)
                ],
                -1,
            )
            for pair in range(4)
        ],
        axis=-2,
    )  # row_block, k_block, half, warp, group, quad, step, pair, value
    codes = codes.reshape(*codes.shape[:7], 2, 2, 2).transpose(0, 1, 2, 3, 4, 8, 6, 7, 5, 9)
    codes = codes.reshape(row_blocks, k_blocks, BLOCK_ROWS, BLOCK_K).astype(jnp.uint8)
    scale_words = scale_words.reshape(row_blocks, k_blocks, 4, 8, 2, 2).transpose(0, 1, 4, 2, 3, 5)
    scales = jnp.stack(
        [sum((scale_words >> bf16_weights.scale_bit(step, bit) & 1) << bit for bit in range(8)) for step in range(4)],
        axis=-1,
    ).reshape(row_blocks, k_blocks, BLOCK_ROWS, 4)

    order = np.argsort(_row_order(parts == 2))

    def matrix(array: jax.Array) -> jax.Array:
        array = jnp.take(array, jnp.asarray(order), axis=2)
        array = array.reshape(row_blocks, k_blocks, parts, -1, array.shape[-1]).transpose(2, 0, 3, 1, 4)
        return array.reshape(parts, -1, k_blocks * array.shape[-1])

    return matrix(codes), jax.lax.bitcast_convert_type(jnp.asarray(_E4M3_OF_E5M3)[matrix(scales)], jnp.float8_e4m3fn)


def _row_order(gated: bool) -> np.ndarray:
    """Row of the block (gate before up) that stands at each place of ``[half, warp, group, upper]``."""
    order = []
    for half in range(2):
        for warp in range(4):
            for group in range(8):
                for upper in range(2):
                    part, row = bf16_weights.row_in_block(half, warp, group, upper, gated)
                    order.append(part * (BLOCK_ROWS // 2) + row)
    return np.array(order, np.int32)


def _scale_tables() -> tuple[np.ndarray, np.ndarray]:
    """e4m3 bits without sign -> e5m3 (NaN maps to the largest), and back."""
    to_e5m3 = np.zeros(128, np.uint8)
    for bits in range(1, 127):
        exponent, mantissa = bits >> 3, bits & 7
        if exponent == 0:  # subnormal: mantissa * 2**-9
            shift = 3 - (mantissa.bit_length() - 1)
            to_e5m3[bits] = (_E5M3_FIRST + 3 - shift) << 3 | (mantissa << shift & 7)
        else:  # (1 + mantissa/8) * 2**(exponent - 7)
            to_e5m3[bits] = (_E5M3_FIRST + 2 + exponent) << 3 | mantissa
    to_e5m3[_E4M3_NAN] = to_e5m3[_E4M3_NAN - 1]
    back = np.zeros(256, np.uint8)
    back[to_e5m3[:127]] = np.arange(127, dtype=np.uint8)
    return to_e5m3, back


_E5M3_OF_E4M3, _E4M3_OF_E5M3 = _scale_tables()
