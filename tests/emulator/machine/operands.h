// Operands of tensor cores in shared memory.

#ifndef JAX_MOE_EMULATOR_OPERANDS_H_
#define JAX_MOE_EMULATOR_OPERANDS_H_

#include <cstdint>

#include "accesses.h"

namespace emulator {

// The address of a byte of a row, K-major, with the 128-byte swizzle: rows of 128 bytes, 8 of them `stride` bytes.
inline uint64_t SwizzledAddress(uint64_t start, int row, int64_t byte, int64_t stride) {
  const uint64_t address = start + static_cast<uint64_t>((row / 8) * stride + row % 8 * 128 + byte);
  return address ^ (address >> 7 & 7) << 4;
}

// `chunks` pieces of 16 bytes of a row, in order, to `out`; whether any is poison.
inline bool ReadSwizzledRow(Machine& machine, Cta& cta, uint64_t start, int row, int64_t stride, int chunks,
                            const Actor& actor, const View& view, uint8_t* out) {
  bool poison = false;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const Place place = cta.shared.At(SwizzledAddress(start, row, 16 * chunk, stride), 16, 16);
    Touch(machine, place, 16, false, actor, view);
    poison |= ReadBytes(place, 16, out + 16 * chunk);
  }
  return poison;
}

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_OPERANDS_H_
