"""The weight blocks of sm_100f: where each code and each block scale lies. Importable without the DSL.

Weights are the M side of ``tcgen05.mma``, 128 rows of it: row r of a block is lane r of tensor memory. The index
formulas take and give ints, arrays or the DSL's integers.

**For w4a4** the tensor cores read codes and scales as they are stored. A block is 128 rows by 256 values:

* 16384 bytes of codes, a K-major operand in the 128-byte swizzle: row r has 128 bytes at 128*r, two codes a byte (the
  even one low), and its 16-byte chunk c stands at c ^ (r % 8) (:func:`swizzled`);
* four scale atoms of 512 bytes, one for each 64 values (a step of the product): the four e4m3 scales of row r at
  16*(r % 32) + 4*(r // 32) (:func:`atom_word`), as ``tcgen05.cp.32x128b.warpx4`` wants them.

Tokens lie in shared memory by the same formulas, and so does the intermediate in global memory.

**For w4a16** a thread dequantises one row and stores it into its lane of tensor memory as bf16. A block is 128 rows by
64 values, packed as ``device/bf16_weights.py`` says:

* 4096 bytes of codes: ``u32[half 2][lane 128][word 4]``, a half being 32 values, so that a thread gets half a row by
  one 16-byte load. A word has eight consecutive values, pair p the values 2p and 2p + 1;
* 512 bytes of block scales: ``u32[lane 128]``.
"""

from jax_moe.kernels.device import bf16_weights
from jax_moe.kernels.device.bf16_weights import BLOCK_ROWS

BLOCK_K = 256
STEP_K = 64
"""Values of one product and of one scale atom."""
STEPS = BLOCK_K // STEP_K

CHUNK_BYTES = 16
ROW_BYTES = BLOCK_K // 2
CODE_BYTES = BLOCK_ROWS * ROW_BYTES
ATOM_BYTES = BLOCK_ROWS * STEP_K // 16
SCALE_BYTES = STEPS * ATOM_BYTES
BLOCK_BYTES = CODE_BYTES + SCALE_BYTES

BF16_BLOCK_K = bf16_weights.BLOCK_K
BF16_CODE_BYTES = bf16_weights.CODE_BYTES
BF16_BLOCK_BYTES = bf16_weights.BLOCK_BYTES
"""Of w4a16's block."""


def lane(half, warp, group, upper):
    """Lane of tensor memory of an accumulator that a thread 32*warp + 4*group + quad gets by ``tcgen05.ld.16x256b``.

    That load returns 16 lanes (``half``) in the registers of ``wgmma``'s fragments, so ``bf16_weights.row_in_block``
    says which row of the matrix the lane is for.
    """
    return 32 * warp + 16 * half + group + 8 * upper


def swizzled(row, chunk):
    """Byte of 16-byte ``chunk`` of ``row``, where rows have 128 bytes in the 128-byte swizzle."""
    return row * ROW_BYTES + (chunk ^ (row % 8)) * CHUNK_BYTES


def code_byte(row, value):
    """Byte of w4a4's block with the code of ``value`` in [0, 256): its low half if that is even, else its upper."""
    return swizzled(row, value // (2 * CHUNK_BYTES)) + value // 2 % CHUNK_BYTES


def atom_word(row):
    """Byte of a scale atom where the four scales of ``row`` in [0, 128) begin."""
    return 16 * (row % 32) + 4 * (row // 32)


def scale_byte(row, value):
    """Byte of w4a4's block with the scale of ``value`` in [0, 256), behind the codes."""
    return CODE_BYTES + value // STEP_K * ATOM_BYTES + atom_word(row) + value % STEP_K // 16


def bf16_code_byte(row, value):
    """Byte of w4a16's block where the word begins that has ``value`` in [0, 64): its pair is value % 8 // 2."""
    return value // 32 * (BF16_CODE_BYTES // 2) + row * CHUNK_BYTES + value % 32 // 8 * 4


def bf16_scale_byte(row):
    """Byte of w4a16's block where the word begins that has the four scales of ``row``."""
    return BF16_CODE_BYTES + row * 4
