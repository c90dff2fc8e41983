"""Layouts of kernels that turn the weights into bf16: their codes and block scales stand in words that make this easy.

``kernels/device/bf16_weights.py`` says how a word is packed; a class derived from :class:`Bf16Blocks` says which codes
share a word and where the words lie. The scales have no zero: its codes are zeros instead. And they have no NaN: one
makes the global scale of its expert and part NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe.kernels.device import bf16_weights
from jax_moe.layouts import blocks

_E5M3_FIRST = 13  # e5m3 exponent of 2**-9, the smallest e4m3: see bf16_weights.SCALE_EXPONENT


class Bf16Blocks(blocks.Blocks):
    """Blocks of 128 x 64 weights whose block scales are e5m3."""

    takes_rounded_x = True
    block_k = bf16_weights.BLOCK_K
    block_bytes = bf16_weights.BLOCK_BYTES

    def take_scales(self, codes: jax.Array, magnitude: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        codes = jnp.where((magnitude == 0)[..., None], jnp.uint8(0), codes)
        return codes, jnp.asarray(_E5M3_OF_E4M3)[magnitude], magnitude == blocks.E4M3_NAN

    def give_scales(self, scales: jax.Array) -> jax.Array:
        return jnp.asarray(_E4M3_OF_E5M3)[scales]


def pack_codes(codes: jax.Array) -> jax.Array:
    """Words of codes, uint32 ``[...]``, from uint8 ``[..., pair 4, value 2]``."""
    codes = codes.astype(jnp.uint32)
    words = jnp.zeros(codes.shape[:-2], jnp.uint32)
    for pair in range(4):
        for value in range(2):
            for bit in range(4):
                words |= ((codes[..., pair, value] >> bit) & 1) << bf16_weights.code_bit(pair, value, bit)
    return words


def unpack_codes(words: jax.Array) -> jax.Array:
    """The inverse of :func:`pack_codes`."""
    codes = [
        sum((words >> bf16_weights.code_bit(pair, value, bit) & 1) << bit for bit in range(4))
        for pair in range(4)
        for value in range(2)
    ]
    return jnp.stack(codes, axis=-1).astype(jnp.uint8).reshape(*words.shape, 4, 2)


def pack_scales(scales: jax.Array) -> jax.Array:
    """Words of scales, uint32 ``[...]``, from e5m3 in uint8 ``[..., step 4]``."""
    scales = scales.astype(jnp.uint32)
    words = jnp.zeros(scales.shape[:-1], jnp.uint32)
    for step in range(4):
        for bit in range(8):
            words |= ((scales[..., step] >> bit) & 1) << bf16_weights.scale_bit(step, bit)
    return words


def unpack_scales(words: jax.Array) -> jax.Array:
    """The inverse of :func:`pack_scales`."""
    steps = [sum((words >> bf16_weights.scale_bit(step, bit) & 1) << bit for bit in range(8)) for step in range(4)]
    return jnp.stack(steps, axis=-1).astype(jnp.uint8)


def join(code_words: jax.Array, scale_words: jax.Array) -> jax.Array:
    """Blocks, uint8 ``[row_blocks, k_blocks, 4608]``, of words ``[row_blocks, k_blocks, ...]``."""
    words = [array.reshape(*array.shape[:2], -1) for array in (code_words, scale_words)]
    joined = jnp.concatenate(words, axis=-1)
    return jax.lax.bitcast_convert_type(joined, jnp.uint8).reshape(*joined.shape[:2], bf16_weights.BLOCK_BYTES)


def split(payload: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of :func:`join`: words ``[row_blocks, k_blocks, 1024]`` and ``[row_blocks, k_blocks, 128]``."""
    words = jax.lax.bitcast_convert_type(payload.reshape(*payload.shape[:2], -1, 4), jnp.uint32)
    codes, scales = jnp.split(words, [bf16_weights.CODE_BYTES // 4], axis=-1)
    return codes, scales


def _scale_tables() -> tuple[np.ndarray, np.ndarray]:
    """e4m3 bits without sign -> e5m3 (NaN maps to the largest), and back."""
    to_e5m3 = np.zeros(128, np.uint8)  # 0 stays 0
    for bits in range(1, 127):
        exponent, mantissa = bits >> 3, bits & 7
        if exponent == 0:  # subnormal: mantissa * 2**-9
            shift = 3 - (mantissa.bit_length() - 1)
            to_e5m3[bits] = (_E5M3_FIRST + 3 - shift) << 3 | (mantissa << shift & 7)
        else:  # (1 + mantissa/8) * 2**(exponent - 7)
            to_e5m3[bits] = (_E5M3_FIRST + 2 + exponent) << 3 | mantissa
    to_e5m3[blocks.E4M3_NAN] = to_e5m3[blocks.E4M3_NAN - 1]
    back = np.zeros(256, np.uint8)
    back[to_e5m3[:127]] = np.arange(127, dtype=np.uint8)
    return to_e5m3, back


_E5M3_OF_E4M3, _E4M3_OF_E5M3 = _scale_tables()
