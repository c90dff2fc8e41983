// Decodes the operands, results and attributes of a fused_moe custom call, and checks every size that a handler
// indexes by. jax_moe.fused_moe checks the same at trace time with better words; this is for callers who build the
// custom call by hand, and for programs that were serialised by another version. checks.h says what a refusal is.

#ifndef JAX_MOE_DECODE_H_
#define JAX_MOE_DECODE_H_

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "checks.h"
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

// The operands whose layout is the platform's.
inline constexpr Operand kPackedWeights[] = {kGateUpPayload, kGateUpBlockScale, kDownPayload, kDownBlockScale};

// The buffers of a call, taken out of the call frame once. Once filled they are all there, and can be indexed freely.
using Operands = std::array<std::optional<ffi::AnyBuffer>, kNumOperands>;

inline constexpr size_t kMostResults = 16;                                // the output and its workspaces
using Results = std::array<std::optional<ffi::AnyBuffer>, kMostResults>;  // those that the call has, then none

inline ffi::Error GetOperands(const ffi::RemainingArgs& args, Operands* operands) {
  if (args.size() != kNumOperands) {
    return Refuse("operands: got " + std::to_string(args.size()) + ", needs " + std::to_string(kNumOperands));
  }
  for (size_t i = 0; i < kNumOperands; ++i) {
    ffi::ErrorOr<ffi::AnyBuffer> buffer = args.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return Refuse(std::string(kOperandNames[i]) + ": " + buffer.error().message());
    (*operands)[i] = *buffer;
  }
  return ffi::Error::Success();
}

// `needed` results, of which a refusal says that they are `what`.
inline ffi::Error GetResults(const ffi::RemainingRets& rets, size_t needed, std::string_view what, Results* results) {
  if (rets.size() != needed || needed > kMostResults) {
    return Refuse("results: got " + std::to_string(rets.size()) + ", needs " + std::to_string(needed) +
                  std::string(what));
  }
  for (size_t i = 0; i < needed; ++i) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> buffer = rets.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return Refuse("result " + std::to_string(i) + ": " + buffer.error().message());
    (*results)[i] = **buffer;
  }
  return ffi::Error::Success();
}

// Size `axis` of an operand whose exact shape is checked later; checks the rank that this needs.
inline ffi::Error GetSize(const Operands& operands, Operand operand, size_t rank, size_t axis, int64_t* size) {
  const ffi::AnyBuffer& buffer = *operands[operand];
  if (buffer.dimensions().size() != rank) {
    return Refuse(std::string(kOperandNames[operand]) + ": got " + Describe(buffer) + ", needs " +
                  std::to_string(rank) + " dimensions");
  }
  *size = buffer.dimensions()[axis];
  return ffi::Error::Success();
}

template <typename T>
ffi::Error GetOperandData(const Operands& operands, Operand operand, ffi::DataType dtype,
                          std::initializer_list<int64_t> dims, const T** data) {
  return GetData(kOperandNames[operand], *operands[operand], dtype, dims, data);
}

// As GetOperandData, for f32 operands that may be absent (f32[0]): *data is null then.
inline ffi::Error GetOptionalOperandData(const Operands& operands, Operand operand, std::initializer_list<int64_t> dims,
                                         const float** data) {
  *data = nullptr;
  const ffi::AnyBuffer::Dimensions got = operands[operand]->dimensions();
  if (operands[operand]->element_type() == ffi::F32 && got.size() == 1 && got[0] == 0) return ffi::Error::Success();
  return GetOperandData(operands, operand, ffi::F32, dims, data);
}

inline ffi::Error DecodeOptions(const Attributes& attributes, Options* options) {
  struct Rounding {
    Precision precision;
    bool x_is_rounded;
  } rounding;
  JAX_MOE_TRY(attributes.GetChoice<Rounding>("precision",
                                             {{"w4a16", {Precision::kW4A16, false}},
                                              {"w4a4", {Precision::kW4A4, false}},
                                              {"w4a4_rounded_x", {Precision::kW4A4, true}}},
                                             &rounding));
  options->precision = rounding.precision;
  options->x_is_rounded = rounding.x_is_rounded;
  JAX_MOE_TRY(attributes.GetChoice<Combine>("combine", {{"atomic", Combine::kAtomic}, {"ordered", Combine::kOrdered}},
                                            &options->combine));
  JAX_MOE_TRY(attributes.GetChoice<WeightOn>("weight_on", {{"output", WeightOn::kOutput}, {"input", WeightOn::kInput}},
                                             &options->weight_on));
  if (options->x_is_rounded && options->weight_on == WeightOn::kInput) {
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
  p.num_parts = p.activation == Activation::kReLU2 ? 1 : 2;
  p.intermediate_size = intermediate_size;
  JAX_MOE_TRY(GetSize(operands, kX, 2, 0, &p.num_tokens));
  JAX_MOE_TRY(GetSize(operands, kX, 2, 1, &p.hidden_size));
  JAX_MOE_TRY(GetSize(operands, kExpertIds, 2, 1, &p.top_k));
  JAX_MOE_TRY(GetSize(operands, kDownGlobalScale, 1, 0, &p.local_experts));
  JAX_MOE_TRY(CheckSize("tokens (axis 0 of x)", p.num_tokens, 0, 1));
  JAX_MOE_TRY(CheckSize("hidden size (axis 1 of x)", p.hidden_size, 16, 16));
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
  JAX_MOE_TRY(GetOperandData(operands, kX, ffi::BF16, {tokens, hidden}, &p.x));
  JAX_MOE_TRY(GetOperandData(operands, kExpertIds, ffi::S32, {tokens, k}, &p.expert_ids));
  JAX_MOE_TRY(GetOperandData(operands, kRoutingWeights, ffi::F32, {tokens, k}, &p.routing_weights));
  JAX_MOE_TRY(GetOperandData(operands, kExpertOffset, ffi::S32, {}, &p.expert_offset));
  JAX_MOE_TRY(GetOperandData(operands, kGateUpGlobalScale, ffi::F32, {experts, parts}, &p.gate_up.global_scale));
  JAX_MOE_TRY(GetOptionalOperandData(operands, kGateUpInputScale, {}, &p.gate_up.input_scale));
  JAX_MOE_TRY(GetOptionalOperandData(operands, kGateUpBias, {experts, parts, intermediate}, &p.gate_up.bias));
  JAX_MOE_TRY(GetOperandData(operands, kDownGlobalScale, ffi::F32, {experts}, &p.down.global_scale));
  JAX_MOE_TRY(GetOptionalOperandData(operands, kDownInputScale, {experts}, &p.down.input_scale));
  JAX_MOE_TRY(GetOptionalOperandData(operands, kDownBias, {experts, hidden}, &p.down.bias));
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
  JAX_MOE_TRY(GetOperandData(operands, kGateUpPayload, ffi::U8, {experts, parts, intermediate, hidden / 2},
                             &p.gate_up.payload));
  JAX_MOE_TRY(GetOperandData(operands, kGateUpBlockScale, ffi::F8E4M3FN, {experts, parts, intermediate, hidden / 16},
                             &p.gate_up.block_scale));
  JAX_MOE_TRY(GetOperandData(operands, kDownPayload, ffi::U8, {experts, hidden, intermediate / 2}, &p.down.payload));
  return GetOperandData(operands, kDownBlockScale, ffi::F8E4M3FN, {experts, hidden, intermediate / 16},
                        &p.down.block_scale);
}

// The intermediate size of canonical weights, for DecodeProblem.
inline ffi::Error CanonicalIntermediateSize(const Operands& operands, int64_t* intermediate_size) {
  return GetSize(operands, kGateUpPayload, 4, 2, intermediate_size);
}

}  // namespace jax_moe

#endif  // JAX_MOE_DECODE_H_
