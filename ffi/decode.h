// Decodes the operands, results and attributes of a fused_moe custom call, and checks every size that a handler
// indexes by. jax_moe.fused_moe checks the same at trace time with better words; this is for callers who build the
// custom call by hand, and for programs that were serialised by another version. checks.h says what a refusal is.

#ifndef JAX_MOE_DECODE_H_
#define JAX_MOE_DECODE_H_

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "buffers.h"
#include "checks.h"
#include "decode_parcels.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe {

// Operands of the custom call, in order. An absent optional one is f32[0].
enum Operand : size_t {
  kX,
  kExpertIds,
  kRoutingWeights,
  kExpertOffset,
  kGateUpPayload,
  kGateUpBlockScale,
  kGateUpGlobalScale,
  kGateUpInputScale,
  kGateUpBias,
  kDownPayload,
  kDownBlockScale,
  kDownGlobalScale,
  kDownInputScale,
  kDownBias,
  kNumOperands,
};

inline constexpr std::string_view kOperandNames[kNumOperands] = {
    "x",
    "expert_ids",
    "routing_weights",
    "expert_offset",
    "gate_up.payload",
    "gate_up.block_scale",
    "gate_up.global_scale",
    "gate_up.input_scale",
    "gate_up.bias",
    "down.payload",
    "down.block_scale",
    "down.global_scale",
    "down.input_scale",
    "down.bias",
};

inline ffi::Error DecodeOptions(const Attributes& attributes, Options* options) {
  using Form = std::pair<Precision, XForm>;
  Form form;
  JAX_MOE_TRY(attributes.GetChoice<Form>("precision",
                                         {{"w4a16", {Precision::kW4A16, XForm::kBf16}},
                                          {"w4a4", {Precision::kW4A4, XForm::kBf16}},
                                          {"w4a4_dynamic", {Precision::kW4A4Dynamic, XForm::kBf16}},
                                          {"w4a4_rounded_x", {Precision::kW4A4, XForm::kRounded}},
                                          {"w4a4_parcels", {Precision::kW4A4, XForm::kParcels}}},
                                         &form));
  std::tie(options->precision, options->x_form) = form;
  JAX_MOE_TRY(attributes.GetChoice<Combine>("combine", {{"atomic", Combine::kAtomic}, {"ordered", Combine::kOrdered}},
                                            &options->combine));
  JAX_MOE_TRY(attributes.GetChoice<WeightOn>("weight_on", {{"output", WeightOn::kOutput}, {"input", WeightOn::kInput}},
                                             &options->weight_on));
  if (options->x_form != XForm::kBf16 && options->weight_on == WeightOn::kInput) {
    return attributes.Refuse("weight_on", "got 'input': a weighted x is rounded by the call (precision = 'w4a4')");
  }
  JAX_MOE_TRY(attributes.GetChoice<Activation>("activation",
                                               {{"swiglu", Activation::kSwiGLU},
                                                {"geglu", Activation::kGeGLU},
                                                {"relu2", Activation::kReLU2},
                                                {"situ", Activation::kSiTU}},
                                               &options->activation));
  JAX_MOE_TRY(attributes.Get("alpha", &options->alpha));
  JAX_MOE_TRY(attributes.Get("beta", &options->beta));
  return attributes.Get("limit", &options->limit);
}

// Everything but the payloads and block scales, whose layout is the platform's. `intermediate_size` is the caller's
// to find, because only those two tell it.
inline ffi::Error DecodeProblem(const Operands& operands, const Results& results, const Options& options,
                                int64_t intermediate_size, Problem* problem) {
  Problem& p = *problem;
  static_cast<Options&>(p) = options;
  const bool has_parcels = p.x_form == XForm::kParcels;
  p.num_parts = p.activation == Activation::kReLU2 ? 1 : 2;
  p.intermediate_size = intermediate_size;
  JAX_MOE_TRY(operands.GetSize(kX, 2, 0, &p.num_tokens));
  if (has_parcels) {  // whose width is checked against these sizes
    JAX_MOE_TRY(GetColumns("out", *results[0], &p.hidden_size));
  } else {
    JAX_MOE_TRY(operands.GetSize(kX, 2, 1, &p.hidden_size));
  }
  JAX_MOE_TRY(operands.GetSize(kExpertIds, 2, 1, &p.top_k));
  JAX_MOE_TRY(operands.GetSize(kDownGlobalScale, 1, 0, &p.local_experts));
  JAX_MOE_TRY(CheckSize("tokens (axis 0 of x)", p.num_tokens, 0, 1));
  JAX_MOE_TRY(
      CheckSize(has_parcels ? "hidden size (axis 1 of out)" : "hidden size (axis 1 of x)", p.hidden_size, 16, 16));
  JAX_MOE_TRY(CheckSize("experts per token (axis 1 of expert_ids)", p.top_k, 1, 1));
  JAX_MOE_TRY(CheckSize("local experts (axis 0 of down.global_scale)", p.local_experts, 1, 1));
  JAX_MOE_TRY(CheckSize("intermediate size", p.intermediate_size, 16, 16));
  int64_t num_routes = 0;
  if (__builtin_mul_overflow(p.num_tokens, p.top_k, &num_routes) || num_routes > std::numeric_limits<int32_t>::max()) {
    return Refuse("expert_ids: got " + std::to_string(p.num_tokens) + " x " + std::to_string(p.top_k) +
                  " routes, needs fewer than 2^31");
  }

  const int64_t tokens = p.num_tokens, k = p.top_k, experts = p.local_experts, parts = p.num_parts;
  const int64_t hidden = p.hidden_size, intermediate = p.intermediate_size;
  if (has_parcels) {
    int64_t bytes = 0;
    JAX_MOE_TRY(GetParcelBytes(k, hidden, &bytes));
    const uint8_t* parcels = nullptr;  // for the check: kernels are given buffers by number, and a CPU has no such call
    JAX_MOE_TRY(operands.GetData(kX, ffi::U8, {tokens, bytes}, &parcels));
  } else {
    JAX_MOE_TRY(operands.GetData(kX, ffi::BF16, {tokens, hidden}, &p.x));
  }
  JAX_MOE_TRY(operands.GetData(kExpertIds, ffi::S32, {tokens, k}, &p.expert_ids));
  JAX_MOE_TRY(operands.GetData(kRoutingWeights, ffi::F32, {tokens, k}, &p.routing_weights));
  JAX_MOE_TRY(operands.GetData(kExpertOffset, ffi::S32, {}, &p.expert_offset));
  JAX_MOE_TRY(operands.GetData(kGateUpGlobalScale, ffi::F32, {experts, parts}, &p.gate_up.global_scale));
  JAX_MOE_TRY(operands.GetOptionalData(kGateUpInputScale, {}, &p.gate_up.input_scale));
  JAX_MOE_TRY(operands.GetOptionalData(kGateUpBias, {experts, parts, intermediate}, &p.gate_up.bias));
  JAX_MOE_TRY(operands.GetData(kDownGlobalScale, ffi::F32, {experts}, &p.down.global_scale));
  JAX_MOE_TRY(operands.GetOptionalData(kDownInputScale, {experts}, &p.down.input_scale));
  JAX_MOE_TRY(operands.GetOptionalData(kDownBias, {experts, hidden}, &p.down.bias));
  if (p.precision == Precision::kW4A4 && (p.gate_up.input_scale == nullptr || p.down.input_scale == nullptr)) {
    const Operand missing = p.gate_up.input_scale == nullptr ? kGateUpInputScale : kDownInputScale;
    return Refuse(std::string(kOperandNames[missing]) +
                  ": got f32[0] (absent), needs the scale that jax_moe.calibrate() fills for precision=w4a4");
  }

  // Either output type will do; the size is checked against the one it has.
  p.out_bytes = results[0]->element_type() == ffi::BF16 ? 2 : 4;
  return GetData("out", *results[0], p.out_is_bf16() ? ffi::BF16 : ffi::F32, {tokens, hidden}, &p.out);
}

// Payloads and block scales in the canonical layout ([E, P, I, H/2] and so on); after DecodeProblem.
inline ffi::Error DecodeCanonicalWeights(const Operands& operands, Problem* problem) {
  Problem& p = *problem;
  const int64_t experts = p.local_experts, parts = p.num_parts;
  const int64_t hidden = p.hidden_size, intermediate = p.intermediate_size;
  JAX_MOE_TRY(
      operands.GetData(kGateUpPayload, ffi::U8, {experts, parts, intermediate, hidden / 2}, &p.gate_up.payload));
  JAX_MOE_TRY(operands.GetData(kGateUpBlockScale, ffi::F8E4M3FN, {experts, parts, intermediate, hidden / 16},
                               &p.gate_up.block_scale));
  JAX_MOE_TRY(operands.GetData(kDownPayload, ffi::U8, {experts, hidden, intermediate / 2}, &p.down.payload));
  return operands.GetData(kDownBlockScale, ffi::F8E4M3FN, {experts, hidden, intermediate / 16}, &p.down.block_scale);
}

// The intermediate size of canonical weights, for DecodeProblem.
inline ffi::Error CanonicalIntermediateSize(const Operands& operands, int64_t* intermediate_size) {
  return operands.GetSize(kGateUpPayload, 4, 2, intermediate_size);
}

}  // namespace jax_moe

#endif  // JAX_MOE_DECODE_H_
