// Which of the compiled kernels run on this machine.

#ifndef JAX_MOE_CPU_CHOOSE_KERNELS_H_
#define JAX_MOE_CPU_CHOOSE_KERNELS_H_

#include "cpu/kernels.h"

namespace jax_moe {

// The best kernels that this machine can run, or those that JAX_MOE_CPU_KERNELS asks for (tests do); chosen once.
const Kernels& ChooseKernels();

}  // namespace jax_moe

#endif  // JAX_MOE_CPU_CHOOSE_KERNELS_H_
