"""NVFP4 numerics: e2m1 codes, e4m3 block scales, one fp32 global scale.

A value is ``e2m1 * block_scale * global_scale``: a 4-bit code, the e4m3 scale
of its block of 16 neighbours along the last axis, and the fp32 scale of the
whole tensor, which is *multiplied*. Codes are packed two to a byte, the even
index in the low nibble, as NVFP4 checkpoints store them.

Everything here is bit exact and follows the same rules as the C++ handler
(``ffi/nvfp4.h``) and the GPU kernels; ``tests/test_nvfp4.py`` compares
it with ``ml_dtypes`` over every code, tie and special value.
"""

import jax
import jax.numpy as jnp

from jax_moe import steady

__all__ = [
    "BLOCK_SIZE", "E2M1_MAX", "E4M3_MAX", "amax", "dequantize", "e2m1_from_float", "e2m1_to_float", "global_scale_for",
    "pack", "payload_bytes", "quantize", "quantize_dequantize", "row_scale", "unpack",
]  # fmt: skip

BLOCK_SIZE = 16
"""Values that share one block scale (the NVFP4 definition)."""

E2M1_MAX = 6.0
"""Largest e2m1 magnitude."""

E4M3_MAX = 448.0
"""Largest finite e4m3 magnitude; casting anything above 464 would give NaN."""

LEAST_ROW_SCALE = 2.0**-64
"""Of a row that is smaller still, so that no scale, reciprocal or product with one is subnormal or infinite."""

_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGN_BIT = 8


def e2m1_from_float(values: jax.Array) -> jax.Array:
    """Rounds to e2m1: nearest, ties to even, saturating at +-6.

    Args:
      values: ``[...]`` of any float dtype; compared in float32.

    Returns:
      ``[...]`` uint8 codes 0..15; bit 3 is the sign. NaN becomes a zero of the
      opposite sign, which is what an ``ml_dtypes`` cast gives.
    """
    values = values.astype(jnp.float32)
    magnitude = jnp.abs(values)
    # The code of a magnitude is the number of rounding boundaries below it. A tie belongs to the even
    # code: boundaries below an odd code are exclusive, those below an even code inclusive.
    code = jnp.zeros(values.shape, jnp.uint8)
    for upper in range(1, len(_E2M1_MAGNITUDES)):
        boundary = (_E2M1_MAGNITUDES[upper - 1] + _E2M1_MAGNITUDES[upper]) / 2
        above = magnitude >= boundary if upper % 2 == 0 else magnitude > boundary
        code += above.astype(jnp.uint8)
    negative = jnp.signbit(values) ^ jnp.isnan(values)
    return code | jnp.where(negative, jnp.uint8(_SIGN_BIT), jnp.uint8(0))


def e2m1_to_float(codes: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Values of e2m1 ``codes`` (uint8, 0..15); exact in bf16 and wider."""
    # By arithmetic, which XLA fuses into what comes next; a table look-up would keep its indices in memory.
    magnitude = codes & (_SIGN_BIT - 1)
    twice = jnp.where(magnitude < 2, magnitude, ((2 + (magnitude & 1)) << (magnitude >> 1)) >> 1)
    values = twice.astype(dtype) * jnp.asarray(0.5, dtype)
    return jnp.where(codes < _SIGN_BIT, values, -values)


def pack(codes: jax.Array) -> jax.Array:
    """Packs ``[..., n]`` codes into ``[..., n/2]`` bytes, even index in the low nibble.

    Raises:
      ValueError: the last axis is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"codes: the last axis must be even to pack two to a byte, got shape {codes.shape}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(payload: jax.Array) -> jax.Array:
    """Inverse of :func:`pack`: ``[..., n/2]`` bytes to ``[..., n]`` codes."""
    pairs = jnp.stack([payload & 0xF, payload >> 4], axis=-1)
    return pairs.reshape(*payload.shape[:-1], 2 * payload.shape[-1])


def payload_bytes(payload: jax.Array) -> jax.Array:
    """A payload as uint8 ``[..., n/2]``, given that or a float4_e2m1fn array ``[..., n]``.

    XLA counts a packed float4 as a byte each in some places, and NumPy stores one in a byte: only uint8 is unambiguous.
    """
    return jnp.asarray(payload).view(jnp.uint8) if payload.dtype == jnp.float4_e2m1fn else payload


def amax(values: jax.Array, axis: int | None = None) -> jax.Array:
    """The largest magnitude along ``axis`` (None: of all) in float32; NaN where there is one."""
    # As integers: the bits of non-negative floats order like their values, NaN above all. XLA's float maximum on a CPU
    # loses a NaN in all but the smallest arrays (seen with jax 0.10.2 and 0.12).
    bits = jax.lax.bitcast_convert_type(jnp.abs(values.astype(jnp.float32)), jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=axis), jnp.float32)


def global_scale_for(amax: jax.Array) -> jax.Array:
    """The fp32 global scale under which ``amax`` is still representable: amax / (6 * 448).

    An all-zero tensor, or one too small for a scale, gets 1, so that quantising it gives zeros instead of 0/0.
    NaN and infinity stay, so that they are not hidden.
    """
    scale = steady.divide(jnp.asarray(amax, jnp.float32), jnp.float32(E2M1_MAX * E4M3_MAX))
    return jnp.where(scale == 0, jnp.float32(1), scale)


def row_scale(values: jax.Array) -> jax.Array:
    """The fp32 global scales ``[...]`` of rows ``[..., n]``: of each ``max(amax / (6 * 448), 2**-64)``.

    What ``precision="w4a4_dynamic"`` quantises rows with; the division is IEEE's. NaN and infinity stay.
    """
    scale = steady.divide(amax(values, axis=-1), jnp.float32(E2M1_MAX * E4M3_MAX))
    return jnp.where(scale < LEAST_ROW_SCALE, jnp.float32(LEAST_ROW_SCALE), scale)


def quantize(values: jax.Array, global_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises to NVFP4 under a given global scale.

    For each block ``v`` of 16: ``sf = e4m3(min(amax(v) / (6*s), 448))``; if ``sf``
    is 0 all codes are 0, else ``code = e2m1(v * (1 / (sf*s)))``; all in float32 with
    IEEE division, where ``s`` is the global scale (docs/numerics.md). XLA's CPU backend flushes subnormals,
    so there the bits are those of IEEE for ``2**-115 <= s <= 2**117``: with a scale beyond, a value, product or
    reciprocal that counts may be subnormal. On a GPU the reciprocal alone may be, with a scale above.

    Args:
      values: ``[..., n]``, n a multiple of 16.
      global_scale: fp32, broadcastable to ``values.shape[:-1]``; positive and finite.

    Returns:
      ``payload`` ``[..., n/2]`` uint8 and ``block_scale`` ``[..., n/16]`` float8_e4m3fn.
      A block with a NaN in it gets a NaN block scale.

    Raises:
      ValueError: n is not a multiple of 16.
    """
    n = values.shape[-1]
    if n % BLOCK_SIZE:
        raise ValueError(f"values: the last axis must be a multiple of {BLOCK_SIZE}, got shape {values.shape}")
    blocks = values.astype(jnp.float32).reshape(*values.shape[:-1], n // BLOCK_SIZE, BLOCK_SIZE)
    scale = jnp.broadcast_to(jnp.asarray(global_scale, jnp.float32), values.shape[:-1])[..., None]

    block_scale = jnp.minimum(steady.divide(amax(blocks, axis=-1), E2M1_MAX * scale), E4M3_MAX).astype(
        jnp.float8_e4m3fn
    )
    # XLA's GPU backend may take a conversion and the one back for nothing, and would use the scale unrounded
    # (xla_allow_excess_precision); the barrier keeps the rounding.
    block_scale = jax.lax.optimization_barrier(block_scale)
    decoded = block_scale.astype(jnp.float32)
    is_zero = decoded == 0
    divisor = jnp.where(is_zero, 1.0, decoded) * scale
    inverse = steady.divide(jnp.ones_like(divisor), divisor)
    # In a NaN block the sign of v * NaN is the hardware's choice; keep the sign of a NaN in v and call
    # every other product a positive NaN, so that all backends agree.
    scaled = jnp.where(
        jnp.isnan(blocks), blocks, jnp.where(jnp.isnan(inverse)[..., None], jnp.nan, blocks * inverse[..., None])
    )
    codes = jnp.where(is_zero[..., None], jnp.uint8(0), e2m1_from_float(scaled))
    return pack(codes.reshape(values.shape)), block_scale


def dequantize(
    payload: jax.Array, block_scale: jax.Array, global_scale: jax.Array | None = None, dtype=jnp.float32
) -> jax.Array:
    """Values of an NVFP4 tensor.

    ``e2m1 * block_scale`` needs 6 significant bits, so without a global scale the result is exact in
    bfloat16 and wider: every backend multiplies *the same* operands.

    Args:
      payload: ``[..., n/2]`` uint8, or ``[..., n]`` float4_e2m1fn.
      block_scale: ``[..., n/16]`` float8_e4m3fn.
      global_scale: fp32, broadcastable to ``payload.shape[:-1]``, or None to leave it out.
      dtype: of the result.

    Returns:
      ``[..., n]`` of ``dtype``.
    """
    values = e2m1_to_float(unpack(payload_bytes(payload)))
    blocks = values.reshape(*block_scale.shape, BLOCK_SIZE) * block_scale.astype(jnp.float32)[..., None]
    values = blocks.reshape(values.shape)
    if global_scale is not None:
        values = values * jnp.broadcast_to(global_scale, payload.shape[:-1])[..., None]
    return values.astype(dtype)


def quantize_dequantize(values: jax.Array, global_scale: jax.Array) -> jax.Array:
    """NVFP4 rounding of ``values`` *without* the global scale: what a w4a4 GEMM multiplies, in bfloat16."""
    return dequantize(*quantize(values, global_scale), dtype=jnp.bfloat16)
