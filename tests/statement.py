"""The definitions of docs/numerics.md in plain NumPy, with a bound on what rounding may change.

What the library computes is compared with this, the readable oracle ``jax_moe.reference`` included: it shares no code
with the library. Elementary arithmetic is float32 where the definition says so (NumPy's is IEEE), else float64.

``moe`` returns the value and, element by element, how far a correct implementation may be from it. Its terms:

* A float32 sum of n products in any order errs by at most (n - 1) u sum|products|, u = 2^-24; with roundings that are
  not all against us by 4 sqrt(n) u sum|products| (Higham and Mary 2019, a bound that holds except with probability
  2 exp(-8) for one element even then), which is the smaller one for n > 16.
* The intermediate is rounded, to bfloat16 or NVFP4, after such a sum. Where the error before it can reach a rounding
  boundary, a correct implementation may round the other way: each such element is found and its step carried through
  the down projection. All others must round the same way, so an error there is not excused.
* Scales, biases, weights and the sum over slots: one rounding u each.
"""

import dataclasses
import itertools
import math

import ml_dtypes
import numpy as np

U32 = 2.0**-24  # unit roundoff of float32
U16 = 2.0**-8  # of bfloat16
TINY = 2.0**-120  # more than any sum here can lose to flushed subnormals
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def bfloat16(values):
    """float32 values rounded to bfloat16."""
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def block_scales(amax, s):
    """``e4m3(min(amax / (6 s), 448))`` in float32."""
    with np.errstate(all="ignore"):
        ratio = np.asarray(amax, np.float32) / (np.float32(6) * np.asarray(s, np.float32))
        return np.minimum(ratio, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)


def row_scales(rows):
    """float32 ``[..., n]`` to the scale ``[...]`` of each row: ``max(amax / (6 * 448), 2^-64)``; NaN stays."""
    with np.errstate(all="ignore"):
        return np.maximum(np.abs(rows).max(-1) / np.float32(6 * 448), np.float32(2.0**-64))


def quantize(values, s):
    """docs/numerics.md for ``[..., n]`` under one scale, or ``[...]``, one of each row: codes ``[..., n]`` uint8, and
    e4m3 scales ``[..., n/16]``.
    """
    blocks = np.asarray(values, np.float32).reshape(*values.shape[:-1], values.shape[-1] // 16, 16)
    s = np.asarray(s, np.float32)[..., None]
    scales = block_scales(np.abs(blocks).max(-1), s)
    return codes_under(blocks, scales, s).reshape(values.shape), scales


def codes_under(blocks, scales, s):
    """The codes of ``[..., n/16, 16]`` under given e4m3 block scales, and ``s`` that broadcasts to them."""
    decoded = np.asarray(scales, np.float32)[..., None]
    with np.errstate(all="ignore"):
        products = blocks * (np.float32(1) / (decoded * np.asarray(s, np.float32)[..., None]))
    # The sign of a NaN product is the hardware's choice; a code needs one, and takes a positive NaN.
    products = np.where(np.isnan(blocks), blocks, np.where(np.isnan(products), np.float32(np.nan), products))
    codes = products.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return np.where(decoded == 0, np.uint8(0), codes)


def dequantize(codes, scales):
    """float32 values without the global scale."""
    values = np.asarray(codes).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return values * np.repeat(np.asarray(scales, np.float32), 16, axis=-1)


def unpack(payload):
    """``[..., n/2]`` bytes to ``[..., n]`` codes, low nibble first."""
    payload = np.asarray(payload)
    codes = np.empty((*payload.shape[:-1], 2 * payload.shape[-1]), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = payload & 15, payload >> 4
    return codes


def sigmoid(z):
    """In float64, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(z, np.float64)))


def activate(activation, *inputs):
    """An activation of the library in float64, by its published formula."""
    a = activation
    match a.kind:
        case "swiglu":
            gate, up = inputs
            if a.limit is not None:
                gate, up = np.minimum(gate, a.limit), np.clip(up, -a.limit, a.limit)
            return (up + a.beta) * gate * sigmoid(a.alpha * gate)
        case "geglu":
            gate, up = inputs
            return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
        case "relu2":
            return np.maximum(inputs[0], 0) ** 2
        case "situ":
            gate, up = inputs
            if a.linear_beta is not None:
                up = a.linear_beta * np.tanh(up / a.linear_beta)
            return a.beta * np.tanh(gate / a.beta) * sigmoid(gate) * up
    raise AssertionError(a)


def _sum_error(n):
    return min(n, 4 * np.sqrt(n)) * U32


def _project(x, matrix, scale, bias):
    """float64 ``scale * (x @ matrix.T) + bias`` and the float32 error of it."""
    value = scale * (x @ matrix.T) + bias
    size = np.abs(scale) * (np.abs(x) @ np.abs(matrix).T)
    return value, (_sum_error(x.shape[1]) + 3 * U32) * size + 2 * U32 * (size + np.abs(bias)) + TINY


def _activate(activation, values, errors):
    """float64 intermediate and the error of it, given its inputs with their errors."""
    value = activate(activation, *values)
    # The functions are smooth or clamp, so the corners of the box of inputs are the extremes. An input is scaled by
    # some constant, and cubed, on the way into an exponential: a relative error of 8 u each.
    boxes = [(v - e - 8 * U32 * np.abs(v), v + e + 8 * U32 * np.abs(v)) for v, e in zip(values, errors, strict=True)]
    spread = np.max([np.abs(activate(activation, *corner) - value) for corner in itertools.product(*boxes)], axis=0)
    # exp and tanh are good to a few u of their result; 1 + tanh(t) cancels for negative t, hence not of `value`.
    size = np.abs(values[0]) * np.abs(values[-1]) + np.abs(values[0] * getattr(activation, "beta", 0.0))
    return value, spread + 8 * U32 * size + TINY


def _round(precision, h, error, scale):
    """The intermediate as GEMM2 reads it, and the error of it where rounding may go the other way.

    With a scale for each row both are with that scale.
    """
    low, high = h - error, h + error
    if precision == "w4a16":
        rounded = bfloat16(h).astype(np.float64)
        return rounded, np.maximum(bfloat16(high) - rounded, rounded - bfloat16(low))
    if precision == "w4a4_dynamic":
        return _round_rows(*(bfloat16(values) for values in (h, low, high)))
    codes, scales = quantize(h.astype(np.float32), scale)
    rounded = dequantize(codes, scales).astype(np.float64)
    blocks = [a.reshape(len(h), h.shape[1] // 16, 16) for a in (low, high)]
    reach = np.maximum(np.abs(blocks[0]), np.abs(blocks[1])).max(-1)
    least = np.where((blocks[0] <= 0) & (blocks[1] >= 0), 0, np.minimum(*np.abs(blocks))).max(-1)
    # One block scale, or two when the error reaches an e4m3 boundary. The product with the reciprocal is 3 roundings.
    worst = np.zeros_like(h)
    for candidate in (block_scales(least * (1 - 4 * U32), scale), block_scales(reach * (1 + 4 * U32), scale)):
        for values in blocks:
            for slack in (1 - 4 * U32, 1 + 4 * U32):
                codes = codes_under((values * slack).astype(np.float32), candidate, scale)
                other = dequantize(codes.reshape(h.shape), candidate).astype(np.float64)
                worst = np.maximum(worst, np.abs(other - rounded))
    return rounded, worst


def _round_rows(h, low, high):
    """``_round`` of rows that are bfloat16's already, each value between ``low`` and ``high``.

    Where the largest value of a row is not certain, neither is the row's scale, which all of its values then hang on.
    """

    def with_scale(codes, scales, s):
        return dequantize(codes, scales).astype(np.float64) * s.astype(np.float64)[:, None]

    s = row_scales(h)
    rounded, worst = with_scale(*quantize(h, s), s), np.zeros(h.shape)
    least = np.where((low <= 0) & (high >= 0), 0, np.minimum(np.abs(low), np.abs(high)))
    reach = np.maximum(np.abs(low), np.abs(high))
    for s, amax, values in itertools.product(map(row_scales, (least, reach)), (least, reach), (low, high)):
        blocks = (len(h), h.shape[1] // 16, 16)
        scales = block_scales(amax.reshape(blocks).max(-1), s[:, None])
        codes = codes_under(values.reshape(blocks), scales, s[:, None])
        worst = np.maximum(worst, np.abs(with_scale(codes.reshape(h.shape), scales, s) - rounded))
    return rounded, worst


def moe(x, experts, routing, **options):
    """What ``fused_moe`` computes, unrounded: float64 ``[T, H]``, and how far a right answer may be from it."""
    return moe_and_size(x, experts, routing, **options)[:2]


def moe_and_size(x, experts, routing, *, activation, precision, weight_on="output", expert_offset=0):
    """As ``moe``, and the sum of the contributions' magnitudes."""
    x = np.asarray(x, np.float32)
    ids, weights = np.asarray(routing.expert_ids, np.int64), np.asarray(routing.weights, np.float32)
    gate_up, down = experts.gate_up, experts.down
    matrices = dequantize(unpack(_bytes(gate_up.payload)), gate_up.block_scale)
    down_matrices = dequantize(unpack(_bytes(down.payload)), down.block_scale)
    value, bound, size = (np.zeros(x.shape, np.float64) for _ in range(3))
    with np.errstate(all="ignore"):
        for expert in range(down_matrices.shape[0]):
            token, slot = np.nonzero(ids == expert + expert_offset)
            rows, weight = x[token], weights[token, slot][:, None]
            if weight_on == "input":
                rows, weight = bfloat16(rows * weight), np.ones_like(weight)
            x_scale, h_scale = np.float32(1), np.float32(1)
            if precision == "w4a4":
                x_scale = np.float32(gate_up.input_scale)
                h_scale = np.asarray(down.input_scale, np.float32)[expert]
                rows = dequantize(*quantize(rows, x_scale))
            elif precision == "w4a4_dynamic":
                x_scale = row_scales(rows)[:, None]
                rows = dequantize(*quantize(rows, x_scale[:, 0]))
            parts = [
                _project(
                    rows.astype(np.float64),
                    matrices[expert, part].astype(np.float64),
                    np.asarray(x_scale, np.float64) * np.float64(gate_up.global_scale[expert, part]),
                    0.0 if gate_up.bias is None else np.asarray(gate_up.bias, np.float64)[expert, part],
                )
                for part in range(matrices.shape[1])
            ]
            h, h_error = _activate(activation, *zip(*parts, strict=True))
            h, h_error = _round(precision, h, h_error, h_scale)
            scale = np.float64(h_scale) * np.float64(down.global_scale[expert])
            bias = 0.0 if down.bias is None else np.asarray(down.bias, np.float64)[expert]
            y, y_error = _project(h, down_matrices[expert].astype(np.float64), scale, bias)
            y_error += np.abs(scale) * (h_error @ np.abs(down_matrices[expert]).T.astype(np.float64))
            np.add.at(value, token, weight * y)
            np.add.at(bound, token, np.abs(weight) * y_error)
            np.add.at(size, token, np.abs(weight * y))
    return value, bound + 2 * (1 + ids.shape[1]) * U32 * size, size


def moe_parts(x, experts, routing, *, expert_parts, tensor_parts, **options):
    """``moe_and_size`` of what each device of a mesh computes: three times ``[expert part, tensor part, T, H]``.

    Consecutive experts, and consecutive slices of I, of which the first alone adds the down bias.
    """
    gate_up, down = experts.gate_up, experts.down
    held, width = (down.global_scale.shape[0] // expert_parts, down.block_scale.shape[-1] * 16 // tensor_parts)
    made = []
    for e, t in itertools.product(range(expert_parts), range(tensor_parts)):
        mine, rows = slice(e * held, (e + 1) * held), slice(t * width, (t + 1) * width)
        blocks = slice(rows.start // 16, rows.stop // 16)
        local = dataclasses.replace(
            experts,
            gate_up=dataclasses.replace(
                gate_up,
                payload=_bytes(gate_up.payload)[mine, :, rows],
                block_scale=np.asarray(gate_up.block_scale)[mine, :, rows],
                global_scale=np.asarray(gate_up.global_scale)[mine],
                bias=None if gate_up.bias is None else np.asarray(gate_up.bias)[mine, :, rows],
            ),
            down=dataclasses.replace(
                down,
                payload=_bytes(down.payload)[mine, :, rows.start // 2 : rows.stop // 2],
                block_scale=np.asarray(down.block_scale)[mine, :, blocks],
                global_scale=np.asarray(down.global_scale)[mine],
                input_scale=None if down.input_scale is None else np.asarray(down.input_scale)[mine],
                bias=None if down.bias is None or t else np.asarray(down.bias)[mine],
            ),
        )
        made.append(moe_and_size(x, local, routing, expert_offset=e * held, **options))
    return tuple(np.stack(a).reshape(expert_parts, tensor_parts, *x.shape) for a in zip(*made, strict=True))


def sum_in_bfloat16(values, bounds, sizes, *, scattered, roundings):
    """The sum of ``moe_parts`` that travel in bfloat16, and how far a right answer may be from it before ``out_dtype``.

    u = 2^-8 is the unit roundoff of bfloat16, and what is rounded is at most a sum of magnitudes:

    * A part is rounded once, or, where a GPU adds K contributions to it one after another, K times as a contribution
      and as a sum: ``roundings`` u of the sum of the contributions' magnitudes.
    * Over ``scattered``, axes of the parts, parts are added in float32, and rounded if they are summed on.
    * m parts that are summed over the other axes take m - 1 additions, each of which is rounded.

    Args:
      scattered: of "expert" and "tensor", those over which tokens are spread.
      roundings: of a part: 1, or K.
    """
    axes = tuple(axis for axis, name in enumerate(("expert", "tensor")) if name in scattered)
    errors = bounds + roundings * U16 * (sizes + bounds if roundings > 1 else np.abs(values) + bounds)
    magnitudes = np.abs(values) + errors
    count = math.prod(values.shape[axis] for axis in axes)
    values, errors, magnitudes = (np.sum(a, axes, keepdims=True) for a in (values, errors, magnitudes))
    summed = values.shape[0] * values.shape[1]
    errors = errors + count * U32 * magnitudes
    if axes and summed > 1:
        errors = errors + U16 * magnitudes
    value, error, magnitude = (np.sum(a, (0, 1)) for a in (values, errors, magnitudes))
    error = error + (summed - 1) * U16 * magnitude
    return value, error * (1 + U16) ** (roundings + summed)  # what was rounded had been rounded before


def _bytes(payload):
    payload = np.asarray(payload)
    if payload.dtype == np.uint8:
        return payload
    codes = payload.view(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4
