// Sixteen float lanes, whatever the width of the machine's vectors, and the two operations on NVFP4 blocks that are
// worth intrinsics. Included once per instruction set (kernels.cc), hence the `static inline`s.
//
// Every instruction set gives the same bits. A weight has 6 significant bits and an activation 8, so a product is exact
// in fp32, unless it leaves fp32's range, and a fused multiply-add equals a multiply and an add; and all sum the same
// 16 lanes in the same order.

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
typedef float UnalignedNative __attribute__((vector_size(sizeof(float) * kNativeLanes), aligned(4), may_alias));

struct Lanes {
  Native part[kParts];
};

static inline Native LoadNative(const float* from) { return *reinterpret_cast<const UnalignedNative*>(from); }

static inline void Store(float* to, const Lanes& lanes) {
  for (int i = 0; i < kParts; ++i) *reinterpret_cast<UnalignedNative*>(to + i * kNativeLanes) = lanes.part[i];
}

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

// Keeps the compiler from loading this vector again for every use: it would rather have memory operands, and the load
// ports would become the limit.
static inline void KeepInRegister(Native* vector) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  asm("" : "+v"(*vector));
#else
  asm("" : "+x"(*vector));
#endif
#else
  (void)vector;
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
  const __m512i low = _mm512_broadcastd_epi32(_mm_loadu_si32(payload));
  const __m512i words = _mm512_mask_broadcastd_epi32(low, 0xFF00, _mm_loadu_si32(payload + 4));
  const __m512i codes = _mm512_srlv_epi32(words, shifts);
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
  memcpy(&lanes, values, sizeof(lanes));
#endif
  return lanes;
}

// The sum of the sixteen lanes: halves onto each other, 8 + 8, 4 + 4, 2 + 2, 1 + 1. Every instruction set keeps this
// order.
static inline float SumLanes(Lanes lanes) {
  typedef float Quad __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  const __m256 eight = _mm512_castps512_ps256(lanes.part[0]) + _mm512_extractf32x8_ps(lanes.part[0], 1);
  const Quad four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#elif defined(__AVX2__)
  const __m256 eight = lanes.part[0] + lanes.part[1];
  const Quad four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#else
  const Quad four = (lanes.part[0] + lanes.part[2]) + (lanes.part[1] + lanes.part[3]);
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// sums[r] += the sum of rows[r]'s lanes.
template <int kRows>
static inline void AddSumOfLanes(const Lanes (&rows)[kRows], float* sums) {
#if defined(__AVX512F__)
  // Two vectors a step: half of each moves onto the other half, so that no lane is ever idle.
  static_assert(kRows == 8);
  const auto fold8 = [](__m512 a, __m512 b) {
    return _mm512_mask_blend_ps(0xFF00, a, b) + _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(1, 0, 3, 2));
  };
  const auto fold4 = [](__m512 a, __m512 b) {
    const __m512i crossed = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
    return _mm512_mask_blend_ps(0xF0F0, a, b) + _mm512_permutex2var_ps(a, crossed, b);
  };
  const auto fold2 = [](__m512 a, __m512 b) {
    const __m512d crossed = _mm512_shuffle_pd(_mm512_castps_pd(a), _mm512_castps_pd(b), 0x55);
    return _mm512_mask_blend_ps(0xCCCC, a, b) + _mm512_castpd_ps(crossed);
  };
  const __m512 even = fold4(fold8(rows[0].part[0], rows[4].part[0]), fold8(rows[2].part[0], rows[6].part[0]));
  const __m512 odd = fold4(fold8(rows[1].part[0], rows[5].part[0]), fold8(rows[3].part[0], rows[7].part[0]));
  const __m512 pairs = fold2(even, odd);  // rows 0 1 2 3 4 5 6 7, two lanes each
  const __m512 doubled = pairs + _mm512_permute_ps(pairs, _MM_SHUFFLE(2, 3, 0, 1));
  const __m512i every_other = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m256 totals = _mm512_castps512_ps256(_mm512_permutexvar_ps(every_other, doubled));
  _mm256_storeu_ps(sums, _mm256_loadu_ps(sums) + totals);
#else
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sums[r] += SumLanes(rows[r]);
#endif
}

}  // namespace jax_moe

#endif  // JAX_MOE_CPU_SIMD_H_
