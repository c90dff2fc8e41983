#include "step.h"
namespace emulator {
void RegisterTensorMemory() {}
void RegisterTensorProducts() {}
}  // namespace emulator
