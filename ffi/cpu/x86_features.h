// What this x86 CPU and its operating system can run. Asked of the CPU, because __builtin_cpu_supports asks the
// compiler's run-time library, and zig's answers no to everything.

#ifndef JAX_MOE_CPU_X86_FEATURES_H_
#define JAX_MOE_CPU_X86_FEATURES_H_

#include <cpuid.h>

#include <cstdint>

namespace jax_moe {

struct X86Features {
  bool avx2 = false;    // with FMA
  bool avx512 = false;  // F, BW, DQ and VL, with the above
};

inline X86Features GetX86Features() {
  const auto has = [](uint32_t word, int bit) { return (word >> bit & 1) != 0; };
  X86Features features;
  uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return features;
  const bool fma = has(c, 12), os_saves_registers = has(c, 27), avx = has(c, 28);
  if (!fma || !os_saves_registers || !avx) return features;

  // Which registers the operating system keeps when it switches threads: xmm and ymm; masks and both kinds of zmm.
  uint32_t saved, high;
  asm("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr uint32_t kYmm = 0x6, kZmm = 0xE6;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return features;
  features.avx2 = has(b, 5) && (saved & kYmm) == kYmm;
  features.avx512 = features.avx2 && has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31) && (saved & kZmm) == kZmm;
  return features;
}

}  // namespace jax_moe

#endif  // JAX_MOE_CPU_X86_FEATURES_H_
