"""The layouts for ``tcgen05.mma``, one for each precision: ``device/weight_block.py`` says what lies where."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import nvfp4
from jax_moe.kernels.device import bf16_weights
from jax_moe.kernels.sm100.device import weight_block
from jax_moe.layouts import bf16_blocks, blocks


def _row_order(gated: bool) -> np.ndarray:
    """Row of a block (gate before up) in each lane of tensor memory."""
    order = np.empty(blocks.BLOCK_ROWS, np.int32)
    for half in range(2):
        for warp in range(4):
            for group in range(8):
                for upper in range(2):
                    part, row = bf16_weights.row_in_block(half, warp, group, upper, gated)
                    order[weight_block.lane(half, warp, group, upper)] = part * (blocks.BLOCK_ROWS // 2) + row
    return order


class Tcgen05Fp4(blocks.Blocks):
    """For w4a4: blocks of 128 x 256 weights, 18432 bytes, as the tensor cores read codes and scales.

    Zero and NaN scales are what they are; only the sign of one is moved into its codes, because the hardware has none.
    """

    name = "tcgen05_fp4_v1"
    takes_rounded_x = False
    partition = blocks.partition(name)
    block_k = weight_block.BLOCK_K
    block_bytes = weight_block.BLOCK_BYTES

    def row_order(self, gated: bool) -> np.ndarray:
        return _row_order(gated)

    def encode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        lead = codes.shape[:2]
        rows = _swizzle(nvfp4.pack(codes))
        # Row 32*r + lane is word r of the lane's 16 bytes.
        atoms = scales.reshape(*lead, 4, 32, weight_block.STEPS, 4).transpose(0, 1, 4, 3, 2, 5)
        return jnp.concatenate([rows.reshape(*lead, -1), atoms.reshape(*lead, -1)], axis=-1)

    def decode(self, payload: jax.Array) -> tuple[jax.Array, jax.Array]:
        lead = payload.shape[:2]
        rows, atoms = jnp.split(payload, [weight_block.CODE_BYTES], axis=-1)
        codes = nvfp4.unpack(_swizzle(rows.reshape(*lead, blocks.BLOCK_ROWS, -1)))
        scales = atoms.reshape(*lead, weight_block.STEPS, 32, 4, 4).transpose(0, 1, 4, 3, 2, 5)
        return codes, scales.reshape(*lead, blocks.BLOCK_ROWS, -1)


def _swizzle(rows: jax.Array) -> jax.Array:
    """Bytes ``[..., 128 rows, 128]`` with the chunks of each row in the places of the 128-byte swizzle, and back."""
    size = weight_block.CHUNK_BYTES
    places = weight_block.swizzled(np.arange(8)[:, None], np.arange(weight_block.ROW_BYTES // size)) // size
    chunks = rows.reshape(*rows.shape[:-2], -1, places.size, size)  # of eight rows
    return jnp.take(chunks, jnp.asarray(places.ravel()), axis=-2).reshape(rows.shape)


class Tcgen05Bf16(bf16_blocks.Bf16Blocks):
    """For w4a16: blocks of 128 x 64 weights, 4608 bytes, of which a thread dequantises a row into tensor memory."""

    name = "tcgen05_bf16_v1"
    partition = blocks.partition(name)

    def row_order(self, gated: bool) -> np.ndarray:
        return _row_order(gated)

    def encode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        codes = codes.reshape(*codes.shape[:3], 2, 4, 4, 2).swapaxes(2, 3)  # half, row, word, pair, value
        return bf16_blocks.join(bf16_blocks.pack_codes(codes), bf16_blocks.pack_scales(scales))

    def decode(self, payload: jax.Array) -> tuple[jax.Array, jax.Array]:
        lead = payload.shape[:2]
        code_words, scale_words = bf16_blocks.split(payload)
        codes = bf16_blocks.unpack_codes(code_words.reshape(*lead, 2, blocks.BLOCK_ROWS, 4)).swapaxes(2, 3)
        return codes.reshape(*lead, blocks.BLOCK_ROWS, self.block_k), bf16_blocks.unpack_scales(scale_words)
