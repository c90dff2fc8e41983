// Sixteen float lanes, whatever the width of the machine's vectors, and the two operations on NVFP4 blocks that are
// worth intrinsics. Included once per instruction set (kernels.cc), hence the `static inline`s.
//
// Every instruction set gives the same bits. A weight has 6 significant bits and an activation 8, so a product is exact
// in fp32 and a fused multiply-add equals a multiply and an add; and all sum the same 16 lanes in the same order.

#ifndef JAX_MOE_CPU_SIMD_H_
#define JAX_MOE_CPU_SIMD_H_

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "nvfp4.h"

namespace jax_moe {

constexpr int kLanes = kBlockSize;
#if defined(__AVX512F__)
constexpr int kNativeLanes = 16;
#elif defined(__AVX2__)
constexpr int kNativeLanes = 8;
#else
constexpr int kNativeLanes = 4;
#endif
constexpr int kParts = kLanes / kNativeLanes;

typedef float Native __attribute__((vector_size(sizeof(float) * kNativeLanes)));

struct Lanes {
  Native part[kParts];
};

static inline Lanes Load(const float* from) {
  Lanes lanes;
  memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

static inline void Store(float* to, const Lanes& lanes) { memcpy(to, &lanes, sizeof(lanes)); }

static inline Native MultiplyAdd(Native a, Native b, Native c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// Eight bytes of payload to the sixteen values they stand for, times their block scale.
static inline Lanes DequantizeBlock(const uint8_t* payload, float scale) {
  Lanes lanes;
#if defined(__AVX512F__)
  // Lane i wants nibble i: give lanes 0-7 the low word and lanes 8-15 the high one, and shift each by its own amount.
  // The permute looks at 4 bits of each lane, which are the code.
  const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,  //
                                       -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  int32_t words[2];
  memcpy(words, payload, sizeof(words));
  const __m512i codes =
      _mm512_srlv_epi32(_mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xFF00, words[1]), shifts);
  lanes.part[0] = _mm512_permutexvar_ps(codes, values) * _mm512_set1_ps(scale);
#elif defined(__AVX2__)
  // As above with the magnitudes alone (the permute looks at 3 bits here); bit 3 is moved to the sign.
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  const __m256i sign_bit = _mm256_set1_epi32(INT32_MIN);
  int32_t words[2];
  memcpy(words, payload, sizeof(words));
  for (int i = 0; i < kParts; ++i) {
    const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(words[i]), shifts);
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28), sign_bit);
    const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, codes);
    lanes.part[i] = _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign)) * _mm256_set1_ps(scale);
  }
#else
  float values[kLanes];
  for (int i = 0; i < kLanes / 2; ++i) {
    values[2 * i] = E2M1ToFloat(payload[i] & 0xF) * scale;
    values[2 * i + 1] = E2M1ToFloat(payload[i] >> 4) * scale;
  }
  lanes = Load(values);
#endif
  return lanes;
}

// The sum of the sixteen lanes: halves onto each other, 8 + 8, 4 + 4, 2 + 2, 1 + 1, on every instruction set.
static inline float SumLanes(const Lanes& lanes) {
  float sums[kLanes];
  Store(sums, lanes);
  for (int width = kLanes / 2; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

}  // namespace jax_moe

#endif  // JAX_MOE_CPU_SIMD_H_
