"""Stacks that are filled one item at a time, so that memory never holds all items and their stack at once."""

from collections.abc import Iterable
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp


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
    device = leaf.sharding if not isinstance(leaf, jax.core.Tracer) and leaf.committed else None
    return jnp.zeros((count, *leaf.shape), leaf.dtype, device=device)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack, item, index: int):
    """``stack`` with ``item`` at ``index``, in place."""
    return jax.tree.map(lambda s, i: jax.lax.dynamic_update_index_in_dim(s, i, index, 0), stack, item)
