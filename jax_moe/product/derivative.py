"""The derivative of the grouped product with respect to x, through weights that stay as they are.

A linear map from the tangent of x to that of the output, and its transpose, in plain JAX and float32 on any device: one
tile of rows after another, so that only one group's matrix is dequantised at a time. The rounding of x (w4a4) is taken
as the identity.
"""

import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

from jax_moe import custom_call, eager, layouts, nvfp4
from jax_moe.derivative import rows_of_a_tile, slice_of_one
from jax_moe.experts import CANONICAL
from jax_moe.operands import fill
from jax_moe.product import primitive
from jax_moe.product.primitive import product_p, X
from jax_moe.product.problem import OPERANDS, Product

derivative_p = Primitive("jax_moe_ragged_dot_derivative")
"""``dy = derivative_p.bind(dx, *operands, product=..., transposed=False)``, with the op's operands but for x; and with
``transposed=True``, ``dx`` from ``dy``."""


def _jvp(primals, tangents, *, product: Product):
    for name, tangent in zip(_given(product), tangents, strict=True):
        is_zero = isinstance(tangent, ad.Zero) or tangent.dtype == jax.dtypes.float0
        if name != "x" and not is_zero:
            raise NotImplementedError(
                f"ragged_dot: differentiated with respect to {name}. NVFP4 weights are frozen: differentiate with "
                "respect to x only (jax.lax.stop_gradient(weights) stops the others)."
            )
    y = product_p.bind(*primals, product=product)
    return y, derivative_p.bind(ad.instantiate_zeros(tangents[X]), *primals[X + 1 :], product=product, transposed=False)


def _given(product: Product) -> list[str]:
    return [name for name in OPERANDS if name not in product.absent]


@derivative_p.def_abstract_eval
def _result_type(linear, *_, product: Product, transposed: bool):
    width, dtype = _result(product, transposed)
    return linear.update(shape=(product.num_rows, width), dtype=dtype, weak_type=False)


def _result(product: Product, transposed: bool):
    return (product.in_features, jnp.dtype(jnp.bfloat16)) if transposed else (product.out_features, product.out_dtype)


def _apply(*operands, product: Product, transposed: bool):
    linear, sizes, offset, *weights = fill(operands, product.absent, None, OPERANDS)
    width, dtype = _result(product, transposed)
    if product.num_rows == 0:
        return [jnp.zeros((0, width), dtype)]
    rows = rows_of_a_tile(product.num_rows, product.num_groups)
    ends = primitive.group_ends(sizes, product.num_rows)
    sizes = jnp.diff(ends, prepend=0)
    local = jnp.arange(product.local_groups) + offset
    get = functools.partial(jnp.take, indices=local, mode="fill", fill_value=0)  # no rows where there is no size
    sizes, starts = get(sizes), get(ends - sizes)
    tiles = -(-sizes // rows)
    tile_ends = jnp.cumsum(tiles, dtype=jnp.int32)

    def add_tile(index, total):
        group = jnp.minimum(jnp.searchsorted(tile_ends, index, side="right"), product.local_groups - 1)
        first = starts[group] + (index - tile_ends[group] + tiles[group]) * rows
        places = first + jnp.arange(rows, dtype=jnp.int32)
        places = jnp.where(places < starts[group] + sizes[group], places, product.num_rows)
        values = linear.at[places].get(mode="fill", fill_value=0).astype(jnp.float32)
        matrix = _matrix(weights, group, product)
        result = jnp.dot(values, matrix if transposed else matrix.T, precision=jax.lax.Precision.HIGHEST)
        return (total[0].at[places].set(result.astype(dtype), mode="drop"),)

    _, *zeros = custom_call.vary_alike(linear, jnp.zeros((product.num_rows, width), dtype))
    return list(jax.lax.fori_loop(0, tile_ends[-1], add_tile, tuple(zeros)))


def _matrix(weights, group: jax.Array, product: Product) -> jax.Array:
    """float32 ``[N, C]``: one group's, dequantised."""

    def select(leaf):
        return slice_of_one(leaf, group)[0]

    payload, block_scale, global_scale, *_ = weights
    if product.layout == CANONICAL:
        matrix = select(payload), select(block_scale)
    else:
        layout = layouts.get(product.layout)
        matrix = layout.unpack_matrix(select(payload), product.out_features, product.in_features)
    return nvfp4.dequantize(*matrix, select(global_scale))


def _transpose(cotangent, linear, *rest, product: Product, transposed: bool):
    del linear
    result = derivative_p.bind(ad.instantiate_zeros(cotangent), *rest, product=product, transposed=not transposed)
    return [result] + [None] * len(rest)


def _second_jvp(primals, tangents, *, product: Product, transposed: bool):
    """The map itself: it does not depend on x, and the weights have no tangents (:func:`_jvp` has looked)."""
    bind = functools.partial(derivative_p.bind, product=product, transposed=transposed)
    return bind(*primals), bind(ad.instantiate_zeros(tangents[X]), *primals[X + 1 :])


def _lower(ctx, *operands, product: Product, transposed: bool):
    custom_call.refuse_partitioning(ctx.module_context.axis_context, product)
    apply = functools.partial(_apply, product=product, transposed=transposed)
    return mlir.lower_fun(apply, multiple_results=True)(ctx, *operands)


derivative_p.def_impl(functools.partial(eager.run_eagerly, derivative_p))
mlir.register_lowering(derivative_p, _lower)
batching.primitive_batchers[derivative_p] = functools.partial(primitive.batch, derivative_p)
ad.primitive_jvps[derivative_p] = _second_jvp
ad.primitive_transposes[derivative_p] = _transpose
ad.primitive_jvps[product_p] = _jvp
