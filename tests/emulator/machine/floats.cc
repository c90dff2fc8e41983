// Floating-point operations, correctly rounded where PTX says so. Approximate ones are rounded from the exact value,
// within the bound that PTX gives, so that their last bit may differ from a GPU's.

#include <cmath>

#include "numbers.h"
#include "step.h"

namespace emulator {
namespace {

using f32 = float;
using u32 = uint32_t;
using u64 = uint64_t;

f32 Maximum(f32 a, f32 b, bool nan) {
  if (a != a || b != b) return nan || (a != a && b != b) ? Float(kNan) : a != a ? b : a;
  if (a == b) return std::signbit(a) ? b : a;  // +0 is more than -0
  return a > b ? a : b;
}
f32 Minimum(f32 a, f32 b, bool nan) {
  if (a != a || b != b) return nan || (a != a && b != b) ? Float(kNan) : a != a ? b : a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}

f32 Reciprocal(f32 a) { return Canonical(1.0f / a); }
f32 ApproximateReciprocal(f32 a) { return Flushed(Canonical(static_cast<f32>(1.0 / static_cast<double>(Flushed(a))))); }
f32 ApproximateExp2(f32 a) { return Flushed(Canonical(static_cast<f32>(std::exp2(static_cast<double>(Flushed(a)))))); }
f32 ApproximateLog2(f32 a) { return Canonical(static_cast<f32>(std::log2(static_cast<double>(Flushed(a))))); }

u32 MultiplyBf16(f32 a, f32 b) {  // products are exact in a float, but for tiny ones, and in a double
  const f32 product = a * b;
  if (std::fabs(product) >= 0x1p-130f) return FloatToBf16(product);
  return ToBf16(static_cast<double>(a) * b);
}
u32 MultiplyBf16x2(u32 a, u32 b) {
  return MultiplyBf16(Float(a << 16), Float(b << 16)) | MultiplyBf16(Float(a & 0xFFFF0000), Float(b & 0xFFFF0000))
                                                            << 16;
}
u32 MultiplyF16x2(u32 a, u32 b) {
  u32 result = 0;
  for (int half = 0; half < 32; half += 16) {
    const double product = static_cast<double>(FromF16(a >> half & 0xFFFF)) * FromF16(b >> half & 0xFFFF);
    result |= ToF16(product) << half;
  }
  return result;
}

template <typename F>
u64 Twice(F f, u64 a, u64 b) {
  const auto low = [](u64 pair) { return Float(static_cast<u32>(pair)); };
  const auto high = [](u64 pair) { return Float(static_cast<u32>(pair >> 32)); };
  return u64{BitsOf(f(low(a), low(b)))} | u64{BitsOf(f(high(a), high(b)))} << 32;
}

f32 Add(f32 a, f32 b) { return Canonical(a + b); }
f32 Subtract(f32 a, f32 b) { return Canonical(a - b); }
f32 Multiply(f32 a, f32 b) { return Canonical(a * b); }
f32 Fma(f32 a, f32 b, f32 c) { return Canonical(std::fma(a, b, c)); }

}  // namespace

void RegisterFloats() {
  for (const std::string rounding : {"", ".rn"}) {  // without a name it is to nearest even too
    Register("add" + rounding + ".f32", Elementwise<f32, f32, f32>([](f32 a, f32 b) { return Add(a, b); }));
    Register("sub" + rounding + ".f32", Elementwise<f32, f32, f32>([](f32 a, f32 b) { return Subtract(a, b); }));
    Register("mul" + rounding + ".f32", Elementwise<f32, f32, f32>([](f32 a, f32 b) { return Multiply(a, b); }));
    Register("add" + rounding + ".ftz.f32",
             Elementwise<f32, f32, f32>([](f32 a, f32 b) { return Flushed(Add(Flushed(a), Flushed(b))); }));
    Register("mul" + rounding + ".ftz.f32",
             Elementwise<f32, f32, f32>([](f32 a, f32 b) { return Flushed(Multiply(Flushed(a), Flushed(b))); }));
  }
  for (const std::string rounding : {"", ".rn"}) {
    Register("add" + rounding + ".f32x2", Elementwise<u64, u64, u64>([](u64 a, u64 b) { return Twice(Add, a, b); }));
    Register("mul" + rounding + ".f32x2",
             Elementwise<u64, u64, u64>([](u64 a, u64 b) { return Twice(Multiply, a, b); }));
  }
  Register("fma.rn.f32", Elementwise<f32, f32, f32, f32>([](f32 a, f32 b, f32 c) { return Fma(a, b, c); }));
  Register("fma.rn.f32x2", Elementwise<u64, u64, u64, u64>([](u64 a, u64 b, u64 c) {
             const auto part = [](u64 pair, int i) { return Float(static_cast<u32>(pair >> (32 * i))); };
             u64 result = 0;
             for (int i = 0; i < 2; ++i) result |= u64{BitsOf(Fma(part(a, i), part(b, i), part(c, i)))} << (32 * i);
             return result;
           }));
  Register("div.rn.f32", Elementwise<f32, f32, f32>([](f32 a, f32 b) { return Canonical(a / b); }));
  Register("rcp.rn.f32", Elementwise<f32, f32>([](f32 a) { return Reciprocal(a); }));
  Register("sqrt.rn.f32", Elementwise<f32, f32>([](f32 a) { return Canonical(std::sqrt(a)); }));
  Register("rcp.approx.ftz.f32", Elementwise<f32, f32>([](f32 a) { return ApproximateReciprocal(a); }));
  Register("ex2.approx.ftz.f32", Elementwise<f32, f32>([](f32 a) { return ApproximateExp2(a); }));
  Register("lg2.approx.ftz.f32", Elementwise<f32, f32>([](f32 a) { return ApproximateLog2(a); }));
  Register("abs.f32", Elementwise<u32, u32>([](u32 a) { return a & 0x7FFFFFFF; }));
  Register("neg.f32", Elementwise<u32, u32>([](u32 a) { return a ^ 0x80000000; }));
  // The sign of the first, the magnitude of the second.
  Register("copysign.f32",
           Elementwise<u32, u32, u32>([](u32 a, u32 b) { return (a & 0x80000000) | (b & 0x7FFFFFFF); }));
  Register("max.f32", Elementwise<f32, f32, f32>([](f32 a, f32 b) { return Maximum(a, b, false); }));
  Register("min.f32", Elementwise<f32, f32, f32>([](f32 a, f32 b) { return Minimum(a, b, false); }));
  Register("max.NaN.f32", Elementwise<f32, f32, f32>([](f32 a, f32 b) { return Maximum(a, b, true); }));
  Register("min.NaN.f32", Elementwise<f32, f32, f32>([](f32 a, f32 b) { return Minimum(a, b, true); }));
  Register("mul.rn.bf16x2", Elementwise<u32, u32, u32>([](u32 a, u32 b) { return MultiplyBf16x2(a, b); }));
  Register("mul.rn.f16x2", Elementwise<u32, u32, u32>([](u32 a, u32 b) { return MultiplyF16x2(a, b); }));
}

}  // namespace emulator
