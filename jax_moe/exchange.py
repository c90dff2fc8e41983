"""What the devices of a mesh send one another in ``sharded_moe``: tokens before the local op, partial sums behind it.

Inside ``shard_map``; axes are names of mesh axes. ``docs/scaling.md`` has the bytes and the times of each.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jax_moe import nvfp4

Axes = tuple[str, ...]


def gather(tree, axes: Axes):
    """Every leaf ``[t, ...]`` of all devices, one after another."""
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axes, tiled=True), tree)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def gather_rounded(x: jax.Array, input_scale: jax.Array, axes: Axes) -> jax.Array:
    """The rows of all devices as w4a4 multiplies them: bfloat16 code * block scale, exactly.

    Each device rounds its own rows, and 9 bytes for 16 values travel instead of 32. The global scale is the same
    everywhere, so the bits are those of rounding behind the gather.

    Args:
      x: bfloat16 ``[t, H]``.
      input_scale: float32 scalar, the global scale of x.
      axes: over which ``n`` devices.

    Returns:
      bfloat16 ``[n*t, H]``. Its tangent is defined as that of the gathered x (``Problem.x_is_rounded``).
    """
    payload, block_scale = nvfp4.quantize(x, input_scale)
    scale_bytes = jax.lax.bitcast_convert_type(block_scale, jnp.uint8)
    rows = gather(jnp.concatenate([payload, scale_bytes], axis=-1), axes)  # one collective, not two
    payload, scale_bytes = jnp.split(rows, [payload.shape[-1]], axis=-1)
    block_scale = jax.lax.bitcast_convert_type(scale_bytes, jnp.float8_e4m3fn)
    return nvfp4.dequantize(payload, block_scale, dtype=jnp.bfloat16)


@gather_rounded.defjvp
def _gather_rounded_jvp(axes: Axes, primals, tangents):
    return gather_rounded(*primals, axes), gather(tangents[0], axes)


def add_up(partial: jax.Array, *, scattered: Axes, summed: Axes) -> jax.Array:
    """The sum of all devices' partial outputs, which travel in the dtype that they have.

    Args:
      partial: float32 or bfloat16 ``[T, H]``.
      scattered: axes of which each device keeps only its own tokens.
      summed: axes of which each device gets the same.

    Returns:
      float32 or ``partial``'s dtype, ``[t, H]``, one of ``scattered``'s n slices of tokens. bfloat16 parts are added
      in float32 where they are scattered, and not rounded if that is all; XLA's all-reduce over ``summed`` adds them in
      bfloat16.
    """
    dtype, y = partial.dtype, partial
    if scattered and dtype == jnp.bfloat16:
        # As many bytes as a reduce-scatter sends, but no sum is rounded on the way, and their order is fixed: here,
        # because the order of a reduction depends on its shape (docs/determinism.md).
        parts = jax.lax.all_to_all(y, scattered, split_axis=0, concat_axis=0, tiled=True)
        parts = parts.reshape(_size(scattered), -1, y.shape[1]).astype(jnp.float32)
        y = functools.reduce(jnp.add, [parts[device] for device in range(len(parts))])
    elif scattered:
        y = jax.lax.psum_scatter(y, scattered, tiled=True)
    if _size(summed) > 1:
        y = y.astype(dtype)
    # Over axes of one device too: it says that y is the same on all of them.
    return jax.lax.psum(y, summed) if summed else y


def _size(axes: Axes) -> int:
    return math.prod(jax.lax.axis_size(axis) for axis in axes)
