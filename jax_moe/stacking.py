"""A function of each expert in turn, stacked, so that memory never holds what it needs for all of them at once."""

from collections.abc import Callable, Iterable
import functools
import operator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp


def map_in_turn(function: Callable[[Any], Any], operands: Any, indices: Iterable[int]) -> Any:
    """What ``jax.vmap(function)(operands)`` would give, one index of the leading axes after another.

    Args:
      function: of one index of ``operands``; returns a pytree of arrays.
      operands: a pytree of arrays of one leading length, at least 1; on the host, a device, or traced.
      indices: 0, 1, ... to the end; maybe with a progress bar, which does not show where arrays are traced.
    """
    leaves = jax.tree.leaves(operands)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return jax.lax.map(function, operands)  # one copy of the function in the program, however many experts
    items = (function(jax.tree.map(operator.itemgetter(index), operands)) for index in indices)
    return stack_in_place(items, leaves[0].shape[0])


def stack_in_place(items: Iterable[Any], count: int) -> Any:
    """What ``jax.tree.map(jnp.stack, *items)`` would give for ``count`` >= 1 pytrees of arrays, where they are."""
    stack = None
    for index, item in enumerate(items):
        if stack is None:
            stack = jax.tree.map(lambda leaf: _empty_stack(leaf, count), item)
        # Waiting keeps JAX from running ahead, with the inputs of every item in memory at once.
        stack = jax.block_until_ready(_insert(stack, item, index))
    return stack


def _empty_stack(leaf: jax.Array, count: int) -> jax.Array:
    # Committed only where the item is: else the stack could not be moved to a mesh as freely as its items.
    device = leaf.sharding if leaf.committed else None
    return jnp.zeros((count, *leaf.shape), leaf.dtype, device=device)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack, item, index: int):
    """``stack`` with ``item`` at ``index``, in place."""
    return jax.tree.map(lambda s, i: jax.lax.dynamic_update_index_in_dim(s, i, index, 0), stack, item)
