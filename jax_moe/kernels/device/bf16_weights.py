"""A block of NVFP4 weights that a kernel turns into bf16: how its codes and block scales are packed into words.

A block is 128 rows by 64 values of the contraction: 4096 bytes of codes, then 512 bytes of block scales. A word of
codes has eight of them, four pairs of two neighbouring values; a word of scales has the four of one row. The bits of a
word stand so that a few logical instructions turn a pair of codes, or two scales, into two bf16 numbers, whose products
are exact. Which eight codes share a word, and where the words lie in a block, is the target's (``weight_block.py``).

Which row of the matrix an accumulator of the product is for, is ours to choose (:func:`row_in_block`): neighbouring
rows are put into one thread, so that epilogues store and reduce vectors, and gate and up of one intermediate value meet
in it. That goes for every block of 128 rows.
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
``(word & SCALE_MASK) | SCALE_EXPONENT`` is scale * 2**119, for e4m3's subnormals too. A zero scale has no code: its
codes are zeros instead."""

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

    The thread is ``32*warp + 4*group + quad`` of a warpgroup; it holds four rows, of two ``half`` and two ``upper``.
    A gated weight block is 64 gate and 64 up rows; 16 neighbouring ones (a block of NVFP4) in one warp. Otherwise it is
    128 rows of one part, four neighbouring ones in one thread.
    """
    if gated:
        return upper, 16 * warp + 2 * group + half
    return 0, 32 * warp + 4 * group + 2 * half + upper
