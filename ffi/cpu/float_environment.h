// IEEE arithmetic for the length of a scope: round to nearest, subnormals kept.
//
// XLA switches flush-to-zero on for some of its threads and not for others, and our results must not depend on which
// thread computed them.

#ifndef JAX_MOE_CPU_FLOAT_ENVIRONMENT_H_
#define JAX_MOE_CPU_FLOAT_ENVIRONMENT_H_

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace jax_moe {

class IeeeScope {
 public:
  IeeeScope() : saved_(Get()) { Set(kIeee); }
  ~IeeeScope() { Set(saved_); }
  IeeeScope(const IeeeScope&) = delete;
  IeeeScope& operator=(const IeeeScope&) = delete;

 private:
#if defined(__x86_64__)
  using Control = unsigned;
  static constexpr Control kIeee = 0x1F80;  // all exceptions masked, the power-on state
  static Control Get() { return _mm_getcsr(); }
  static void Set(Control control) { _mm_setcsr(control); }
#elif defined(__aarch64__)
  using Control = uint64_t;
  static constexpr Control kIeee = 0;
  static Control Get() {
    Control control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    return control;
  }
  static void Set(Control control) { asm volatile("msr fpcr, %0" : : "r"(control)); }
#else
  using Control = int;
  static constexpr Control kIeee = 0;
  static Control Get() { return 0; }
  static void Set(Control) {}
#endif

  Control saved_;
};

}  // namespace jax_moe

#endif  // JAX_MOE_CPU_FLOAT_ENVIRONMENT_H_
