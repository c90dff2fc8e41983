// Compiled once per instruction set, with JAX_MOE_KERNELS naming the variant (CMakeLists.txt).
//
// Both GEMMs and both precisions are one loop, Multiply: sixteen rows of NVFP4 weights times a block of fp32 rows. The
// lanes of a vector run along the contraction axis, where a block of weights is contiguous and exactly sixteen values,
// so that expanding it needs no transposition; the price is a horizontal sum at the end of each panel.

#include "cpu/kernels.h"

#include <cstdint>
#include <cstring>

#include "cpu/activation.h"
#include "cpu/simd.h"
#include "nvfp4.h"

namespace jax_moe {
namespace {

// A panel of kPanelRows x kPanelDepth weights is expanded once and stays in the L1 cache while a block of rows passes
// over it, kTileTokens at a time: the accumulators of a tile are what the registers hold.
constexpr int kColumns = kBlockSize;  // of a GEMM's result, made together: a whole block, so that it can be quantised
#if defined(__AVX512F__)
constexpr int kPanelRows = 8;
constexpr int kTileTokens = 3;
#else
constexpr int kPanelRows = 4;
constexpr int kTileTokens = 3;
#endif
constexpr int kPanelDepth = 1024;
// Input rows per pass: enough to pay for the expansion, few enough that they and the sums stay in the L2 cache.
constexpr int kBlockTokens = 96;

struct E4M3Table {
  float value[256];
  constexpr E4M3Table() : value() {
    for (int code = 0; code < 256; ++code) value[code] = E4M3ToFloat(static_cast<uint8_t>(code));
  }
};
constexpr E4M3Table kE4M3;

// Sixteen rows of one weight matrix, N x C.
struct WeightRows {
  const uint8_t* payload;
  const uint8_t* block_scale;
  int64_t depth;  // C

  WeightRows(const Projection& projection, int64_t row, int64_t depth)
      : payload(projection.payload + row * (depth / 2)),
        block_scale(projection.block_scale + row * (depth / kBlockSize)),
        depth(depth) {}
};

inline void ExpandPanel(const WeightRows& weights, int first_row, int64_t begin, int64_t depth, float* panel) {
  for (int row = 0; row < kPanelRows; ++row) {
    const int64_t first_block = ((first_row + row) * weights.depth + begin) / kBlockSize;
    const uint8_t* payload = weights.payload + first_block * (kBlockSize / 2);
    const uint8_t* scales = weights.block_scale + first_block;
#pragma GCC unroll 4
    for (int64_t block = 0; block < depth / kBlockSize; ++block) {
      Store(panel + block * kBlockSize,
            DequantizeBlock(payload + block * (kBlockSize / 2), kE4M3.value[scales[block]]));
    }
    panel += kPanelDepth;
  }
}

// sums[t][first_row + r] += panel row r . inputs[t], for the tokens of one tile. Where vectors are narrower than
// sixteen lanes, one part of the lanes after the other, so that a tile has as many products for what it loads.
template <int kTokens>
inline void MultiplyTile(const float* panel, int64_t depth, const float* const* inputs, int64_t begin, int first_row,
                         float (*sums)[kColumns]) {
  Lanes totals[kTokens][kPanelRows];
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    const int offset = part * kNativeLanes;
    Native accumulators[kTokens][kPanelRows] = {};
    for (int64_t k = 0; k < depth; k += kLanes) {
      Native values[kTokens];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) values[t] = LoadNative(inputs[t] + begin + k + offset);
#pragma GCC unroll 8
      for (int r = 0; r < kPanelRows; ++r) {
        Native weight = LoadNative(panel + r * kPanelDepth + k + offset);
        KeepInRegister(&weight);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) accumulators[t][r] = MultiplyAdd(weight, values[t], accumulators[t][r]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
      for (int r = 0; r < kPanelRows; ++r) totals[t][r].part[part] = accumulators[t][r];
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) AddSumOfLanes(totals[t], sums[t] + first_row);
}

// sums[t][n] = weight row n . inputs[t], for 16 weight rows and at most kBlockTokens inputs.
void Multiply(const WeightRows& weights, const float* const* inputs, int count, float (*sums)[kColumns]) {
  alignas(64) float panel[kPanelRows * kPanelDepth];
  memset(sums, 0, count * sizeof(*sums));
  for (int row = 0; row < kColumns; row += kPanelRows) {
    for (int64_t begin = 0; begin < weights.depth; begin += kPanelDepth) {
      const int64_t left = weights.depth - begin;
      const int64_t depth = left < kPanelDepth ? left : kPanelDepth;
      ExpandPanel(weights, row, begin, depth, panel);
      int t = 0;
      for (; t + kTileTokens <= count; t += kTileTokens) {
        MultiplyTile<kTileTokens>(panel, depth, inputs + t, begin, row, sums + t);
      }
      if (t + 2 == count) {
        MultiplyTile<2>(panel, depth, inputs + t, begin, row, sums + t);
      } else if (t + 1 == count) {
        MultiplyTile<1>(panel, depth, inputs + t, begin, row, sums + t);
      }
    }
  }
}

// A block of an intermediate or an activation as the GEMM will multiply it, global scale left out: w4a4 quantises and
// expands again, all else rounds to bf16.
inline void RoundBlock(Precision precision, float global_scale, float* values) {
  if (precision == Precision::kW4A4) {
    uint8_t codes[kBlockSize];
    const float block_scale = kE4M3.value[QuantizeBlock(values, global_scale, codes)];
    for (int i = 0; i < kBlockSize; ++i) values[i] = E2M1ToFloat(codes[i]) * block_scale;
  } else {
#pragma GCC unroll 1  // unrolled early, it would not be vectorised
    for (int i = 0; i < kBlockSize; ++i) values[i] = RoundToBF16(values[i]);
  }
}

// Quantises a row in place, with a scale of its own (docs/numerics.md), which it returns.
inline float QuantizeRow(float* row, int64_t size) {
  const float scale = RowScale(LargestMagnitude(row, size));
  for (int64_t i = 0; i < size; i += kBlockSize) RoundBlock(Precision::kW4A4, scale, row + i);
  return scale;
}

void XRow(const Call& call, int64_t row) {
  const Problem& p = call.problem;
  const bool weighted = p.weight_on == WeightOn::kInput;
  const int64_t route = weighted ? call.route_order[row] : 0;
  const uint16_t* from = p.x + (weighted ? route / p.top_k : row) * p.hidden_size;
  float* to = call.x_rows + row * p.hidden_size;
  for (int64_t h = 0; h < p.hidden_size; h += kBlockSize) {
    float block[kBlockSize];
    for (int i = 0; i < kBlockSize; ++i) block[i] = BF16ToFloat(from[h + i]);
    if (weighted) {
      const float weight = p.routing_weights[route];
      for (int i = 0; i < kBlockSize; ++i) block[i] = RoundToBF16(block[i] * weight);
    }
    if (p.precision == Precision::kW4A4 && p.x_form == XForm::kBf16)
      RoundBlock(p.precision, *p.gate_up.input_scale, block);
    memcpy(to + h, block, sizeof(block));
  }
  if (p.precision == Precision::kW4A4Dynamic) call.x_row_scales[row] = QuantizeRow(to, p.hidden_size);
}

void IntermediateRow(const Call& call, int64_t row) {
  const int64_t size = call.problem.intermediate_size;
  call.intermediate_row_scales[row] = QuantizeRow(call.intermediate + row * size, size);
}

// Sixteen sums scaled and biased.
inline void Finish(const float* sums, float scale, const float* bias, float* result) {
  for (int i = 0; i < kColumns; ++i) result[i] = sums[i] * scale;
  if (bias != nullptr) {
    for (int i = 0; i < kColumns; ++i) result[i] += bias[i];
  }
}

void GateUpUnit(const Call& call, int64_t unit) {
  const Problem& p = call.problem;
  const bool quantized = p.precision == Precision::kW4A4, dynamic = p.precision == Precision::kW4A4Dynamic;
  const int64_t units_per_expert = p.intermediate_size / kColumns;
  const int64_t expert = call.active_experts[unit / units_per_expert];
  const int64_t column = unit % units_per_expert * kColumns;
  const float input_scale = quantized ? *p.gate_up.input_scale : 1.0f;
  const float down_input_scale = quantized ? p.down.input_scale[expert] : 1.0f;
  const int64_t end = call.expert_starts[expert + 1];
  for (int64_t begin = call.expert_starts[expert]; begin < end; begin += kBlockTokens) {
    const int count = static_cast<int>(end - begin < kBlockTokens ? end - begin : kBlockTokens);
    const float* inputs[kBlockTokens];
    float input_scales[kBlockTokens];
    for (int t = 0; t < count; ++t) {
      const int64_t row = p.weight_on == WeightOn::kInput ? begin + t : call.route_order[begin + t] / p.top_k;
      inputs[t] = call.x_rows + row * p.hidden_size;
      input_scales[t] = dynamic ? call.x_row_scales[row] : input_scale;
    }
    alignas(64) float sums[2][kBlockTokens][kColumns];
    for (int64_t part = 0; part < p.num_parts; ++part) {
      const int64_t weight_row = (expert * p.num_parts + part) * p.intermediate_size + column;
      Multiply(WeightRows(p.gate_up, weight_row, p.hidden_size), inputs, count, sums[part]);
      const float global_scale = p.gate_up.global_scale[expert * p.num_parts + part];
      const float* bias = p.gate_up.bias == nullptr ? nullptr : p.gate_up.bias + weight_row;
      for (int t = 0; t < count; ++t) Finish(sums[part][t], input_scales[t] * global_scale, bias, sums[part][t]);
    }
    for (int t = 0; t < count; ++t) {
      float block[kColumns];
      Activate(p, sums[0][t], sums[p.num_parts - 1][t], block);
      RoundBlock(p.precision, down_input_scale, block);
      memcpy(call.intermediate + (begin + t) * p.intermediate_size + column, block, sizeof(block));
    }
  }
}

void DownUnit(const Call& call, int64_t unit) {
  const Problem& p = call.problem;
  const bool ordered = p.combine == Combine::kOrdered;
  const int64_t first_column = unit * call.down_unit_columns;
  const int64_t past_last = first_column + call.down_unit_columns;
  const int64_t end_column = past_last < p.hidden_size ? past_last : p.hidden_size;
  // Whatever is accumulated into is zeroed here, on every call: XLA's buffers arrive with anything in them.
  if (!ordered) {
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      memset(call.sums + t * p.hidden_size + first_column, 0, (end_column - first_column) * sizeof(float));
    }
  }
  for (int64_t active = 0; active < call.num_active; ++active) {
    const int64_t expert = call.active_experts[active];
    const float input_scale = p.precision == Precision::kW4A4 ? p.down.input_scale[expert] : 1.0f;
    const int64_t end = call.expert_starts[expert + 1];
    for (int64_t begin = call.expert_starts[expert]; begin < end; begin += kBlockTokens) {
      const int count = static_cast<int>(end - begin < kBlockTokens ? end - begin : kBlockTokens);
      const float* inputs[kBlockTokens];
      for (int t = 0; t < count; ++t) inputs[t] = call.intermediate + (begin + t) * p.intermediate_size;
      for (int64_t column = first_column; column < end_column; column += kColumns) {
        const int64_t weight_row = expert * p.hidden_size + column;
        const float* bias = p.down.bias == nullptr ? nullptr : p.down.bias + weight_row;
        alignas(64) float sums[kBlockTokens][kColumns];
        Multiply(WeightRows(p.down, weight_row, p.intermediate_size), inputs, count, sums);
        for (int t = 0; t < count; ++t) {
          const int64_t route = call.route_order[begin + t];
          const float weight = p.weight_on == WeightOn::kInput ? 1.0f : p.routing_weights[route];
          const float row_scale =
              p.precision == Precision::kW4A4Dynamic ? call.intermediate_row_scales[begin + t] : input_scale;
          float block[kColumns];
          Finish(sums[t], row_scale * p.down.global_scale[expert], bias, block);
          float* to = call.sums + (ordered ? route : route / p.top_k) * p.hidden_size + column;
          if (ordered) {
            for (int i = 0; i < kColumns; ++i) to[i] = weight * block[i];
          } else {
            for (int i = 0; i < kColumns; ++i) to[i] += weight * block[i];
          }
        }
      }
    }
  }
  if (!ordered && p.out_is_bf16()) {
    uint16_t* out = static_cast<uint16_t*>(p.out);
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      const int64_t row = t * p.hidden_size;
      for (int64_t h = row + first_column; h < row + end_column; ++h) out[h] = BF16FromFloat(call.sums[h]);
    }
  }
}

void CombineRow(const Call& call, int64_t token) {
  const Problem& p = call.problem;
  for (int64_t h = 0; h < p.hidden_size; h += kColumns) {
    float total[kColumns] = {};
    for (int64_t route = token * p.top_k; route < (token + 1) * p.top_k; ++route) {
      if (LocalExpert(p, route) < 0) continue;
      const float* contribution = call.sums + route * p.hidden_size + h;
      for (int i = 0; i < kColumns; ++i) total[i] += contribution[i];
    }
    const int64_t at = token * p.hidden_size + h;
    if (p.out_is_bf16()) {
      for (int i = 0; i < kColumns; ++i) static_cast<uint16_t*>(p.out)[at + i] = BF16FromFloat(total[i]);
    } else {
      memcpy(static_cast<float*>(p.out) + at, total, sizeof(total));
    }
  }
}

// The local group that has `row`, which one has. Not by std::upper_bound: a function of the standard library that is
// compiled here for one instruction set may be linked into the code of another.
inline int64_t GroupOf(const int32_t* starts, int64_t groups, int64_t row) {
  int64_t first = 0, last = groups;
  while (last - first > 1) {
    const int64_t middle = (first + last) / 2;
    (starts[middle] <= row ? first : last) = middle;
  }
  return first;
}

void ProductRow(const ProductCall& call, int64_t row) {
  const Product& p = call.problem;
  const int32_t* const starts = call.group_starts;
  if (row < starts[0] || row >= starts[p.local_groups]) {
    memset(static_cast<char*>(p.out) + row * p.out_features * p.out_bytes, 0, p.out_features * p.out_bytes);
    return;
  }
  float input_scale = 1.0f;
  if (p.precision == Precision::kW4A4) {
    input_scale = p.weights.input_scale[GroupOf(starts, p.local_groups, row)];
  }
  const uint16_t* from = p.x + row * p.in_features;
  float* to = call.x_rows + row * p.in_features;
  for (int64_t c = 0; c < p.in_features; c += kBlockSize) {
    float block[kBlockSize];
    for (int i = 0; i < kBlockSize; ++i) block[i] = BF16ToFloat(from[c + i]);
    if (p.precision == Precision::kW4A4) RoundBlock(p.precision, input_scale, block);
    memcpy(to + c, block, sizeof(block));
  }
  if (p.precision == Precision::kW4A4Dynamic) call.x_row_scales[row] = QuantizeRow(to, p.in_features);
}

void ProductUnit(const ProductCall& call, int64_t unit) {
  const Product& p = call.problem;
  const int64_t group = call.active_groups[unit / call.units_per_group()];
  const int64_t first_column = unit % call.units_per_group() * call.unit_columns;
  const int64_t past_last = first_column + call.unit_columns;
  const int64_t end_column = past_last < p.out_features ? past_last : p.out_features;
  const float input_scale = p.precision == Precision::kW4A4 ? p.weights.input_scale[group] : 1.0f;
  const int64_t end = call.group_starts[group + 1];
  for (int64_t begin = call.group_starts[group]; begin < end; begin += kBlockTokens) {
    const int count = static_cast<int>(end - begin < kBlockTokens ? end - begin : kBlockTokens);
    const float* inputs[kBlockTokens];
    for (int t = 0; t < count; ++t) inputs[t] = call.x_rows + (begin + t) * p.in_features;
    for (int64_t column = first_column; column < end_column; column += kColumns) {
      const int64_t weight_row = group * p.out_features + column;
      const float* bias = p.weights.bias == nullptr ? nullptr : p.weights.bias + weight_row;
      alignas(64) float sums[kBlockTokens][kColumns];
      Multiply(WeightRows(p.weights, weight_row, p.in_features), inputs, count, sums);
      for (int t = 0; t < count; ++t) {
        const int64_t at = (begin + t) * p.out_features + column;
        const float row_scale = p.precision == Precision::kW4A4Dynamic ? call.x_row_scales[begin + t] : input_scale;
        float block[kColumns];
        Finish(sums[t], row_scale * p.weights.global_scale[group], bias, block);
        if (p.out_is_bf16()) {
          for (int i = 0; i < kColumns; ++i) static_cast<uint16_t*>(p.out)[at + i] = BF16FromFloat(block[i]);
        } else {
          memcpy(static_cast<float*>(p.out) + at, block, sizeof(block));
        }
      }
    }
  }
}

}  // namespace

const Kernels JAX_MOE_KERNELS = {XRow, GateUpUnit, IntermediateRow, DownUnit, CombineRow, ProductRow, ProductUnit};

}  // namespace jax_moe
