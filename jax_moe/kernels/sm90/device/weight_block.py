"""The weight block of sm_90a: where each word of codes and of block scales of 128 x 64 weights lies.

The matrix product runs with weights on the M side and A in registers, so the layout is the register layout
of ``wgmma.m64nNk16`` (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"). A weight block is what one
warpgroup multiplies per step: 128 rows by 64 values of the contraction, 4608 contiguous bytes of words packed as
``device/bf16_weights.py`` says:

* 4096 bytes of codes: ``u32[half 2][thread 128][step 4]``, so that a thread gets the four k16-steps of one
  64-row half by one 16-byte load, and a warp's loads have no bank conflicts;
* 512 bytes of block scales: ``u32[warp 4][group 8][half 2][upper 2]``, one word for the four k16-steps of a row,
  again 16 bytes for a thread.

A thread is ``32*warp + 4*group + quad``. In 64-row half ``half`` it holds rows ``16*warp + group`` (upper = 0) and
``16*warp + group + 8`` (upper = 1), and in k16-step ``step`` the values ``2*quad, 2*quad + 1`` and the same
plus 8. One word has those eight codes: ``pair = upper + 2*(k >= 8)`` of two neighbouring values.
"""

from jax_moe.kernels.device.bf16_weights import (
    BLOCK_BYTES as BLOCK_BYTES,
    BLOCK_K as BLOCK_K,
    BLOCK_ROWS as BLOCK_ROWS,
    CODE_BYTES as CODE_BYTES,
)
