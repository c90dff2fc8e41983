// Decodes the operands, results and attributes of a fused_moe custom call, and checks every size that a handler
// indexes by. jax_moe.fused_moe checks the same at trace time with better words; this is for callers who build the
// custom call by hand, and for programs that were serialised by another version.
//
// Every refusal is INVALID_ARGUMENT and says which operand, what it got and what it needs. An accepted call builds no
// text and allocates nothing: on a GPU this is part of what every eager call costs.

#ifndef JAX_MOE_DECODE_H_
#define JAX_MOE_DECODE_H_

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

// Returns from the enclosing function when `expression`, an ffi::Error, is one.
#define JAX_MOE_TRY(expression) \
  if (::xla::ffi::Error error = (expression); error.failure()) return error

namespace jax_moe {

namespace ffi = ::xla::ffi;

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

inline std::string DataTypeName(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::U8:
      return "u8";
    case ffi::S32:
      return "s32";
    case ffi::F32:
      return "f32";
    case ffi::BF16:
      return "bf16";
    case ffi::F8E4M3FN:
      return "f8e4m3fn";
    default:
      return "dtype#" + std::to_string(static_cast<int>(dtype));
  }
}

inline std::string Describe(ffi::DataType dtype, const int64_t* dims, size_t rank) {
  constexpr size_t kMostShown = 8;
  std::string text = DataTypeName(dtype);
  for (size_t i = 0; i < rank && i < kMostShown; ++i) text.append(i ? "," : "[").append(std::to_string(dims[i]));
  return text.append(rank == 0 ? "[]" : rank > kMostShown ? ",...]" : "]");
}

inline std::string Describe(const ffi::AnyBuffer& buffer) {
  return Describe(buffer.element_type(), buffer.dimensions().begin(), buffer.dimensions().size());
}

// Cold, so that the compiler keeps the code that words refusals away from the code that every call runs.
[[gnu::cold]] inline ffi::Error Refuse(const std::string& what) {
  return ffi::Error::InvalidArgument("jax_moe: " + what);
}

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

// True when the bytes of such a buffer can be counted in an int64.
inline bool IsAddressable(ffi::DataType dtype, std::initializer_list<int64_t> dims) {
  int64_t bytes = static_cast<int64_t>(ffi::ByteWidth(dtype));
  for (int64_t dim : dims) {
    if (dim < 0 || __builtin_mul_overflow(bytes, dim, &bytes)) return false;
  }
  return true;
}

// Checks that `buffer` is exactly dtype[dims], and that its data can be read as such.
inline ffi::Error CheckBuffer(std::string_view name, const ffi::AnyBuffer& buffer, ffi::DataType dtype,
                              std::initializer_list<int64_t> dims) {
  const ffi::AnyBuffer::Dimensions got = buffer.dimensions();
  bool matches = buffer.element_type() == dtype && got.size() == dims.size();
  bool is_empty = false;
  for (size_t i = 0; matches && i < dims.size(); ++i) {
    matches = got[i] == dims.begin()[i];
    is_empty |= got[i] == 0;
  }
  if (!matches) {
    return Refuse(std::string(name) + ": got " + Describe(buffer) + ", needs " +
                  Describe(dtype, dims.begin(), dims.size()));
  }
  if (!IsAddressable(dtype, dims)) return Refuse(std::string(name) + ": " + Describe(buffer) + " is too large");
  const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.untyped_data());
  if (!is_empty && (address == 0 || address % ffi::ByteWidth(dtype) != 0)) {
    return Refuse(std::string(name) + ": its data is null or not aligned to its elements");
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
ffi::Error GetData(std::string_view name, const ffi::AnyBuffer& buffer, ffi::DataType dtype,
                   std::initializer_list<int64_t> dims, T** data) {
  *data = static_cast<T*>(buffer.untyped_data());
  return CheckBuffer(name, buffer, dtype, dims);
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

template <typename Enum>
struct Choice {
  std::string_view name;
  Enum value;
};

template <typename Enum>
ffi::Error GetChoice(const ffi::Dictionary& attributes, std::string_view name,
                     std::initializer_list<Choice<Enum>> choices, Enum* value) {
  ffi::ErrorOr<std::string_view> got = attributes.get<std::string_view>(name);
  if (got.has_error()) return Refuse("attribute " + std::string(name) + ": " + got.error().message());
  for (const Choice<Enum>& choice : choices) {
    if (choice.name != *got) continue;
    *value = choice.value;
    return ffi::Error::Success();
  }
  std::string needs;
  for (const Choice<Enum>& choice : choices) needs += (needs.empty() ? "" : " | ") + std::string(choice.name);
  constexpr size_t kMostShown = 32;
  return Refuse("attribute " + std::string(name) + ": got '" + std::string(got->substr(0, kMostShown)) + "', needs " +
                needs);
}

inline ffi::Error GetNumber(const ffi::Dictionary& attributes, std::string_view name, float* value) {
  ffi::ErrorOr<float> got = attributes.get<float>(name);
  if (got.has_error()) return Refuse("attribute " + std::string(name) + ": " + got.error().message());
  *value = *got;
  return ffi::Error::Success();
}

inline ffi::Error DecodeOptions(const ffi::Dictionary& attributes, Options* options) {
  JAX_MOE_TRY(GetChoice<Precision>(attributes, "precision", {{"w4a16", Precision::kW4A16}, {"w4a4", Precision::kW4A4}},
                                   &options->precision));
  JAX_MOE_TRY(GetChoice<Combine>(attributes, "combine", {{"atomic", Combine::kAtomic}, {"ordered", Combine::kOrdered}},
                                 &options->combine));
  JAX_MOE_TRY(GetChoice<WeightOn>(attributes, "weight_on", {{"output", WeightOn::kOutput}, {"input", WeightOn::kInput}},
                                  &options->weight_on));
  JAX_MOE_TRY(GetChoice<Activation>(attributes, "activation",
                                    {{"swiglu", Activation::kSwiGLU},
                                     {"geglu", Activation::kGeGLU},
                                     {"relu2", Activation::kReLU2},
                                     {"situ", Activation::kSiTU}},
                                    &options->activation));
  JAX_MOE_TRY(GetNumber(attributes, "alpha", &options->alpha));
  JAX_MOE_TRY(GetNumber(attributes, "beta", &options->beta));
  return GetNumber(attributes, "limit", &options->limit);
}

inline ffi::Error CheckSize(std::string_view name, int64_t size, int64_t least, int64_t multiple) {
  if (size >= least && size % multiple == 0) return ffi::Error::Success();
  return Refuse(std::string(name) + ": got " + std::to_string(size) + ", needs a multiple of " +
                std::to_string(multiple) + " that is at least " + std::to_string(least));
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
  JAX_MOE_TRY(GetSize(operands, kDownGlobalScale, 1, 0, &p.num_experts));
  JAX_MOE_TRY(CheckSize("tokens (axis 0 of x)", p.num_tokens, 0, 1));
  JAX_MOE_TRY(CheckSize("hidden size (axis 1 of x)", p.hidden_size, 16, 16));
  JAX_MOE_TRY(CheckSize("experts per token (axis 1 of expert_ids)", p.top_k, 1, 1));
  JAX_MOE_TRY(CheckSize("local experts (axis 0 of down.global_scale)", p.num_experts, 1, 1));
  JAX_MOE_TRY(CheckSize("intermediate size", p.intermediate_size, 16, 16));
  int64_t num_routes = 0;
  if (__builtin_mul_overflow(p.num_tokens, p.top_k, &num_routes) || num_routes > std::numeric_limits<int32_t>::max()) {
    return Refuse("expert_ids: got " + std::to_string(p.num_tokens) + " x " + std::to_string(p.top_k) +
                  " routes, needs fewer than 2^31");
  }

  const int64_t tokens = p.num_tokens, k = p.top_k, experts = p.num_experts, parts = p.num_parts;
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
  p.out_is_bf16 = results[0]->element_type() == ffi::BF16;
  return GetData("out", *results[0], p.out_is_bf16 ? ffi::BF16 : ffi::F32, {tokens, hidden}, &p.out);
}

// Payloads and block scales in the canonical layout ([E, P, I, H/2] and so on); after DecodeProblem.
inline ffi::Error DecodeCanonicalWeights(const Operands& operands, Problem* problem) {
  Problem& p = *problem;
  const int64_t experts = p.num_experts, parts = p.num_parts;
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
