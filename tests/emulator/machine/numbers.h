// The number formats of the tensor cores, as their bits and as doubles.

#ifndef JAX_MOE_EMULATOR_NUMBERS_H_
#define JAX_MOE_EMULATOR_NUMBERS_H_

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace emulator {

constexpr uint32_t kNan = 0x7FFFFFFF;  // what operations give

inline float Float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t BitsOf(float value) { return std::bit_cast<uint32_t>(value); }
inline float Canonical(float value) { return value == value ? value : Float(kNan); }
inline float Flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

// A format with a sign, `mantissa` bits and subnormals; the smallest normal number is 2**least.
struct Format {
  int mantissa, least;
  double most;    // the largest finite number
  bool infinite;  // what is beyond becomes infinity, not `most`
};
constexpr Format kBf16{7, -126, 0x1.FEp127, true};
constexpr Format kF16{10, -14, 65504.0, true};
constexpr Format kE4m3{3, -6, 448.0, false};
constexpr Format kE2m1{1, 0, 6.0, false};

// The number's bits without its sign, rounded to nearest even; it is not NaN.
inline uint32_t Magnitude(double value, const Format& format) {
  value = std::fabs(value);
  const int infinity = (static_cast<int>(format.least) < -100 ? 255 : 31) << format.mantissa;
  if (std::isinf(value) && format.infinite) return static_cast<uint32_t>(infinity);
  int exponent = value == 0 ? format.least : std::max(format.least, std::ilogb(std::fmin(value, format.most)));
  double quotient = std::nearbyint(std::ldexp(std::fmin(value, 2 * format.most), format.mantissa - exponent));
  if (quotient >= std::ldexp(1.0, format.mantissa + 1)) quotient /= 2, ++exponent;
  if (std::ldexp(quotient, exponent - format.mantissa) > format.most) {
    if (format.infinite) return static_cast<uint32_t>(infinity);
    return Magnitude(format.most, format);
  }
  const int one = 1 << format.mantissa, q = static_cast<int>(quotient);
  return static_cast<uint32_t>(q < one ? q : ((exponent - format.least + 1) << format.mantissa) + (q - one));
}

inline uint32_t ToBf16(double value) {
  if (std::isnan(value)) return 0x7FFF;
  return Magnitude(value, kBf16) | (std::signbit(value) ? 0x8000u : 0u);
}
inline uint32_t FloatToBf16(float value) {  // the same; bf16 has float's exponents
  if (value != value) return 0x7FFF;
  const uint32_t bits = BitsOf(value);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t ToF16(double value) {
  if (std::isnan(value)) return 0x7FFF;
  return Magnitude(value, kF16) | (std::signbit(value) ? 0x8000u : 0u);
}
inline uint32_t ToE4m3(double value) {  // beyond 448: 448
  if (std::isnan(value)) return 0x7F;
  return Magnitude(value, kE4m3) | (std::signbit(value) ? 0x80u : 0u);
}
inline uint32_t ToE2m1(double value) {  // beyond 6: 6; NaN is 6 too
  if (std::isnan(value)) return 7;
  return Magnitude(value, kE2m1) | (std::signbit(value) ? 8u : 0u);
}

inline float FromBf16(uint32_t bits) { return Float(bits << 16); }
inline float FromE4m3(uint32_t bits) {
  static const std::array<float, 128> magnitudes = [] {
    std::array<float, 128> table{};
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      table[static_cast<size_t>(code)] = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                                       : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    }
    table[127] = Float(kNan);
    return table;
  }();
  const float magnitude = magnitudes[bits & 0x7F];
  return bits & 0x80 && magnitude == magnitude ? -magnitude : magnitude;
}
inline float FromE2m1(uint32_t bits) {
  constexpr float kValues[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  return kValues[bits & 15];
}
inline float FromF16(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : Float(kNan);
  return bits & 0x8000 ? -value : value;
}

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_NUMBERS_H_
