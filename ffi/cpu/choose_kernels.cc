#include "cpu/choose_kernels.h"

#include <cstdlib>
#include <string_view>

namespace jax_moe {

const Kernels& ChooseKernels() {
  static const Kernels* const chosen = [] {
#if defined(JAX_MOE_X86_VARIANTS)
    const char* const value = std::getenv("JAX_MOE_CPU_KERNELS");
    const std::string_view wanted = value == nullptr ? "" : value;
    // The features tested are exactly those that CMakeLists.txt compiles for.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && (wanted.empty() || wanted == "avx512")) return &kKernelsAvx512;
    if (avx2 && (wanted.empty() || wanted == "avx2")) return &kKernelsAvx2;
#endif
    return &kKernelsBaseline;
  }();
  return *chosen;
}

}  // namespace jax_moe
