// One grouped product (jax_moe.ragged_dot) as both handlers see it, and how it is decoded from a call frame.
//
// Rows of x stand group by group: group g has group_sizes[g] of them. A call has the matrices of local_groups groups
// from group_offset on, and multiplies their rows; every other row of the output is zeros.

#ifndef JAX_MOE_DECODE_PRODUCT_H_
#define JAX_MOE_DECODE_PRODUCT_H_

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "buffers.h"
#include "checks.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe {

// Operands of the custom call, in order. An absent optional one is f32[0].
enum ProductOperand : size_t {
  kProductX,
  kGroupSizes,
  kGroupOffset,
  kWeightsPayload,
  kWeightsBlockScale,
  kWeightsGlobalScale,
  kWeightsInputScale,
  kWeightsBias,
  kNumProductOperands,
};

inline constexpr std::string_view kProductOperandNames[kNumProductOperands] = {
    "x",
    "group_sizes",
    "group_offset",
    "weights.payload",
    "weights.block_scale",
    "weights.global_scale",
    "weights.input_scale",
    "weights.bias",
};

inline ffi::Error DecodeProductPrecision(const Attributes& attributes, Precision* precision) {
  return attributes.GetChoice<Precision>(
      "precision",
      {{"w4a16", Precision::kW4A16}, {"w4a4", Precision::kW4A4}, {"w4a4_dynamic", Precision::kW4A4Dynamic}}, precision);
}

// Everything but the payload and block scales, whose layout is the platform's.
inline ffi::Error DecodeProduct(const Operands& operands, const Results& results, Precision precision,
                                Product* product) {
  Product& p = *product;
  p.precision = precision;
  JAX_MOE_TRY(operands.GetSize(kProductX, 2, 0, &p.num_rows));
  JAX_MOE_TRY(operands.GetSize(kProductX, 2, 1, &p.in_features));
  JAX_MOE_TRY(operands.GetSize(kGroupSizes, 1, 0, &p.num_groups));
  JAX_MOE_TRY(operands.GetSize(kWeightsGlobalScale, 1, 0, &p.local_groups));
  JAX_MOE_TRY(CheckSize("rows (axis 0 of x)", p.num_rows, 0, 1));
  JAX_MOE_TRY(CheckSize("in_features (axis 1 of x)", p.in_features, 16, 16));
  JAX_MOE_TRY(CheckSize("groups (axis 0 of group_sizes)", p.num_groups, 1, 1));
  JAX_MOE_TRY(CheckSize("local groups (axis 0 of weights.global_scale)", p.local_groups, 1, 1));
  if (p.num_rows > std::numeric_limits<int32_t>::max()) {
    return Refuse("x: got " + std::to_string(p.num_rows) + " rows, needs fewer than 2^31");
  }
  // Any output that has two axes and one of the types; its exact shape is checked against them.
  const ffi::AnyBuffer& out = *results[0];
  JAX_MOE_TRY(GetColumns("out", out, &p.out_features));
  JAX_MOE_TRY(CheckSize("out_features (axis 1 of out)", p.out_features, 16, 16));
  p.out_bytes = out.element_type() == ffi::BF16 ? 2 : 4;

  JAX_MOE_TRY(operands.GetData(kProductX, ffi::BF16, {p.num_rows, p.in_features}, &p.x));
  JAX_MOE_TRY(operands.GetData(kGroupSizes, ffi::S32, {p.num_groups}, &p.group_sizes));
  JAX_MOE_TRY(operands.GetData(kGroupOffset, ffi::S32, {}, &p.group_offset));
  JAX_MOE_TRY(operands.GetData(kWeightsGlobalScale, ffi::F32, {p.local_groups}, &p.weights.global_scale));
  JAX_MOE_TRY(operands.GetOptionalData(kWeightsInputScale, {p.local_groups}, &p.weights.input_scale));
  JAX_MOE_TRY(operands.GetOptionalData(kWeightsBias, {p.local_groups, p.out_features}, &p.weights.bias));
  if (p.precision == Precision::kW4A4 && p.weights.input_scale == nullptr) {
    return Refuse("weights.input_scale: got f32[0] (absent), needs the scale that precision=w4a4 quantises x with");
  }
  return GetData("out", out, p.out_is_bf16() ? ffi::BF16 : ffi::F32, {p.num_rows, p.out_features}, &p.out);
}

// The payload and block scales in the canonical layout; after DecodeProduct.
inline ffi::Error DecodeCanonicalWeights(const Operands& operands, Product* product) {
  Product& p = *product;
  JAX_MOE_TRY(operands.GetData(kWeightsPayload, ffi::U8, {p.local_groups, p.out_features, p.in_features / 2},
                               &p.weights.payload));
  return operands.GetData(kWeightsBlockScale, ffi::F8E4M3FN, {p.local_groups, p.out_features, p.in_features / 16},
                          &p.weights.block_scale);
}

}  // namespace jax_moe

#endif  // JAX_MOE_DECODE_PRODUCT_H_
