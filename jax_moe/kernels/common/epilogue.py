"""The mathematics after the accumulators, in fp32: activations and NVFP4 rounding, shared by every target."""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from jax_moe.kernels.common import ptx

_LOG2_E = math.log2(math.e)


@cute.jit
def sigmoid(x: Float32) -> Float32:
    return ptx.reciprocal_approximate(Float32(1.0) + ptx.exp2(x * Float32(-_LOG2_E)))


@cute.jit
def tanh(x: Float32) -> Float32:
    """Accurate to a few ulp of the result near zero too, where 1 - 2/(1 + e^2x) cancels."""
    square = x * x
    series = x + x * square * (Float32(-1 / 3) + square * (Float32(2 / 15) + square * Float32(-17 / 315)))
    magnitude = ptx.absolute(x)
    exponential = ptx.exp2(magnitude * Float32(-2 * _LOG2_E))
    quotient = (Float32(1.0) - exponential) * ptx.reciprocal_approximate(Float32(1.0) + exponential)
    result = ptx.copy_sign(quotient, x)
    if magnitude < Float32(0.15):
        result = series
    return result


@cute.jit
def activate(
    gate: Float32, up: Float32, kind: cutlass.Constexpr, alpha: cutlass.Constexpr, beta: cutlass.Constexpr,
    limit: cutlass.Constexpr,
) -> Float32:  # fmt: skip
    """The activations of ``jax_moe.activations`` by their ``kind``; relu2 ignores ``gate``."""
    result = up
    if cutlass.const_expr(kind == 0):  # swiglu
        if cutlass.const_expr(limit != math.inf):
            gate = ptx.minimum(gate, Float32(limit))
            up = ptx.maximum(ptx.minimum(up, Float32(limit)), Float32(-limit))
        if cutlass.const_expr(beta != 0.0):
            up = up + Float32(beta)
        scaled = gate
        if cutlass.const_expr(alpha != 1.0):
            scaled = gate * Float32(alpha)
        result = up * (gate * sigmoid(scaled))
    elif cutlass.const_expr(kind == 1):  # geglu: 0.5 * (1 + tanh(u)) is sigmoid(2u)
        inner = gate * (Float32(1.0) + Float32(0.044715) * gate * gate)
        result = gate * sigmoid(Float32(2 * math.sqrt(2 / math.pi)) * inner) * up
    elif cutlass.const_expr(kind == 2):  # relu squared
        positive = ptx.maximum(up, Float32(0.0))
        result = positive * positive
    else:  # situ
        if cutlass.const_expr(limit != math.inf):
            up = Float32(limit) * tanh(up * Float32(1 / limit))
        result = Float32(beta) * tanh(gate * Float32(1 / beta)) * sigmoid(gate) * up
    return result


@cute.jit
def block_scale(amax: Float32, global_scale: Float32) -> Float32:
    """The e4m3 block scale of 16 values, as fp32 (DESIGN section 3)."""
    return ptx.round_e4m3(ptx.divide(amax, Float32(6.0) * global_scale))  # the conversion saturates at 448


@cute.jit
def block_inverse(scale: Float32, global_scale: Float32) -> Float32:
    return ptx.reciprocal(scale * global_scale)


@cute.jit
def round_nvfp4(value: Float32, inverse: Float32, scale: Float32) -> Float32:
    """``e2m1(value * inverse) * scale``: what a w4a4 product multiplies, exact in bf16; NaN if ``scale`` is."""
    scaled = value * inverse
    magnitude = ptx.absolute(scaled)
    # Adding and subtracting 1.5 * 2**23 * step rounds to a multiple of step, ties to even; the steps of e2m1
    # are 0.5 below 2, 1 below 4 and 2 above, and an even multiple is an even code.
    step = Float32(0.5)
    if magnitude >= Float32(2.0):
        step = Float32(1.0)
    if magnitude >= Float32(4.0):
        step = Float32(2.0)
    magic = step * Float32(1.5 * 2**23)
    rounded = ptx.minimum((magnitude + magic) - magic, Float32(6.0))
    result = ptx.copy_sign(rounded, scaled) * scale
    if scale == Float32(0.0):
        result = Float32(0.0)
    return result
