// Conversions between numbers, and between address spaces.

#include <cmath>
#include <limits>

#include "numbers.h"
#include "step.h"

namespace emulator {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;
using f32 = float;

struct Integer {
  const char* name;
  int bits;
  bool is_signed;
};
constexpr Integer kIntegers[] = {{"s8", 8, true},   {"u8", 8, false},   {"s16", 16, true}, {"u16", 16, false},
                                 {"s32", 32, true}, {"u32", 32, false}, {"s64", 64, true}, {"u64", 64, false}};

template <int bits, bool is_signed>
u64 Extend(u64 value) {
  constexpr int kUnused = 64 - bits;
  value <<= kUnused;
  return is_signed ? static_cast<u64>(static_cast<int64_t>(value) >> kUnused) : value >> kUnused;
}

// The value of the source's type, as a pattern of the target's; a wider register gets the target's sign.
template <int from, bool from_signed, int to, bool to_signed>
Handler Resized() {
  using From = std::conditional_t<from == 64, u64, u32>;
  using To = std::conditional_t<to == 64, u64, u32>;
  return Elementwise<To, From>([](From value) {
    const u64 wide = Extend<to, to_signed>(Extend<from, from_signed>(value));
    return static_cast<To>(to < 32 ? wide & 0xFFFF : wide);  // what is narrower than 32 bits lies in 16
  });
}

template <size_t I>
void RegisterResized() {
  constexpr size_t kTo = I / 8, kFrom = I % 8;
  constexpr Integer to = kIntegers[kTo], from = kIntegers[kFrom];
  if constexpr (kTo != kFrom) {
    Register(std::string("cvt.") + to.name + "." + from.name,
             Resized<from.bits, from.is_signed, to.bits, to.is_signed>());
  }
  if constexpr (I + 1 < 64) RegisterResized<I + 1>();
}

template <typename T>
T Saturated(double value) {  // what is rounded already; NaN is 0
  if (std::isnan(value)) return 0;
  const double least = static_cast<double>(std::numeric_limits<T>::min());
  if (value <= least) return std::numeric_limits<T>::min();
  if (value >= static_cast<double>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(value);
}

template <typename T>
void RegisterIntegerFloat(const std::string& type) {
  Register("cvt.rn.f32." + type, Elementwise<f32, T>([](T a) { return static_cast<f32>(a); }));
  Register("cvt.rzi." + type + ".f32", Elementwise<T, f32>([](f32 a) { return Saturated<T>(std::trunc(a)); }));
  Register("cvt.rni." + type + ".f32", Elementwise<T, f32>([](f32 a) { return Saturated<T>(std::nearbyint(a)); }));
  Register("cvt.rmi." + type + ".f32", Elementwise<T, f32>([](f32 a) { return Saturated<T>(std::floor(a)); }));
  Register("cvt.rpi." + type + ".f32", Elementwise<T, f32>([](f32 a) { return Saturated<T>(std::ceil(a)); }));
}

// Two codes of a byte, or of four bits each, as two halves.
u32 F16OfE4m3(u32 pair) { return ToF16(FromE4m3(pair & 0xFF)) | ToF16(FromE4m3(pair >> 8 & 0xFF)) << 16; }
u32 F16OfE2m1(u32 pair) { return ToF16(FromE2m1(pair & 15)) | ToF16(FromE2m1(pair >> 4 & 15)) << 16; }

// Windows of the generic address space: a buffer's addresses are their own, shared memory has one.
constexpr u64 kSharedWindow = u64{0x7F} << 56;

}  // namespace

void RegisterConversions() {
  RegisterResized<0>();
  RegisterIntegerFloat<int32_t>("s32");
  RegisterIntegerFloat<u32>("u32");
  Register("cvt.rn.bf16.f32", Elementwise<u32, f32>([](f32 a) { return FloatToBf16(a); }));
  Register("cvt.rn.f16.f32", Elementwise<u32, f32>([](f32 a) { return ToF16(a); }));
  Register("cvt.f32.bf16", Elementwise<f32, u32>([](u32 a) { return FromBf16(a & 0xFFFF); }));
  Register("cvt.f32.f16", Elementwise<f32, u32>([](u32 a) { return FromF16(a & 0xFFFF); }));
  // Of two sources the first is in the upper half.
  Register("cvt.rn.bf16x2.f32",
           Elementwise<u32, f32, f32>([](f32 a, f32 b) { return FloatToBf16(a) << 16 | FloatToBf16(b); }));
  Register("cvt.rn.f16x2.f32", Elementwise<u32, f32, f32>([](f32 a, f32 b) { return ToF16(a) << 16 | ToF16(b); }));
  Register("cvt.rn.satfinite.e4m3x2.f32",
           Elementwise<u32, f32, f32>([](f32 a, f32 b) { return ToE4m3(a) << 8 | ToE4m3(b); }));
  Register("cvt.rn.satfinite.e2m1x2.f32",
           Elementwise<u32, f32, f32>([](f32 a, f32 b) { return ToE2m1(a) << 4 | ToE2m1(b); }));
  Register("cvt.rn.f16x2.e4m3x2", Elementwise<u32, u32>([](u32 a) { return F16OfE4m3(a); }));
  Register("cvt.rn.f16x2.e2m1x2", Elementwise<u32, u32>([](u32 a) { return F16OfE2m1(a); }));
  Register("cvta.to.global.u64", Elementwise<u64, u64>([](u64 a) { return a; }));
  Register("cvta.global.u64", Elementwise<u64, u64>([](u64 a) { return a; }));
  Register("cvta.shared.u64", Elementwise<u64, u64>([](u64 a) { return a + kSharedWindow; }));
  Register("cvta.to.shared.u64", Elementwise<u64, u64>([](u64 a) { return a - kSharedWindow; }));
}

}  // namespace emulator
