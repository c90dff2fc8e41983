"""The primitive of the grouped product, which lowers to one custom call, and its rules."""

import dataclasses
import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
import jax.numpy as jnp

from jax_moe import custom_call, eager, ffi
from jax_moe.experts import CANONICAL
from jax_moe.product.problem import cpu_workspaces, Product

product_p = Primitive("jax_moe_ragged_dot")
"""``out = product_p.bind(*operands, product=...)``: those of ``problem.py``, but for those in ``product.absent``."""

X, SIZES = range(2)
"""Places of the operands that lead with rows, or that say whose they are."""

product_p.def_impl(functools.partial(eager.run_eagerly, product_p))


@product_p.def_abstract_eval
def _result_type(x, *_, product: Product):
    # Inside shard_map, the output varies over the mesh axes that x varies over.
    return x.update(shape=(product.num_rows, product.out_features), dtype=product.out_dtype, weak_type=False)


def _lower_cpu(ctx, *operands, product: Product):
    if product.layout != CANONICAL:
        raise ValueError(
            f"weights: got layout {product.layout!r}, but on a CPU ragged_dot needs {CANONICAL!r} weights: those that "
            "jax_moe.prepare was given"
        )
    return custom_call.emit(ctx, ffi.PRODUCT_TARGET, operands, product, {}, cpu_workspaces(product))


def _lower_cuda(ctx, *operands, product: Product):
    return custom_call.emit_for_cuda(ctx, ffi.PRODUCT_TARGET, ffi.PRODUCT_NO_CAPTURE_TARGET, operands, product)


def batch(primitive: Primitive, operands, axes, *, product: Product, **static):
    """Batching rule: the mapped axis becomes part of T, group by group. What stands for x may be a tangent of it."""
    x, sizes, *rest = operands
    if any(axis is not None for axis in axes[SIZES + 1 :]):
        raise NotImplementedError(
            "ragged_dot: vmap over weights or group_offset. x and group_sizes may be mapped, because they become more "
            "rows of the same groups: give the weights in_axes=None. For several layers, use jax.lax.scan."
        )
    size = operands[X].shape[axes[X]] if axes[X] is not None else sizes.shape[axes[SIZES]]
    total = size * product.num_rows
    bind = functools.partial(primitive.bind, product=dataclasses.replace(product, num_rows=total), **static)
    x = jnp.broadcast_to(x, (size, *x.shape)) if axes[X] is None else jnp.moveaxis(x, axes[X], 0)
    if axes[SIZES] is None:
        # Row r of every batch is in the same group: row by row, the groups stay in one piece.
        sizes = size * jnp.diff(group_ends(sizes, product.num_rows), prepend=0)
        out = bind(jnp.swapaxes(x, 0, 1).reshape(total, x.shape[-1]), sizes, *rest)
        return jnp.swapaxes(out.reshape(product.num_rows, size, -1), 0, 1), 0
    sizes = jnp.moveaxis(sizes, axes[SIZES], 0)
    groups = jax.vmap(functools.partial(group_of_rows, num_rows=product.num_rows))(sizes).reshape(-1)
    order = jnp.argsort(groups)
    counts = jnp.zeros(product.num_groups, jnp.int32).at[groups].add(1, mode="drop")  # as far as there are rows
    out = bind(x.reshape(total, x.shape[-1])[order], counts, *rest)
    return jnp.zeros_like(out).at[order].set(out).reshape(size, product.num_rows, -1), 0


def group_of_rows(sizes: jax.Array, *, num_rows: int) -> jax.Array:
    """int32 ``[T]``: the group of each row; E, the number of ``sizes`` ``[E]``, where no group has it."""
    ends = group_ends(sizes, num_rows)
    return jnp.searchsorted(ends, jnp.arange(num_rows, dtype=jnp.int32), side="right").astype(jnp.int32)


def group_ends(sizes: jax.Array, num_rows: int) -> jax.Array:
    """int32 ``[E]``: the row behind the last one of each group, sizes cut as the handlers do it."""

    def add(a, b):  # at most num_rows, and no sum beyond an int32
        return a + jnp.minimum(b, num_rows - a)

    return jax.lax.associative_scan(add, jnp.clip(sizes, 0, num_rows))


mlir.register_lowering(product_p, _lower_cpu, platform="cpu")
mlir.register_lowering(product_p, _lower_cuda, platform="cuda")
batching.primitive_batchers[product_p] = functools.partial(batch, product_p)
