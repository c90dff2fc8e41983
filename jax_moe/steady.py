"""Elementary functions and sums of float32 whose bits depend on their values alone.

XLA promises no bits. How it adds depends on all shapes; it fuses a product and a sum, rounded once, where they meet in
one kernel; on a CPU it hands large enough programs to a library whose ``exp`` is another. So what a token's softmax is
depends on how many tokens there are, and on what is compiled with it. Integers leave no such choice, nor do operations
that are exact: what rounds here is an integer's shift, a conversion, or a division in twice the width. The bits are
the same for any shape, eager and under ``jax.jit``, in every XLA and on every backend.

Errors are about one unit in the last place. NaN gives NaN.
"""

import jax
import jax.numpy as jnp

_BITS = 30  # behind the point, of fixed-point numbers
_ONE = 1 << _BITS
_LARGEST = 2.0**28  # a logit beyond it counts as this

# log2(e) in two parts, with 25 and 50 bits behind the point.
_LOG2_E = 48_408_812, 21_684_416
# Coefficients, lowest first, by interpolation at the Chebyshev nodes of [0, 1]; the errors with them are below 2**-27.
_EXP2_OF_MINUS = (
    1_073_741_824, -744_261_114, 257_941_162, -59_596_389, 10_324_635, -1_425_708, 158_122, -11_619,
)  # fmt: skip
_LOG1P_OVER_X = (
    1_073_741_824, -536_870_870, 357_911_925, -268_396_685, 214_356_945, -176_574_886, 143_918_524, -108_252_551,
    68_185_712, -31_997_659, 9_583_793, -1_344_953,
)  # fmt: skip


def _fixed(values: jax.Array) -> jax.Array:
    """int64 multiples of ``2**-30``; a product with a power of two is exact."""
    return jax.lax.convert_element_type(jnp.clip(values, -_LARGEST, _LARGEST) * float(_ONE), jnp.int64)


def _rounded(value: jax.Array) -> jax.Array:
    """float64 as float32, 0 where that is subnormal.

    The conversion is not enough. XLA's GPU backend drops one that another converts back (that is its
    ``xla_allow_excess_precision``), and LLVM narrows what stands between two. Neither touches ``reduce_precision``.
    """
    return jax.lax.convert_element_type(jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=23), jnp.float32)


def _polynomial(coefficients: tuple[int, ...], x: jax.Array) -> jax.Array:
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = (total * x >> _BITS) + coefficient
    return total


def _exp_of_minus(x: jax.Array) -> jax.Array:
    """float32 ``exp(-x)`` of fixed-point x >= 0; 0 where it would be subnormal."""
    x = jnp.minimum(x, 100 << _BITS)  # so that no product has more than 63 bits
    power = (x * _LOG2_E[0] >> 25) + (x * _LOG2_E[1] >> 50)
    whole, part = power >> _BITS, power & (_ONE - 1)
    mantissa = jax.lax.convert_element_type(_polynomial(_EXP2_OF_MINUS, part), jnp.float32)  # 2**29 to 2**30
    bits = jax.lax.bitcast_convert_type(mantissa, jnp.int32)
    exponent = jax.lax.convert_element_type(jnp.minimum(whole, 125) + _BITS, jnp.int32)
    result = jax.lax.bitcast_convert_type(bits - (exponent << 23), jnp.float32)
    return jnp.where(whole > 125, jnp.float32(0), result)


@jax.custom_jvp
@jax.jit
def exp_of_difference(a: jax.Array, b: jax.Array) -> jax.Array:
    """``exp(a - b)`` for ``a <= b``, which broadcast; the difference is not rounded."""
    with jax.enable_x64(True):
        result = _exp_of_minus(_fixed(b) - _fixed(a))
        return jnp.where(jnp.isnan(a) | jnp.isnan(b), jnp.float32(jnp.nan), result)


@exp_of_difference.defjvp
def _exp_of_difference_jvp(primals, tangents):
    result = exp_of_difference(*primals)
    return result, result * (tangents[0] - tangents[1])


@jax.custom_jvp
@jax.jit
def sum_of_parts(values: jax.Array) -> jax.Array:
    """The sum ``[..., 1]`` of values from 0 to 1, at most 8192 of them and one of them 1.

    Multiples of ``2**-40`` add up exactly in float64, in any order. What the least of the values lose to become
    multiples, float32 does not see in the sum.
    """
    with jax.enable_x64(True):
        multiples = jnp.floor(jax.lax.convert_element_type(values, jnp.float64) * 2.0**40)
        return _rounded(jnp.sum(multiples, axis=-1, keepdims=True) * 2.0**-40)


@sum_of_parts.defjvp
def _sum_of_parts_jvp(primals, tangents):
    return sum_of_parts(*primals), jnp.sum(tangents[0], axis=-1, keepdims=True)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a / b`` of float32 as IEEE rounds it, which XLA does on no backend if it can help it.

    Its GPU backend has a division that may be a unit or two in the last place off (``div.full.f32``); x in bfloat16
    is on a tie of e2m1 so often that codes would change. Both divide by a broadcast scalar by multiplying with its
    reciprocal. In float64 neither matters: 53 bits are more than twice 24, so a quotient is never so near to where
    float32 rounds the other way. A quotient that would be subnormal is 0.
    """
    with jax.enable_x64(True):
        wide = [jax.lax.convert_element_type(value, jnp.float64) for value in (a, jnp.broadcast_to(b, a.shape))]
        return _rounded(jax.lax.div(*wide))


@jax.custom_jvp
@jax.jit
def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a / b``, where b broadcasts to a; a quotient that would be subnormal is 0."""
    return divide(a, b)


@quotient.defjvp
def _quotient_jvp(primals, tangents):
    result = quotient(*primals)
    return result, (tangents[0] - result * tangents[1]) / primals[1]


def softmax(logits: jax.Array) -> jax.Array:
    """Along the last axis."""
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    exponentials = exp_of_difference(logits, largest)
    return quotient(exponentials, sum_of_parts(exponentials))


@jax.custom_jvp
@jax.jit
def sigmoid(x: jax.Array) -> jax.Array:
    """``1 / (1 + exp(-x))``."""
    small = exp_of_difference(-jnp.abs(x), jnp.zeros_like(x))
    return quotient(jnp.where(x < 0, small, jnp.ones_like(x)), 1 + small)


@sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    result = sigmoid(*primals)
    return result, result * (1 - result) * tangents[0]


@jax.custom_jvp
@jax.jit
def softplus(x: jax.Array) -> jax.Array:
    """``log(1 + exp(x))``."""
    small = exp_of_difference(-jnp.abs(x), jnp.zeros_like(x))
    with jax.enable_x64(True):
        slope = _polynomial(_LOG1P_OVER_X, _fixed(small))  # log(1 + small) / small
        negative = small * (jax.lax.convert_element_type(slope, jnp.float32) * (1 / _ONE))
        positive = _fixed(jnp.maximum(x, 0)) + (_fixed(small) * slope >> _BITS)
        positive = jax.lax.convert_element_type(positive, jnp.float32) * jnp.float32(1 / _ONE)
        return jnp.where(x < 0, negative, jnp.where(jnp.isnan(x), x, positive))


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    return softplus(*primals), sigmoid(*primals) * tangents[0]


@jax.custom_jvp
@jax.jit
def square_root(x: jax.Array) -> jax.Array:
    """Of x >= 0, as IEEE rounds it; its derivative is 0 at 0."""
    with jax.enable_x64(True):
        return _rounded(jnp.sqrt(jax.lax.convert_element_type(x, jnp.float64)))


@square_root.defjvp
def _square_root_jvp(primals, tangents):
    root = square_root(*primals)
    positive = root > 0
    return root, jnp.where(positive, tangents[0] / jnp.where(positive, 2 * root, 1), 0)
