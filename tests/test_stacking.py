"""Filling a stack in place: the values of ``jnp.stack``, and no item kept."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import stacking


def test_items_are_stacked_and_let_go():
    alive = []

    def items():
        for index in range(6):
            # The loop may still hold the item before, but none that came earlier.
            assert all(reference() is None for reference in alive[:-1])
            item = {"a": jnp.full((2, 3), index, jnp.uint8), "b": jnp.float32(index)}
            alive.append(weakref.ref(item["a"]))
            yield item
            del item

    stack = stacking.stack_in_place(items(), 6)
    np.testing.assert_array_equal(stack["a"], np.repeat(np.arange(6, dtype=np.uint8), 6).reshape(6, 2, 3))
    np.testing.assert_array_equal(stack["b"], np.arange(6, dtype=np.float32))
    assert stack["a"].dtype == jnp.uint8


def test_the_stack_is_where_its_items_are():
    """An item that JAX may move freely makes a stack that it may move; one that was put somewhere stays there."""
    free = stacking.stack_in_place([jnp.ones(3), jnp.ones(3)], 2)
    assert not free.committed
    device = jax.devices()[-1]
    placed = stacking.stack_in_place([jax.device_put(jnp.ones(3), device)] * 2, 2)
    assert placed.committed
    assert placed.devices() == {device}


def test_the_stack_that_was_extended_is_not_a_copy():
    stack = jnp.zeros((4, 8))
    stacking._insert(stack, jnp.ones(8), 2)
    assert stack.is_deleted()
