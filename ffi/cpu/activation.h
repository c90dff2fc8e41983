// The activation functions in fp32, written without branches so that loops over them vectorise.
//
// Only IEEE additions, multiplications and divisions, never contracted: every instruction set gives the same bits. Not
// the bits of jax's own exp and tanh, which differ between XLA versions too; the error against exact arithmetic is
// below 3 ulp, measured by tests/test_cpu_handler.py.

#ifndef JAX_MOE_CPU_ACTIVATION_H_
#define JAX_MOE_CPU_ACTIVATION_H_

#include <cstdint>

#include "nvfp4.h"
#include "problem.h"

namespace jax_moe {

// e^x: 2^n times a polynomial in the remainder. Saturates to 0 and infinity; NaN stays NaN.
static inline float Exp(float x) {
  x = x > 89.0f ? 89.0f : x;  // e^89 is infinite, e^-104 rounds to zero
  x = x < -104.0f ? -104.0f : x;
  constexpr float kRoundingMagic = 0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits
  const float shifted = x * 0x1.715476p0f + kRoundingMagic;
  const float n = shifted - kRoundingMagic;
  // ln 2 in two parts: n times the first has no rounding error, as it has 9 bits and |n| < 2^8.
  const float r = (x - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;
  float p = 0x1.a01a02p-13f;  // 1/7!, then 1/6! and so on: |r| <= ln(2)/2, so the next term is below half an ulp
  p = p * r + 0x1.6c16c2p-10f;
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  // 2^n in two factors, since it alone may be out of range when the product is not.
  const int32_t exponent = static_cast<int32_t>(BitsOf(shifted) - BitsOf(kRoundingMagic));
  const int32_t half = exponent >> 1;
  const float first = FloatOf(static_cast<uint32_t>(half + 127) << 23);
  const float second = FloatOf(static_cast<uint32_t>(exponent - half + 127) << 23);
  return p * first * second;
}

static inline float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }

static inline float Tanh(float x) {
  const float magnitude = FloatOf(BitsOf(x) & 0x7FFFFFFFu);
  const float far = 1.0f - 2.0f / (Exp(2.0f * magnitude) + 1.0f);
  // Near zero that would cancel: the odd Taylor series instead, x - x^3/3 + 2x^5/15 - ...
  const float square = x * x;
  float p = -0x1.7da364p-10f;
  p = p * square + 0x1.d6d3dp-9f;
  p = p * square + -0x1.226e36p-7f;
  p = p * square + 0x1.664f48p-6f;
  p = p * square + -0x1.ba1ba2p-5f;
  p = p * square + 0x1.111112p-3f;
  p = p * square + -0x1.555556p-2f;
  const float near = x + x * (square * p);
  const float signed_far = FloatOf(BitsOf(far) | (BitsOf(x) & 0x80000000u));
  return magnitude < 0.5f ? near : signed_far;
}

// result[i] for the 16 pre-activations of one block; `gate` is unused by the activations without one.
// A NaN input gives a NaN: the comparisons of the clamps are written so that they let it through.
static inline void Activate(const Problem& problem, const float* gate, const float* up, float* result) {
  const float alpha = problem.alpha, beta = problem.beta, limit = problem.limit;
  switch (problem.activation) {
    case Activation::kSwiGLU:
      for (int i = 0; i < kBlockSize; ++i) {
        const float g = gate[i] > limit ? limit : gate[i];
        float u = up[i] < -limit ? -limit : up[i];
        u = u > limit ? limit : u;
        result[i] = (u + beta) * (g * Sigmoid(alpha * g));
      }
      return;
    case Activation::kGeGLU:
      // (1 + tanh(t)) / 2 = sigmoid(2t), which does not cancel for negative t.
      for (int i = 0; i < kBlockSize; ++i) {
        const float g = gate[i];
        const float t = 0x1.988454p-1f * (g + 0x1.6e4e26p-5f * (g * g * g));  // sqrt(2/pi), 0.044715
        result[i] = g * Sigmoid(2.0f * t) * up[i];
      }
      return;
    case Activation::kReLU2:
      for (int i = 0; i < kBlockSize; ++i) {
        const float positive = up[i] < 0.0f ? 0.0f : up[i];
        result[i] = positive * positive;
      }
      return;
    case Activation::kSiTU:
      for (int i = 0; i < kBlockSize; ++i) {
        const float u = limit < __builtin_inff() ? limit * Tanh(up[i] / limit) : up[i];
        result[i] = beta * Tanh(gate[i] / beta) * Sigmoid(gate[i]) * u;
      }
      return;
  }
  __builtin_unreachable();
}

}  // namespace jax_moe

#endif  // JAX_MOE_CPU_ACTIVATION_H_
