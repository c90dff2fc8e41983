// Parcels: tokens as they travel between the devices of a mesh in w4a4, and the call that makes them.
//
// A token's parcel is a row of bytes (jax_moe/parcels.py):
//   s32[K] expert ids | f32[K] routing weights | u8[H/2] codes of x | e4m3[H/16] block scales | zeros
// The zeros make the row a multiple of 8 bytes.

#ifndef JAX_MOE_DECODE_PARCELS_H_
#define JAX_MOE_DECODE_PARCELS_H_

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "buffers.h"
#include "checks.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe {

// Operands of the custom call that makes parcels, in order.
enum ParcelOperand : size_t {
  kParcelX,
  kParcelExpertIds,
  kParcelRoutingWeights,
  kParcelInputScale,
  kNumParcelOperands,
};

inline constexpr std::string_view kParcelOperandNames[kNumParcelOperands] = {
    "x",
    "expert_ids",
    "routing_weights",
    "input_scale",
};

// Of one parcel; `hidden_size` is a positive multiple of 16.
inline ffi::Error GetParcelBytes(int64_t top_k, int64_t hidden_size, int64_t* bytes) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (top_k > kMost || hidden_size > kMost) {
    return Refuse("x: got " + std::to_string(top_k) + " experts a token and a hidden size of " +
                  std::to_string(hidden_size) + ", needs less than 2^31 of each");
  }
  *bytes = (8 * top_k + hidden_size / 16 * 9 + 7) / 8 * 8;
  return ffi::Error::Success();
}

inline ffi::Error DecodeParcels(const Operands& operands, const Results& results, ParcelSizes* sizes) {
  ParcelSizes& p = *sizes;
  JAX_MOE_TRY(operands.GetSize(kParcelX, 2, 0, &p.num_tokens));
  JAX_MOE_TRY(operands.GetSize(kParcelX, 2, 1, &p.hidden_size));
  JAX_MOE_TRY(operands.GetSize(kParcelExpertIds, 2, 1, &p.top_k));
  JAX_MOE_TRY(CheckSize("tokens (axis 0 of x)", p.num_tokens, 0, 1));
  JAX_MOE_TRY(CheckSize("hidden size (axis 1 of x)", p.hidden_size, 16, 16));
  JAX_MOE_TRY(CheckSize("experts per token (axis 1 of expert_ids)", p.top_k, 1, 1));
  int64_t bytes = 0;
  JAX_MOE_TRY(GetParcelBytes(p.top_k, p.hidden_size, &bytes));

  const uint16_t* x = nullptr;  // kernels are given buffers by number
  const int32_t* expert_ids = nullptr;
  const float *routing_weights = nullptr, *input_scale = nullptr;
  uint8_t* parcels = nullptr;
  JAX_MOE_TRY(operands.GetData(kParcelX, ffi::BF16, {p.num_tokens, p.hidden_size}, &x));
  JAX_MOE_TRY(operands.GetData(kParcelExpertIds, ffi::S32, {p.num_tokens, p.top_k}, &expert_ids));
  JAX_MOE_TRY(operands.GetData(kParcelRoutingWeights, ffi::F32, {p.num_tokens, p.top_k}, &routing_weights));
  JAX_MOE_TRY(operands.GetData(kParcelInputScale, ffi::F32, {}, &input_scale));
  return GetData("out", *results[0], ffi::U8, {p.num_tokens, bytes}, &parcels);
}

}  // namespace jax_moe

#endif  // JAX_MOE_DECODE_PARCELS_H_
