"""From a GEMM's sums to the values that it stores, by the elements that a thread holds: shared by every target.

On every target weights are the M side of the product, and a thread has the sums of four weight rows for two neighbouring
tokens of each 8 (``bf16_weights.row_in_block`` says which rows): ``accumulators[half][4*j + 2*upper + c]`` belongs to
token ``8*j + 2*quad + c``. A thread is ``32*warp + 4*group + quad``.
"""

import cutlass
from cutlass import Float32, Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device import epilogue, ptx
from jax_moe.kernels.device.bf16_weights import BLOCK_ROWS


class Intermediate:
    """What GEMM1's thread makes of the sums of one weight block.

    Attributes:
      projections: 2 (gate and up) or 1.
      values_per_thread: of one token, neighbours in I.
      value: the first of them, in the ``BLOCK_ROWS // projections`` values of the block.
      next_scale: the global scale that they are rounded with (w4a4).
    """

    def __init__(self, op, spec, expert, row_block, bias_rows, warp, group, unscale: float):
        """``bias_rows``: of one part of the bias; ``unscale``: what undoes the power of two that products carry."""
        self.spec = spec
        if spec.gated:
            self.projections, self.values_per_thread, self.value = 2, 2, 16 * warp + 2 * group
        else:
            self.projections, self.values_per_thread, self.value = 1, 4, 32 * warp + 4 * group
        scales = [op.global_scale[expert * self.projections + p] for p in range(self.projections)]
        if spec.precision == "w4a4":
            scales = [scale * op.input_scale[0] for scale in scales]
        self._scales = [scale * Float32(unscale) if unscale != 1.0 else scale for scale in scales]
        self.next_scale = op.down_input_scale[expert] if spec.precision == "w4a4" else None
        self._biases = [[Float32(0.0)] * self.values_per_thread for _ in range(self.projections)]
        if spec.has_bias:
            first = row_block * (BLOCK_ROWS // self.projections) + self.value
            starts = [(expert * self.projections + p) * bias_rows + first for p in range(self.projections)]
            self._biases = [[op.bias[start + i] for i in range(self.values_per_thread)] for start in starts]

    def activated(self, accumulators, j, c):
        """The activated values of token ``8*j + 2*quad + c``."""
        spec, scales, biases = self.spec, self._scales, self._biases
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


class Contribution:
    """What GEMM2's thread makes of the sums: the weighted contributions of its four neighbouring ``feature``s of H."""

    def __init__(self, op, spec, expert, feature, unscale: float):
        self.spec = spec
        scale = op.global_scale[expert]
        if spec.precision == "w4a4":
            scale = scale * op.input_scale[expert]
        self._scale = scale * Float32(unscale) if unscale != 1.0 else scale
        self._biases = [Float32(0.0)] * 4
        if spec.has_bias:
            self._biases = [op.bias[expert * op.hidden_size + feature + i] for i in range(4)]
        size = 2 if self._is_bf16() else 4
        self._column = Int64(op.out.toint()) + Int64(feature) * size
        self._row_bytes = op.hidden_size * size

    def _is_bf16(self):
        return self.spec.combine == "atomic" and self.spec.out_dtype == "bfloat16"

    def store(self, accumulators, j, c, out_row, weight):
        """Adds (atomic) or stores (ordered) those of token ``8*j + 2*quad + c``; nothing if ``out_row`` is negative."""
        sums = [accumulators[i // 2][4 * j + 2 * (i % 2) + c] for i in range(4)]
        values = [(total * self._scale + bias) * weight for total, bias in zip(sums, self._biases, strict=True)]
        self._store_row(out_row, values)

    @cute.jit
    def _store_row(self, out_row: Int32, values):
        if out_row >= 0:
            address = self._column + Int64(out_row) * Int64(self._row_bytes)
            if cutlass.const_expr(self.spec.combine == "ordered"):
                ptx.store_global_f32x4(address, values)
            elif cutlass.const_expr(self._is_bf16()):
                low, high = ptx.pack_bf16x2(values[0], values[1]), ptx.pack_bf16x2(values[2], values[3])
                ptx.add_global_bf16x4(address, low, high)
            else:
                ptx.add_global_f32x4(address, values)
