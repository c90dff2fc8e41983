"""What the devices of a mesh send one another in ``sharded_moe``: tokens before the local op, partial sums behind it.

Inside ``shard_map``; axes are names of mesh axes. ``docs/scaling.md`` has the bytes and the times of each.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jax_moe import parcels, parcels_primitive
from jax_moe.routing import Routing

Axes = tuple[str, ...]


def gather(tree, axes: Axes):
    """Every leaf ``[t, ...]`` of all devices, one after another."""
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axes, tiled=True), tree)


def gather_parcels(
    x: jax.Array, routing: Routing, input_scale: jax.Array, axes: Axes, *, layout: str, command_buffer: bool
) -> tuple[jax.Array, Routing, jax.Array]:
    """The tokens of all devices as w4a4 multiplies them, and their routing, by one collective.

    Each device rounds its own tokens, and 9 bytes for 16 values travel instead of 32. The global scale is the same
    everywhere, so the bits are those of rounding behind the gather.

    Args:
      x: bfloat16 ``[t, H]``.
      routing: of these tokens.
      input_scale: float32 scalar, the global scale of x.
      axes: over which ``n`` devices.
      layout, command_buffer: as :func:`parcels_primitive.make` takes them.

    Returns:
      bfloat16 ``[n*t, H]``, code * block scale, exactly; the routing of these tokens; and both as the parcels in which
      they came. XLA leaves out what a call does not use. The tangents of the first two are defined as those of what was
      gathered (``Problem.x_form``).
    """
    made = parcels_primitive.make(x, routing, input_scale, layout=layout, command_buffer=command_buffer)
    gathered = gather(made, axes)
    expert_ids = parcels.routing_of(gathered, routing.expert_ids.shape[1]).expert_ids
    rounded, weights = _contents(x, routing.weights, gathered, axes)
    return rounded, Routing(expert_ids=expert_ids, weights=weights), gathered


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _contents(x: jax.Array, weights: jax.Array, gathered: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """What is in ``gathered`` parcels, which x and weights of this device went into."""
    del axes
    top_k = weights.shape[1]
    return parcels.x_of(gathered, top_k, x.shape[1]), parcels.routing_of(gathered, top_k).weights


@_contents.defjvp
def _contents_jvp(axes: Axes, primals, tangents):
    return _contents(*primals, axes), gather(tangents[:2], axes)


def add_up(partial: jax.Array, *, scattered: Axes, summed: Axes, in_order: bool = False) -> jax.Array:
    """The sum of all devices' partial outputs, which travel in the dtype that they have.

    Args:
      partial: float32 or bfloat16 ``[T, H]``.
      scattered: axes of which each device keeps only its own tokens.
      summed: axes of which each device gets the same.
      in_order: more than two parts are added in the order of devices, in float32, and not in one that may depend on T.

    Returns:
      float32 or ``partial``'s dtype, ``[t, H]``, one of ``scattered``'s n slices of tokens. bfloat16 parts are added
      in float32 where they are scattered, and not rounded if that is all; XLA's all-reduce over ``summed`` adds them in
      bfloat16.
    """
    dtype, y = partial.dtype, partial
    if scattered and (dtype == jnp.bfloat16 or (in_order and _size(scattered) > 2)):
        y = _slice_of_the_sum(y, scattered)
    elif scattered:
        y = jax.lax.psum_scatter(y, scattered, tiled=True)
    if _size(summed) > 1:
        y = y.astype(dtype)
    if in_order and _size(summed) > 2:
        return _sum_in_order(y, summed)
    # Over axes of one device too: it says that y is the same on all of them.
    return jax.lax.psum(y, summed) if summed else y


def _slice_of_the_sum(y: jax.Array, axes: Axes) -> jax.Array:
    """float32: of the sum over n devices, in their order, this one's of n slices along the first axis.

    As many bytes as a reduce-scatter sends, but no sum is rounded on the way, and their order is fixed: here, because
    the order of a reduction depends on its shape (docs/determinism.md).
    """
    parts = jax.lax.all_to_all(y, axes, split_axis=0, concat_axis=0, tiled=True)
    parts = parts.reshape(_size(axes), -1, *y.shape[1:]).astype(jnp.float32)
    return functools.reduce(jnp.add, [parts[device] for device in range(len(parts))])


def _sum_in_order(y: jax.Array, axes: Axes) -> jax.Array:
    """The sum over all devices, in their order: each adds up a slice, and all get the slices of all."""
    n = _size(axes)
    slices = jnp.pad(y.reshape(-1), (0, -y.size % n)).reshape(n, -1)
    mine = _slice_of_the_sum(slices, axes)[0].astype(y.dtype)
    # A gather whose result is known to be the same everywhere: a slice and zeros have one sum.
    placed = jnp.zeros_like(slices).at[jax.lax.axis_index(axes)].set(mine)
    return jax.lax.psum(placed, axes).reshape(-1)[: y.size].reshape(y.shape)


def _size(axes: Axes) -> int:
    return math.prod(jax.lax.axis_size(axis) for axis in axes)
