"""The layout of Hopper's ``wgmma``: weights as the registers of a warpgroup hold them.

Blocks are of 128 x 64 weights, 4608 bytes; ``device/weight_block.py`` says which word lies where.
"""

import jax
import numpy as np

from jax_moe.kernels.device import bf16_weights
from jax_moe.layouts import bf16_blocks, blocks


class Wgmma(bf16_blocks.Bf16Blocks):
    """One layout for both precisions: the products are the same."""

    name = "wgmma_v1"
    former_names: tuple[str, ...] = ("sm_90a",)
    partition = blocks.partition(name)

    def row_order(self, gated: bool) -> np.ndarray:
        """Rows at ``[half, warp, group, upper]``."""
        order = []
        for half in range(2):
            for warp in range(4):
                for group in range(8):
                    for upper in range(2):
                        part, row = bf16_weights.row_in_block(half, warp, group, upper, gated)
                        order.append(part * (blocks.BLOCK_ROWS // 2) + row)
        return np.array(order, np.int32)

    def encode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        # ..., half, warp, group, upper, [step, k >= 8, quad, value] -> half, warp, group, quad, step, pair, value
        codes = codes.reshape(*codes.shape[:2], 2, 4, 8, 2, 4, 2, 4, 2)
        codes = codes.transpose(0, 1, 2, 3, 4, 8, 6, 7, 5, 9)
        code_words = bf16_blocks.pack_codes(codes.reshape(*codes.shape[:7], 4, 2))
        scales = scales.reshape(*scales.shape[:2], 2, 4, 8, 2, 4)
        scale_words = bf16_blocks.pack_scales(scales.transpose(0, 1, 3, 4, 2, 5, 6))  # warp, group, half, upper
        return bf16_blocks.join(code_words, scale_words)

    def decode(self, payload: jax.Array) -> tuple[jax.Array, jax.Array]:
        lead = payload.shape[:2]
        code_words, scale_words = bf16_blocks.split(payload)
        codes = bf16_blocks.unpack_codes(code_words.reshape(*lead, 2, 4, 8, 4, 4))
        codes = codes.reshape(*codes.shape[:7], 2, 2, 2).transpose(0, 1, 2, 3, 4, 8, 6, 7, 5, 9)
        scales = bf16_blocks.unpack_scales(scale_words.reshape(*lead, 4, 8, 2, 2).transpose(0, 1, 4, 2, 3, 5))
        return codes.reshape(*lead, blocks.BLOCK_ROWS, self.block_k), scales.reshape(*lead, blocks.BLOCK_ROWS, -1)
