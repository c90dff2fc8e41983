"""The weight block of sm_90a: where each code and each block scale of 128 x 64 weights lies.

The matrix product runs with weights on the M side and A in registers, so the layout is the register layout
of ``wgmma.m64nNk16`` (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"). A weight block is what one
warpgroup multiplies per step: 128 rows by 64 values of the contraction, 4608 contiguous bytes:

* 4096 bytes of codes: ``u32[half 2][thread 128][step 4]``, so that a thread gets the four k16-steps of one
  64-row half by one 16-byte load, and a warp's loads have no bank conflicts;
* 512 bytes of block scales: ``u32[warp 4][group 8][half 2][upper 2]``, one word for the four k16-steps of a row,
  again 16 bytes for a thread.

A thread is ``32*warp + 4*group + quad``. In 64-row half ``half`` it holds rows ``16*warp + group`` (upper = 0) and
``16*warp + group + 8`` (upper = 1), and in k16-step ``step`` the values ``2*quad, 2*quad + 1`` and the same
plus 8. One word has those eight codes: ``pair = upper + 2*(k >= 8)`` of two neighbouring values.

Which matrix row a (half, warp, group, upper) holds is ours to choose (:func:`row_in_block`): neighbouring rows are put
into one thread, so that epilogues store and reduce vectors, and gate and up of one intermediate value meet in it.
"""

BLOCK_ROWS = 128
BLOCK_K = 64
CODE_BYTES = BLOCK_ROWS * BLOCK_K // 2
SCALE_BYTES = BLOCK_ROWS * BLOCK_K // 16
BLOCK_BYTES = CODE_BYTES + SCALE_BYTES

PAIR_MASK = 0x81C081C0
"""Where a pair of codes must stand to be a pair of bf16: sign at bit 15, exponent and mantissa at 8, 7 and 6, twice.

As bf16 that is e2m1 * 2**-126, zero and the subnormal 0.5 included.
"""

SPREAD_MASK = 0x001B001B
SPREAD_FACTOR = (1 << 2) | (1 << 7) | (1 << 12)
"""Pair 3 is what is left over by the other three: bits 4, 0, 1, 3 of each half go to 6, 7, 8, 15 by one multiplication
(all partial products fall on different bits, so nothing carries)."""

SCALE_MASK = 0x0FF00FF0
SCALE_EXPONENT = 0x70007000
"""Block scales are stored as unsigned e5m3 with the bf16 exponent's low five bits, so that one LOP3 makes them bf16:
``(word & SCALE_MASK) | SCALE_EXPONENT`` is scale * 2**119, for e4m3's subnormals too."""

SCALE_LOG2 = 119
WEIGHT_LOG2 = SCALE_LOG2 - 126
"""A dequantised weight is e2m1 * block_scale * 2**WEIGHT_LOG2: exact in bf16 for every code and scale. The epilogue
multiplies by 2**-WEIGHT_LOG2 with the global scale."""


def code_bit(pair: int, upper_value: int, bit: int) -> int:
    """Bit of the word that holds ``bit`` (0: mantissa, 1 and 2: exponent, 3: sign) of a code.

    Pair 0 stands in place, pairs 1 and 2 after a rotation to the right by 3 and 6, pair 3 as SPREAD_FACTOR says.
    """
    if pair == 3:
        return (4, 0, 1, 3)[bit] + 16 * upper_value
    return ((6, 7, 8, 15)[bit] + 16 * upper_value + 3 * pair) % 32


def scale_bit(step: int, bit: int) -> int:
    """Bit of a scale word that holds ``bit`` of the e5m3 scale of k16-step ``step``.

    Steps 0 and 1 stand in place, 2 and 3 after a rotation to the right by 8.
    """
    return (4 + 16 * (step % 2) + 8 * (step // 2) + bit) % 32


def row_in_block(half: int, warp: int, group: int, upper: int, gated: bool) -> tuple[int, int]:
    """``(part, row)`` that a thread's accumulator row stands for.

    Gated: it is 64 gate and 64 up rows; 16 neighbouring ones (a block of NVFP4) in one warp. Otherwise it is 128 rows of
    one part, four neighbouring ones in one thread.
    """
    if gated:
        return upper, 16 * warp + 2 * group + half
    return 0, 32 * warp + 4 * group + 2 * half + upper
