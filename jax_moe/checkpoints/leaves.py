"""Arrays that are read on demand, and their way into JAX without a second copy in memory."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jax_moe import placement, progress
from jax_moe.experts import Experts

_ALIGNMENT = 64  # of a host buffer that jax.device_put uses in place on the CPU


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that exists in files.

    Attributes:
      shape, dtype: of the array.
      row: reads ``array[(i, *inner)]`` for an expert i and slices of the other axes; for a scalar, the array.
      name: for the progress bar.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    row: Callable[[int, tuple[slice, ...]], np.ndarray]
    name: str

    def read(self, index: tuple[slice, ...] | None = None, *, show_progress: bool = False) -> np.ndarray:
        """Reads ``array[index]``, one expert at a time, into a buffer that JAX can take over."""
        index = (slice(None),) * len(self.shape) if index is None else index
        result = _aligned_empty([len(range(n)[part]) for n, part in zip(self.shape, index, strict=True)], self.dtype)
        if not index:
            result[()] = self.row(0, ())
            return result
        experts = range(self.shape[0])[index[0]]
        for place, expert in enumerate(progress.track(experts, self.name, enabled=show_progress)):
            result[place] = self.row(expert, index[1:])
        return result


def to_jax(
    leaves: Experts,
    mesh: jax.sharding.Mesh | None,
    expert_axis: placement.Axis,
    tensor_axis: placement.Axis,
    show_progress: bool,
) -> Experts:
    """Reads every leaf: onto the default device, or each device's part of it onto ``mesh``."""
    if mesh is None:
        return jax.tree.map(lambda leaf: jax.device_put(leaf.read(show_progress=show_progress)), leaves)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaves)
    shardings = placement.expert_shardings(shapes, mesh, expert_axis=expert_axis, tensor_axis=tensor_axis)

    def place(leaf: Leaf, sharding: jax.sharding.NamedSharding) -> jax.Array:
        read: dict[tuple[range, ...], np.ndarray] = {}  # else devices that hold the same would each read it

        def part(index: Any) -> np.ndarray:
            key = tuple(range(size)[inside] for size, inside in zip(leaf.shape, index, strict=True))
            if key not in read:
                read[key] = leaf.read(index, show_progress=show_progress)
            return read[key]

        # The dtype is for a process that none of the mesh's devices belongs to.
        return jax.make_array_from_callback(leaf.shape, sharding, part, dtype=leaf.dtype)

    return jax.tree.map(place, leaves, shardings)


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)
