// One fused_moe call as both handlers see it: options, sizes and where the operands are.
//
// Nothing here depends on XLA or on a platform (the pointers are host or device pointers, as the platform has it);
// decode.h fills a Problem from a call frame and checks every size on the way.

#ifndef JAX_MOE_PROBLEM_H_
#define JAX_MOE_PROBLEM_H_

#include <cstdint>

namespace jax_moe {

enum class Precision { kW4A16, kW4A4 };
enum class Combine { kAtomic, kOrdered };
enum class WeightOn { kOutput, kInput };
enum class Activation { kSwiGLU, kGeGLU, kReLU2, kSiTU };

// What the attributes of a call say: the same on every run of a call site.
struct Options {
  Precision precision;
  Combine combine;
  WeightOn weight_on;
  Activation activation;
  float alpha, beta, limit;  // of the activation; see jax_moe/activations.py
  bool x_is_rounded;         // w4a4: x is code * block scale already, without the global scale
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
  bool operator==(const Sizes&) const = default;
};

// NVFP4 weights of one linear map of every local expert; `lead` is [L, P] for gate_up and [L] for down.
struct Projection {
  const uint8_t* payload;      // [*lead, N, C/2], two e2m1 codes to a byte, the even index in the low nibble
  const uint8_t* block_scale;  // [*lead, N, C/16], e4m3
  const float* global_scale;   // [*lead]
  const float* input_scale;    // [] for gate_up, [L] for down; null when absent
  const float* bias;           // [*lead, N]; null when absent
};

struct Problem : Options, Sizes {
  const uint16_t* x;             // bf16 [T, H]
  const int32_t* expert_ids;     // [T, K]
  const float* routing_weights;  // [T, K]
  const int32_t* expert_offset;  // []
  Projection gate_up;
  Projection down;
  void* out;  // bf16 or f32 [T, H]
};

}  // namespace jax_moe

#endif  // JAX_MOE_PROBLEM_H_
