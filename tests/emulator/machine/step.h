// What handlers of operations are written with: operands of a step as rows of 32 lanes.

#ifndef JAX_MOE_EMULATOR_STEP_H_
#define JAX_MOE_EMULATOR_STEP_H_

#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace emulator {

template <typename T>
struct Row {
  alignas(32) T lane[kLanes];
};

template <typename F>
void ForLanes(uint32_t mask, F&& f) {
  for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
}

inline const Operand& OperandAt(const Step& step, size_t index) {
  if (index >= step.instruction.operands.size()) throw Error("an operand is missing");
  return step.instruction.operands[index];
}

// How many bytes a lane of a register's row has: 16-bit registers lie in 32 bits.
template <typename T>
constexpr int kRowBytes = sizeof(T) == 8 ? 8 : 4;

// A special register's value in a lane.
uint64_t SpecialValue(const Step& step, int64_t which, int lane);

inline uint32_t PoisonOf(Step& step, const Operand& operand) {
  return operand.reg >= 0 ? step.warp.Poison(step.machine, operand.reg) & step.mask : 0;
}

// The row of an operand that is read: of its register, or `scratch` filled with what it is. Floats are in 32 bits.
template <typename T>
const T* Source(Step& step, const Operand& operand, Row<T>* scratch) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (operand.kind == OperandKind::kRegister) {
    const bool fits = sizeof(T) == 8 ? operand.bytes == 8 : operand.bytes == 4 || operand.bytes == 2;
    if (!fits) throw Error("an operand's register has the wrong width");
    return reinterpret_cast<const T*>(step.warp.row(step.program, operand.reg));
  }
  if (operand.kind == OperandKind::kImmediate) {
    T value;
    std::memcpy(&value, &operand.value, sizeof(T));
    for (T& lane : scratch->lane) lane = value;
    return scratch->lane;
  }
  if (operand.kind == OperandKind::kSpecial) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t value = SpecialValue(step, operand.value, lane);
      std::memcpy(&scratch->lane[lane], &value, sizeof(T));
    }
    return scratch->lane;
  }
  throw Error("an operand is of no kind that can be read");
}

// A predicate as a bit for each lane; a constant is 0 or 1.
inline uint32_t Bits(Step& step, const Operand& operand) {
  if (operand.kind == OperandKind::kImmediate) return operand.value != 0 ? kAllLanes : 0;
  if (operand.kind != OperandKind::kRegister || operand.bytes != 1) throw Error("an operand is no predicate");
  const uint32_t bits = step.warp.predicates[static_cast<size_t>(operand.reg)];
  return operand.negated ? ~bits : bits;
}

// The row of a register that is written; lanes outside of step.mask must be left alone.
template <typename T>
T* Target(Step& step, const Operand& operand) {
  const bool fits = sizeof(T) == 8 ? operand.bytes == 8 : operand.bytes == 4 || operand.bytes == 2;
  if (operand.kind != OperandKind::kRegister || !fits) throw Error("a result's register has the wrong width");
  return reinterpret_cast<T*>(step.warp.row(step.program, operand.reg));
}

inline void SetPoison(Step& step, const Operand& operand, uint32_t poison) {
  uint32_t& old = step.warp.poison[static_cast<size_t>(operand.reg)];
  if (step.warp.in_flight[static_cast<size_t>(operand.reg)] != 0) {
    throw Error("a register is written that products in flight use");
  }
  old = (old & ~step.mask) | (poison & step.mask);
}

inline void SetBits(Step& step, const Operand& operand, uint32_t bits, uint32_t poison) {
  if (operand.kind != OperandKind::kRegister || operand.bytes != 1) throw Error("a result is no predicate");
  uint32_t& old = step.warp.predicates[static_cast<size_t>(operand.reg)];
  old = (old & ~step.mask) | (bits & step.mask);
  SetPoison(step, operand, poison);
}

// Throws if a value that decides what happens is poison.
inline void NeedKnown(Step& step, const Operand& operand, const char* what) {
  if (PoisonOf(step, operand) != 0) throw Error(std::string(what) + " is poison");
}

// Addresses of the active lanes: of the operand's base and offset.
inline void Addresses(Step& step, const Operand& operand, Row<uint64_t>* addresses) {
  if (operand.kind != OperandKind::kAddress) throw Error("an operand is no address");
  if (operand.reg < 0) {
    for (uint64_t& lane : addresses->lane) lane = static_cast<uint64_t>(operand.value);
    return;
  }
  NeedKnown(step, operand, "an address");
  const uint8_t* row = step.warp.row(step.program, operand.reg);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (operand.bytes == 8) {
      uint64_t base;
      std::memcpy(&base, row + 8 * lane, 8);
      addresses->lane[lane] = base + static_cast<uint64_t>(operand.value);
    } else {
      uint32_t base;
      std::memcpy(&base, row + 4 * lane, 4);
      addresses->lane[lane] = base + static_cast<uint32_t>(operand.value);
    }
  }
}

// A value that all active lanes must agree on.
template <typename T>
T Uniform(Step& step, const Operand& operand, const char* what) {
  NeedKnown(step, operand, what);
  Row<T> scratch;
  const T* row = Source<T>(step, operand, &scratch);
  const T value = row[__builtin_ctz(step.mask)];
  ForLanes(step.mask, [&](int lane) {
    if (row[lane] != value) throw Error(std::string(what) + " differs between the lanes");
  });
  return value;
}

inline uint64_t UniformAddress(Step& step, const Operand& operand) {
  Row<uint64_t> addresses;
  Addresses(step, operand, &addresses);
  const uint64_t value = addresses.lane[__builtin_ctz(step.mask)];
  ForLanes(step.mask, [&](int lane) {
    if (addresses.lane[lane] != value) throw Error("an address differs between the lanes");
  });
  return value;
}

// --- Elementwise operations ---------------------------------------------------------------------------------------

// A handler for result = f(sources...), each in its own lane; F is a stateless callable. R and A are 4 or 8 bytes.
template <typename R, typename... A, typename F>
Handler Elementwise(F) {
  return [](Step& step) {
    const auto run = [&step]<size_t... I>(std::index_sequence<I...>) {
      std::tuple<Row<A>...> scratch;
      const uint32_t poison = (PoisonOf(step, OperandAt(step, I + 1)) | ... | 0u);
      const std::tuple<const A*...> sources{Source<A>(step, OperandAt(step, I + 1), &std::get<I>(scratch))...};
      const Operand& result = OperandAt(step, 0);
      R* target = Target<R>(step, result);
      if (step.mask == kAllLanes) {
        for (int lane = 0; lane < kLanes; ++lane) target[lane] = F{}(std::get<I>(sources)[lane]...);
      } else {
        ForLanes(step.mask, [&](int lane) { target[lane] = F{}(std::get<I>(sources)[lane]...); });
      }
      SetPoison(step, result, poison);
    };
    run(std::make_index_sequence<sizeof...(A)>{});
    if (step.instruction.operands.size() != sizeof...(A) + 1) throw Error("operands: too many");
    return Outcome::kNext;
  };
}

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_STEP_H_
