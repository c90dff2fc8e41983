"""From a GEMM's sums to the values that it stores, by the elements that a thread holds: shared by every target.

On every target weights are the M side of the product, and a thread has the sums of four weight rows for two
neighbouring tokens of each 8 (``bf16_weights.row_in_block`` says which rows): ``accumulators[half][4*j + 2*upper + c]``
belongs to token ``8*j + 2*quad + c``. A thread is ``32*warp + 4*group + quad``.
"""

import cutlass
from cutlass import Float32, Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device import epilogue, ptx
from jax_moe.kernels.device.bf16_weights import BLOCK_ROWS
from jax_moe.kernels.device.entry import named


def intermediate(op, spec, expert, row_block, warp, group, unscale: float):
    """What GEMM1's thread needs for the sums of one weight block; ``unscale`` undoes the power of two of products.

    Returns, named:
      value: the first of the thread's neighbouring values in I, counted from the weight block's first.
      block, num_blocks: which 64 values of I it is in, and how many of these there are, padding included.
      scales, biases: of gate and up, or only up, for each of the values.
      next_scale: the global scale that they are rounded with (w4a4).
    """
    if spec.gated:
        projections, value = 2, 16 * warp + 2 * group
        block, num_blocks = row_block, op.m_blocks
    else:
        projections, value = 1, 32 * warp + 4 * group
        block, num_blocks = 2 * row_block + warp // 2, 2 * op.m_blocks
    scales = [op.global_scale[expert * projections + p] for p in range(projections)]
    if spec.precision == "w4a4":
        scales = [scale * op.input_scale[0] for scale in scales]
    scales = [_times(scale, unscale) for scale in scales]
    next_scale = op.down_input_scale[expert] if spec.precision == "w4a4" else None
    biases = [[Float32(0.0)] * values_per_thread(spec) for _ in range(projections)]
    if spec.has_bias:
        first = row_block * (BLOCK_ROWS // projections) + value
        starts = [(expert * projections + p) * (num_blocks * 64) + first for p in range(projections)]
        biases = [[op.bias[start + i] for i in range(values_per_thread(spec))] for start in starts]
    return named(value=value, block=block, num_blocks=num_blocks, scales=scales, biases=biases, next_scale=next_scale)


def values_per_thread(spec) -> int:
    """Neighbouring values of the intermediate that a thread has of one token."""
    return 2 if spec.gated else 4


def activated(spec, made, accumulators, j, c, row_scale=None):
    """The activated values of token ``8*j + 2*quad + c``; ``made`` by :func:`intermediate`.

    ``row_scale``: that of the token's values (w4a4_dynamic).
    """
    scales = made.scales if row_scale is None else [scale * row_scale for scale in made.scales]
    biases = made.biases
    if spec.gated:
        gates = [accumulators[i][4 * j + c] * scales[0] + biases[0][i] for i in range(2)]
        ups = [accumulators[i][4 * j + 2 + c] * scales[1] + biases[1][i] for i in range(2)]
    else:
        ups = [accumulators[i // 2][4 * j + 2 * (i % 2) + c] * scales[0] + biases[0][i] for i in range(4)]
        gates = ups
    return [
        epilogue.activate(gate, up, spec.activation, spec.alpha, spec.beta, spec.limit)
        for gate, up in zip(gates, ups, strict=True)
    ]


def contribution(op, spec, expert, feature, row_size, unscale: float):
    """What GEMM2's thread needs for its four neighbouring values of H, of which ``feature`` is the first.

    Also a grouped product's, for values of N. ``row_size``: values in a row of the output.

    Returns, named: ``scale`` and ``biases``; ``column``, the address in row 0 of the output; ``row_bytes``.
    """
    scale = op.global_scale[expert]
    if spec.precision == "w4a4":
        scale = scale * op.input_scale[expert]
    scale = _times(scale, unscale)
    biases = [Float32(0.0)] * 4
    if spec.has_bias:
        biases = [op.bias[expert * row_size + feature + i] for i in range(4)]
    size = 2 if _is_bf16(spec) else 4
    column = Int64(op.out.toint()) + Int64(feature) * size
    return named(scale=scale, biases=biases, column=column, row_bytes=row_size * size)


def store_contribution(spec, made, accumulators, j, c, out_row, weight, row_scale=None):
    """Adds (atomic) or stores (ordered) that of token ``8*j + 2*quad + c``, if ``out_row`` is not negative.

    ``row_scale``: that of what was multiplied (w4a4_dynamic).
    """
    values = [value * weight for value in _scaled(made, accumulators, j, c, row_scale)]
    _store_row(spec, out_row >= 0, out_row, made.column, made.row_bytes, values)


def store_product(spec, made, accumulators, j, c, out_row, end, row_scale=None):
    """Stores a grouped product's row ``8*j + 2*quad + c``, if it comes before ``end``; ``row_scale`` as above."""
    is_there = out_row < end
    values = _scaled(made, accumulators, j, c, row_scale)
    _store_row(spec, is_there, out_row, made.column, made.row_bytes, values)


def store_product_or_zeros(spec, made, sums, c, out_row, end, num_rows):
    """Stores a row of the ``num_rows`` of a product, zeros from ``end`` on, of what a thread has of 8 tokens' sums.

    ``sums``: its ``accumulators``, one half after the other; ``c``: which of its two neighbouring tokens.
    """
    values = _scaled(made, (sums[:4], sums[4:]), 0, c, None)
    values = [cutlass.select_(out_row < end, value, Float32(0.0)) for value in values]
    _store_row(spec, out_row < num_rows, out_row, made.column, made.row_bytes, values)


def _scaled(made, accumulators, j, c, row_scale):
    sums = [accumulators[i // 2][4 * j + 2 * (i % 2) + c] for i in range(4)]
    scale = made.scale if row_scale is None else made.scale * row_scale
    return [total * scale + bias for total, bias in zip(sums, made.biases, strict=True)]


@cute.jit
def _store_row(spec: cutlass.Constexpr, is_there, out_row: Int32, column: Int64, row_bytes: Int32, values):
    if is_there:
        address = column + Int64(out_row) * Int64(row_bytes)
        if cutlass.const_expr(_is_bf16(spec)):
            words = ptx.pack_bf16x2(values[0], values[1]), ptx.pack_bf16x2(values[2], values[3])
            if cutlass.const_expr(spec.adds):
                ptx.add_global_bf16x4(address, *words)
            else:
                ptx.store_global(address, words)
        elif cutlass.const_expr(spec.adds):
            ptx.add_global_f32x4(address, values)
        else:
            ptx.store_global_f32x4(address, values)


def _is_bf16(spec) -> bool:
    return spec.out_dtype == "bfloat16"


def _times(scale: Float32, factor: float) -> Float32:
    return scale if factor == 1.0 else scale * Float32(factor)
