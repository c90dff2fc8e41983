// One call as both handlers see it: options, sizes and where the operands are.
//
// Nothing here depends on XLA or on a platform (the pointers are host or device pointers, as the platform has it);
// decode.h fills a Problem from a call frame, decode_product.h a Product and decode_parcels.h Parcels; they check every
// size on the way.

#ifndef JAX_MOE_PROBLEM_H_
#define JAX_MOE_PROBLEM_H_

#include <cstdint>

namespace jax_moe {

enum class Precision { kW4A16, kW4A4, kW4A4Dynamic };
enum class Combine { kAtomic, kOrdered };
enum class WeightOn { kOutput, kInput };
// Rounded: as w4a4 multiplies it, code * block scale without the global scale. Parcels: u8, of w4a4 (decode_parcels.h).
enum class XForm { kBf16, kRounded, kParcels };
enum class Activation { kSwiGLU, kGeGLU, kReLU2, kSiTU };

// What the attributes of a fused_moe call say: the same on every run of a call site.
struct Options {
  Precision precision;
  Combine combine;
  WeightOn weight_on;
  Activation activation;
  float alpha, beta, limit;  // of the activation; see jax_moe/activations.py
  XForm x_form;
};

// What the shapes of its operands and results say.
struct Sizes {
  int64_t num_tokens;         // T
  int64_t top_k;              // K
  int64_t local_experts;      // L, those held here
  int64_t num_parts;          // P: 2 with a gate (gate, then up), else 1
  int64_t hidden_size;        // H
  int64_t intermediate_size;  // I
  int64_t out_bytes;          // of an output element: 2 (bf16) or 4 (f32)

  int64_t num_routes() const { return num_tokens * top_k; }
  bool out_is_bf16() const { return out_bytes == 2; }
};

// NVFP4 weights of one linear map of every local expert, or group; `lead` is [L, P] for gate_up, [L] for down, [G].
struct Projection {
  const uint8_t* payload;      // [*lead, N, C/2], two e2m1 codes to a byte, the even index in the low nibble
  const uint8_t* block_scale;  // [*lead, N, C/16], e4m3
  const float* global_scale;   // [*lead]
  const float* input_scale;    // [] for gate_up, else [*lead]; null when absent
  const float* bias;           // [*lead, N]; null when absent
};

struct Problem : Options, Sizes {
  const uint16_t* x;             // bf16 [T, H]; null where it is parcels
  const int32_t* expert_ids;     // [T, K]
  const float* routing_weights;  // [T, K]
  const int32_t* expert_offset;  // []
  Projection gate_up;
  Projection down;
  void* out;  // bf16 or f32 [T, H]
};

// What the shapes of the operands and results of a grouped product say.
//
// Rows of x stand group by group: group g has group_sizes[g] of them. A call has the matrices of G groups from
// group_offset on, and multiplies their rows; every other row of the output is zeros.
struct ProductSizes {
  int64_t num_rows;      // T
  int64_t num_groups;    // E: those that have a size
  int64_t local_groups;  // G: those whose matrices are here
  int64_t in_features;   // C
  int64_t out_features;  // N
  int64_t out_bytes;     // of an output element: 2 (bf16) or 4 (f32)

  bool out_is_bf16() const { return out_bytes == 2; }
};

// One grouped product (jax_moe.ragged_dot) as both handlers see it.
struct Product : ProductSizes {
  Precision precision;
  const uint16_t* x;            // bf16 [T, C]
  const int32_t* group_sizes;   // [E]
  const int32_t* group_offset;  // []
  Projection weights;           // of lead [G]; input_scale [G]
  void* out;                    // bf16 or f32 [T, N]
};

// What the shapes of the operands and the result of a call that makes parcels say.
struct ParcelSizes {
  int64_t num_tokens;   // T
  int64_t top_k;        // K
  int64_t hidden_size;  // H
};

}  // namespace jax_moe

#endif  // JAX_MOE_PROBLEM_H_
