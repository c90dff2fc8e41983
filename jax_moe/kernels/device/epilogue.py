"""The mathematics after the accumulators, in fp32: activations and NVFP4 rounding, shared by every target."""

import math

import cutlass
from cutlass import Float32, Uint32
import cutlass.cute as cute

from jax_moe.kernels.device import ptx

_LOG2_E = math.log2(math.e)


@cute.jit
def sigmoid(x: Float32) -> Float32:
    """``1 / (1 + exp(-x))`` to a few ulp."""
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
    if cutlass.const_expr(kind == "swiglu"):
        if cutlass.const_expr(limit != math.inf):
            gate = ptx.minimum(gate, Float32(limit))
            up = ptx.maximum(ptx.minimum(up, Float32(limit)), Float32(-limit))
        if cutlass.const_expr(beta != 0.0):
            up = up + Float32(beta)
        scaled = gate
        if cutlass.const_expr(alpha != 1.0):
            scaled = gate * Float32(alpha)
        result = up * (gate * sigmoid(scaled))
    elif cutlass.const_expr(kind == "geglu"):  # 0.5 * (1 + tanh(u)) is sigmoid(2u)
        inner = gate * (Float32(1.0) + Float32(0.044715) * gate * gate)
        result = gate * sigmoid(Float32(2 * math.sqrt(2 / math.pi)) * inner) * up
    elif cutlass.const_expr(kind == "relu2"):
        positive = ptx.maximum(up, Float32(0.0))
        result = positive * positive
    else:  # situ
        if cutlass.const_expr(limit != math.inf):
            up = Float32(limit) * tanh(up * Float32(1 / limit))
        result = Float32(beta) * tanh(gate * Float32(1 / beta)) * sigmoid(gate) * up
    return result


@cute.jit
def _block_scale(amax: Float32, global_scale: Float32):
    """``(scale, inverse)`` of 16 values: their e4m3 block scale as fp32, and what to multiply them with."""
    scale = ptx.round_e4m3(ptx.divide(amax, Float32(6.0) * global_scale))  # the conversion saturates at 448
    inverse = ptx.reciprocal(scale * global_scale)
    if scale == Float32(0.0):
        inverse = Float32(0.0)
    return scale, inverse


def _round(value: Float32, scale: Float32, inverse: Float32) -> Float32:
    """``e2m1(value * inverse) * scale``: what a w4a4 product multiplies, exact in bf16; NaN if ``scale`` is."""
    return _e2m1(value, inverse) * scale


def _e2m1(value: Float32, inverse: Float32) -> Float32:
    """``e2m1(value * inverse)``."""
    scaled = value * inverse
    magnitude = ptx.minimum(ptx.absolute(scaled), Float32(6.0))
    # Adding and subtracting 1.5 * 2**23 * step rounds to a multiple of step, ties to even. The steps of e2m1 are 0.5
    # below 2, 1 below 4 and 2 above (an even multiple is an even code): half the power of two below the magnitude, at
    # least 0.5.
    magic = ptx.power_of_two_below(ptx.maximum(magnitude, Float32(1.0))) * Float32(0.75 * 2**23)
    return ptx.copy_sign((magnitude + magic) - magic, scaled)


def amax(values) -> Float32:
    """The largest magnitude; NaN where there is one."""
    largest = ptx.absolute(values[0])
    for value in values[1:]:
        largest = ptx.maximum(largest, ptx.absolute(value))
    return largest


@cute.jit
def row_scale(amax: Float32) -> Float32:
    """The global scale of a row with this largest magnitude (w4a4_dynamic); NaN and infinity stay."""
    scale = ptx.divide(amax, Float32(6 * 448))
    if scale < Float32(2.0**-64):
        scale = Float32(2.0**-64)
    return scale


def round_block(values, global_scale: Float32):
    """The values of one thread's block of 16, rounded: ``code * block_scale``."""
    scale, inverse = _block_scale(amax(values), global_scale)
    return [_round(value, scale, inverse) for value in values]


def _pack(values, inverse: Float32) -> Uint32:
    """e2m1 codes of at most 8 values, the first in the low bits."""
    scaled = [value * inverse for value in values]
    word = ptx.pack_e2m1x2(scaled[0], scaled[1])
    for i in range(2, len(scaled), 2):
        word = word | (ptx.pack_e2m1x2(scaled[i], scaled[i + 1]) << Uint32(4 * i))
    return word


def _pack_anywhere(values, inverse: Float32) -> Uint32:
    """As :func:`_pack`, by instructions that every target has."""
    word = Uint32(0)
    for i, value in enumerate(values):
        # Divided by 2**126, a value of e2m1 has its code's exponent and mantissa in the same places, subnormal or not.
        bits = ptx.bits(_e2m1(value, inverse) * Float32(2.0**-126))
        code = (bits >> Uint32(28)) & Uint32(8) | (bits >> Uint32(22)) & Uint32(7)
        word = word | (code << Uint32(4 * i))
    return word


def values_of_codes(word: Uint32, scale: Float32):
    """The eight products of a word's codes with their block scale."""
    # As in _pack_anywhere, in two steps because no scale of one step would be finite.
    scale = scale * Float32(2.0**6)
    values = []
    for i in range(8):
        code = word >> Uint32(4 * i)
        bits = (code & Uint32(8)) << Uint32(28) | (code & Uint32(7)) << Uint32(22)
        values.append(ptx.from_bits(bits) * Float32(2.0**120) * scale)
    return values


def _shared_scales(values, global_scale: Float32, lane, lanes: int, stride: int):
    """Block scales of blocks of 16 that lie across ``lanes`` lanes, ``stride`` apart, each computed in one lane.

    Args:
      values: at most ``lanes`` lists of this lane's values of one block each.
      lane: this lane's place among the ``lanes``.

    Returns:
      Scale and inverse of the block that this lane looks after, and for every block a lane that does. With 2**b blocks
      (or, of fewer, room for so many) that is block ``lane * 2**b // lanes``.
    """
    amaxes = [amax(row) for row in values]
    blocks = 1 << (len(values) - 1).bit_length()
    amaxes += [Float32(0.0)] * (blocks - len(values))
    # Each exchange halves the blocks that a lane looks after: it hands over the other half and takes in its own.
    distance = lanes // 2
    while distance:
        upper = (lane // distance) % 2 == 1
        if len(amaxes) > 1:
            half = len(amaxes) // 2
            mine = [_select(upper, b, a) for a, b in zip(amaxes[:half], amaxes[half:], strict=True)]
            other = [_select(upper, a, b) for a, b in zip(amaxes[:half], amaxes[half:], strict=True)]
        else:
            mine, other = amaxes, amaxes
        received = [cute.arch.shuffle_sync_bfly(value, distance * stride) for value in other]
        amaxes = [ptx.maximum(a, b) for a, b in zip(mine, received, strict=True)]
        distance //= 2
    scale, inverse = _block_scale(amaxes[0], global_scale)
    first_lane = cute.arch.lane_idx() - lane * stride
    return scale, inverse, [first_lane + i * (lanes // blocks) * stride for i in range(len(values))]


def round_blocks(values, global_scale: Float32, lane, lanes: int, stride: int):
    """The same lists as ``values`` (:func:`_shared_scales`), each value rounded: ``code * block_scale``."""
    scale, inverse, sources = _shared_scales(values, global_scale, lane, lanes, stride)
    rounded = []
    for row, source in zip(values, sources, strict=True):
        row_scale = cute.arch.shuffle_sync(scale, source)
        row_inverse = cute.arch.shuffle_sync(inverse, source)
        rounded.append([_round(value, row_scale, row_inverse) for value in row])
    return rounded


def quantise_blocks(values, global_scale: Float32, lane, lanes: int, stride: int):
    """Codes of each list of ``values`` (:func:`_shared_scales`) as the low bits of a word, four bits for each value.

    Returns:
      The words, and the e4m3 scale of the block that this lane looks after, as the low byte of a word.
    """
    scale, inverse, sources = _shared_scales(values, global_scale, lane, lanes, stride)
    words = []
    for row, source in zip(values, sources, strict=True):
        words.append(_pack(row, cute.arch.shuffle_sync(inverse, source)))
    return words, ptx.e4m3(scale)


@cute.jit
def quantise_block(values, global_scale: Float32, anywhere: cutlass.Constexpr = False):
    """The 16 codes of one thread's block as two words, and its e4m3 scale as the low byte of a word.

    ``anywhere``: by instructions that every target has, not only those with NVFP4 tensor cores.
    """
    pack = _pack_anywhere if anywhere else _pack
    scale, inverse = _block_scale(amax(values), global_scale)
    low, high = pack(values[:8], inverse), pack(values[8:], inverse)
    if scale == Float32(0.0):  # the products with zeros of either sign are right too, but a zero code is 0
        low, high = Uint32(0), Uint32(0)
    return low, high, ptx.e4m3(scale)


@cute.jit
def _select(condition, yes: Float32, no: Float32) -> Float32:
    result = no
    if condition:
        result = yes
    return result
