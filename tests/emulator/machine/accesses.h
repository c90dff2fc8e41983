// Reading and writing of memory by handlers and asynchronous operations: marks, and the checker.

#ifndef JAX_MOE_EMULATOR_ACCESSES_H_
#define JAX_MOE_EMULATOR_ACCESSES_H_

#include <cstring>

#include "step.h"

namespace emulator {

// Whether all lanes of the warp execute the step.
inline bool IsWhole(const Step& step) { return (step.mask & step.warp.live) == step.warp.live; }

// The actor that a warp is itself.
inline Actor ActorOf(const Step& step, Access access = Access::kGeneric) {
  const Warp& warp = step.warp;
  if (warp.component < 0) return {};
  const int component = IsWhole(step) ? warp.component : warp.lanes_component;
  return {component,
          warp.view.knowledge.seen[static_cast<size_t>(component)],
          access,
          warp.component,
          warp.lanes_component,
          &step.instruction};
}

inline void Touch(Machine& machine, const Place& place, int64_t bytes, bool writes, const Actor& actor,
                  const View& view) {
  if (Checker* checker = machine.checker()) checker->Touch(place, bytes, writes, actor, view);
}

// Where the run checks that: that all bytes of a place in global memory were written.
inline void NeedWritten(Machine& machine, const Place& place, int64_t bytes) {
  if (!machine.options().check_written || place.space != Space::kGlobal) return;
  for (int64_t i = 0; i < bytes; ++i) {
    if (place.marks[i] & kPoison) {
      throw Error("reads what nobody has written: " + machine.memory().buffer(place.owner).name + " at byte " +
                  std::to_string(place.offset + i));
    }
  }
}

// Copies bytes out; whether any of them is poison.
inline bool ReadBytes(const Place& place, int64_t bytes, void* out) {
  std::memcpy(out, place.data, static_cast<size_t>(bytes));
  uint8_t marks = 0;
  for (int64_t i = 0; i < bytes; ++i) marks |= place.marks[i];
  if (marks & kBarrierByte)
    throw Error("reads an mbarrier as if it were memory, at " + Hex(static_cast<uint64_t>(place.offset)));
  return marks != 0;
}

inline void MarkBytes(Machine& machine, const Place& place, int64_t bytes, bool poison) {
  for (int64_t i = 0; i < bytes; ++i) {
    if (place.marks[i] & kBarrierByte) {
      throw Error("writes over the mbarrier at " + Hex(static_cast<uint64_t>(place.offset + i)));
    }
  }
  if (poison && place.space == Space::kGlobal && machine.memory().buffer(place.owner).strict) {
    throw Error("stores poison to " + machine.memory().buffer(place.owner).name + " at " +
                std::to_string(place.offset));
  }
  std::memset(place.marks, poison ? kPoison : kWritten, static_cast<size_t>(bytes));
}

inline void WriteBytes(Machine& machine, const Place& place, int64_t bytes, const void* value, bool poison) {
  MarkBytes(machine, place, bytes, poison);
  std::memcpy(place.data, value, static_cast<size_t>(bytes));
}

// Copies bytes with their marks.
inline void CopyBytes(Machine& machine, const Place& from, const Place& to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) {
    if ((from.marks[i] | to.marks[i]) & kBarrierByte) throw Error("copies over an mbarrier");
    if (from.marks[i] && to.space == Space::kGlobal && machine.memory().buffer(to.owner).strict) {
      throw Error("copies poison to " + machine.memory().buffer(to.owner).name);
    }
  }
  std::memcpy(to.data, from.data, static_cast<size_t>(bytes));
  std::memcpy(to.marks, from.marks, static_cast<size_t>(bytes));
}

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_ACCESSES_H_
