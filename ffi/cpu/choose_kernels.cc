#include "cpu/choose_kernels.h"

#include <cstdlib>
#include <string_view>

#if defined(JAX_MOE_X86_VARIANTS)
#include "cpu/x86_features.h"
#endif

namespace jax_moe {

const Kernels& ChooseKernels() {
  static const Kernels* const chosen = [] {
#if defined(JAX_MOE_X86_VARIANTS)
    const char* const value = std::getenv("JAX_MOE_CPU_KERNELS");
    const std::string_view wanted = value == nullptr ? "" : value;
    // The features tested are exactly those that CMakeLists.txt compiles for.
    const X86Features can = GetX86Features();
    if (can.avx512 && (wanted.empty() || wanted == "avx512")) return &kKernelsAvx512;
    if (can.avx2 && (wanted.empty() || wanted == "avx2")) return &kKernelsAvx2;
#endif
    return &kKernelsBaseline;
  }();
  return *chosen;
}

}  // namespace jax_moe
