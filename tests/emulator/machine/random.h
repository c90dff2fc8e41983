// The source of all that the model leaves open.

#ifndef JAX_MOE_EMULATOR_RANDOM_H_
#define JAX_MOE_EMULATOR_RANDOM_H_

#include <cstddef>
#include <cstdint>

namespace emulator {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t Bits() {  // splitmix64
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  size_t Below(size_t end) { return static_cast<size_t>(Bits() % end); }
  bool OneIn(size_t n) { return Below(n) == 0; }

 private:
  uint64_t state_;
};

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_RANDOM_H_
