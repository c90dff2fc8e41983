// NVFP4 numerics, one scalar at a time: e2m1 codes, e4m3 block scales, bfloat16.
//
// Bit exact with jax_moe/nvfp4.py; tests/test_cpu_handler.py compares the two over every code and over random and
// special values. The compiler vectorises the loops over a block, so they are written without branches.
//
// Everything is `static inline`: these functions are compiled several times for different instruction sets, and with
// ordinary `inline` the linker would be free to keep the AVX-512 copy for all of them.

#ifndef JAX_MOE_NVFP4_H_
#define JAX_MOE_NVFP4_H_

#include <cstdint>

namespace jax_moe {

constexpr int kBlockSize = 16;  // values that share one block scale
constexpr float kE2M1Max = 6.0f;
constexpr float kE4M3Max = 448.0f;
constexpr uint8_t kE4M3NaN = 0x7F;

static inline uint32_t BitsOf(float value) { return __builtin_bit_cast(uint32_t, value); }
static inline float FloatOf(uint32_t bits) { return __builtin_bit_cast(float, bits); }
static inline bool IsNaN(float value) { return (BitsOf(value) & 0x7FFFFFFFu) > 0x7F800000u; }

static inline float BF16ToFloat(uint16_t bits) { return FloatOf(uint32_t{bits} << 16); }

// The nearest bfloat16, ties to even, as a float; a NaN stays a (quiet) NaN.
static inline float RoundToBF16(float value) {
  const uint32_t bits = BitsOf(value);
  const uint32_t rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
  return FloatOf((IsNaN(value) ? bits | 0x400000u : rounded) & 0xFFFF0000u);
}

static inline uint16_t BF16FromFloat(float value) { return static_cast<uint16_t>(BitsOf(RoundToBF16(value)) >> 16); }

// Rounds to nearest even, saturates at +-6. A NaN becomes a zero of the opposite sign, as an ml_dtypes cast gives.
static inline uint8_t E2M1FromFloat(float value) {
  const float magnitude = FloatOf(BitsOf(value) & 0x7FFFFFFFu);
  // The code of a magnitude is the number of rounding boundaries below it; a tie belongs to the even code.
  const uint32_t code = uint32_t{magnitude > 0.25f} + uint32_t{magnitude >= 0.75f} + uint32_t{magnitude > 1.25f} +
                        uint32_t{magnitude >= 1.75f} + uint32_t{magnitude > 2.5f} + uint32_t{magnitude >= 3.5f} +
                        uint32_t{magnitude > 5.0f};
  const uint32_t negative = (BitsOf(value) >> 31) ^ uint32_t { IsNaN(value) };
  return static_cast<uint8_t>(code | negative << 3);
}

static inline float E2M1ToFloat(uint8_t code) {
  constexpr float kValues[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                 -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  return kValues[code & 0xF];
}

// Rounds to nearest even; NaN above 464, where the e4m3fn range ends.
static inline uint8_t E4M3FromFloat(float value) {
  const uint8_t sign = static_cast<uint8_t>(BitsOf(value) >> 24 & 0x80u);
  const float magnitude = FloatOf(BitsOf(value) & 0x7FFFFFFFu);
  if (!(magnitude <= 464.0f)) return sign | kE4M3NaN;
  if (magnitude < 0x1p-6f) {
    // Subnormals are multiples of 2^-9. Adding 2^14 makes that the last place of the sum, so the addition rounds.
    return sign | static_cast<uint8_t>(BitsOf(magnitude + 0x1p14f) - BitsOf(0x1p14f));
  }
  constexpr uint32_t kDropped = 20;               // mantissa bits of a float below those of an e4m3
  constexpr uint32_t kRebias = (127u - 7u) << 3;  // exponent bias, in units of an e4m3 exponent
  const uint32_t bits = BitsOf(magnitude);
  const uint32_t rounded = bits + (1u << (kDropped - 1)) - 1u + (bits >> kDropped & 1u);
  return sign | static_cast<uint8_t>((rounded >> kDropped) - kRebias);
}

static constexpr float E4M3ToFloat(uint8_t code) {
  const int exponent = code >> 3 & 0xF;
  const int mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return code & 0x80 ? -__builtin_nanf("") : __builtin_nanf("");
  float magnitude = exponent == 0 ? static_cast<float>(mantissa) : static_cast<float>(8 + mantissa);
  for (int e = exponent == 0 ? 1 : exponent; e < 10; ++e) magnitude *= 0.5f;
  for (int e = 10; e < exponent; ++e) magnitude *= 2.0f;
  return code & 0x80 ? -magnitude : magnitude;
}

// The global scale of a row whose largest magnitude is `amax`, which may be NaN or infinite; the rule is that of
// jax_moe.nvfp4.row_scale.
static inline float RowScale(float amax) {
  constexpr float kLeast = 0x1p-64f;
  const float scale = amax / (kE2M1Max * kE4M3Max);
  return scale < kLeast ? kLeast : scale;
}

// The largest of the magnitudes of `count` values. They order like their bits, and a NaN is above every number: it
// wins, as it must.
static inline float LargestMagnitude(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = BitsOf(values[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return FloatOf(largest);
}

// Quantises a block under a global scale; the rules are those of jax_moe.nvfp4.quantize. Returns the e4m3 block scale.
static inline uint8_t QuantizeBlock(const float* values, float global_scale, uint8_t* codes) {
  const float ratio = LargestMagnitude(values, kBlockSize) / (kE2M1Max * global_scale);
  const uint8_t block_scale = E4M3FromFloat(ratio > kE4M3Max ? kE4M3Max : ratio);
  const float decoded = E4M3ToFloat(block_scale);
  const float inverse = 1.0f / (decoded * global_scale);
  const float nan = __builtin_nanf("");
  for (int i = 0; i < kBlockSize; ++i) {
    // The sign of a NaN product is the hardware's choice, and a code needs one: positive, unless the value was the NaN.
    const float product = values[i] * inverse;
    const uint8_t code = E2M1FromFloat(IsNaN(values[i]) ? values[i] : IsNaN(product) ? nan : product);
    codes[i] = decoded == 0.0f ? uint8_t{0} : code;
  }
  return block_scale;
}

}  // namespace jax_moe

#endif  // JAX_MOE_NVFP4_H_
