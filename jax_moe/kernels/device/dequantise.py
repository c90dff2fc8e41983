"""NVFP4 weights to bf16 in registers, for tensor cores that multiply bf16: what ``bf16_weights.py`` packed."""

from cutlass import Uint32

from jax_moe.kernels.device import bf16_weights, ptx


def scales(word: Uint32):
    """The four block scales of a word, each as a pair of equal bf16."""
    mask, exponent = bf16_weights.SCALE_MASK, bf16_weights.SCALE_EXPONENT
    first = ptx.mask_and_set(word, mask, exponent)
    second = ptx.mask_and_set(ptx.rotate_right(word, 8), mask, exponent)
    return [ptx.broadcast_half(both, upper) for both in (first, second) for upper in (False, True)]


def pairs(word: Uint32, even: Uint32, odd: Uint32):
    """The four pairs of a word of codes times their scales: ``even`` those of pairs 0 and 2, ``odd`` of 1 and 3."""
    mask = Uint32(bf16_weights.PAIR_MASK)
    yield ptx.multiply_bf16x2(word & mask, even)
    yield ptx.multiply_bf16x2(ptx.rotate_right(word, 3) & mask, odd)
    yield ptx.multiply_bf16x2(ptx.rotate_right(word, 6) & mask, even)
    spread = (word & Uint32(bf16_weights.SPREAD_MASK)) * Uint32(bf16_weights.SPREAD_FACTOR)
    yield ptx.multiply_bf16x2(spread & mask, odd)
