// Operations between the lanes of a warp.

#include <bit>

#include "accesses.h"
#include "barriers.h"
#include "step.h"

namespace emulator {
namespace {

// Whether the lanes that the mask operand names are all here; if not, the step waits for them.
bool Gather(Step& step, const Operand& operand, uint32_t* members) {
  *members = Uniform<uint32_t>(step, operand, "a mask of lanes");
  if ((step.mask & ~*members) != 0) throw Error("a lane executes this that its mask does not name");
  return Machine::Converged(step, *members);
}

enum class Direction { kIndex, kButterfly, kUp, kDown };

template <Direction direction>
Outcome Shuffle(Step& step) {
  uint32_t members;
  if (!Gather(step, OperandAt(step, 4), &members)) return Outcome::kBlocked;
  const Operand& result = OperandAt(step, 0);
  const bool has_predicate = result.kind == OperandKind::kVector;
  Row<uint32_t> a, b, c, values;
  const uint32_t* source = Source<uint32_t>(step, OperandAt(step, 1), &a);
  const uint32_t* index = Source<uint32_t>(step, OperandAt(step, 2), &b);
  const uint32_t* control = Source<uint32_t>(step, OperandAt(step, 3), &c);
  const uint32_t source_poison = PoisonOf(step, OperandAt(step, 1));
  NeedKnown(step, OperandAt(step, 2), "the lane of a shuffle");
  uint32_t poison = 0, in_range = 0;
  ForLanes(step.mask, [&](int lane) {
    const int clamp = static_cast<int>(control[lane] & 31), segment = static_cast<int>(control[lane] >> 8 & 31);
    const int last = (lane & segment) | (clamp & ~segment), by = static_cast<int>(index[lane] & 31);
    int from = direction == Direction::kIndex       ? (lane & segment) | (by & ~segment)
               : direction == Direction::kButterfly ? lane ^ by
               : direction == Direction::kUp        ? lane - by
                                                    : lane + by;
    const bool valid = direction == Direction::kUp ? from >= last : from <= last;
    if (valid) in_range |= 1u << lane;
    if (!valid) from = lane;
    values.lane[lane] = source[from];
    if (!(step.mask >> from & 1) || source_poison >> from & 1) poison |= 1u << lane;
  });
  const Operand& value = has_predicate ? result.items[0] : result;
  if (value.kind != OperandKind::kNone) {
    uint32_t* target = Target<uint32_t>(step, value);
    ForLanes(step.mask, [&](int lane) { target[lane] = values.lane[lane]; });
    SetPoison(step, value, poison);
  }
  if (has_predicate && result.items[1].kind != OperandKind::kNone) SetBits(step, result.items[1], in_range, 0);
  return Outcome::kNext;
}

Outcome MatchAny(Step& step) {
  uint32_t members;
  if (!Gather(step, OperandAt(step, 2), &members)) return Outcome::kBlocked;
  Row<uint32_t> scratch, matches;
  const uint32_t* values = Source<uint32_t>(step, OperandAt(step, 1), &scratch);
  const uint32_t poison = PoisonOf(step, OperandAt(step, 1)) != 0 ? kAllLanes : 0;
  ForLanes(step.mask, [&](int lane) {
    matches.lane[lane] = 0;
    ForLanes(step.mask, [&](int other) {
      if (values[other] == values[lane]) matches.lane[lane] |= 1u << other;
    });
  });
  uint32_t* target = Target<uint32_t>(step, OperandAt(step, 0));
  ForLanes(step.mask, [&](int lane) { target[lane] = matches.lane[lane]; });
  SetPoison(step, OperandAt(step, 0), poison);
  return Outcome::kNext;
}

enum class Vote { kAny, kAll, kBallot };

template <Vote vote>
Outcome VoteOf(Step& step) {
  uint32_t members;
  if (!Gather(step, OperandAt(step, 2), &members)) return Outcome::kBlocked;
  const uint32_t bits = Bits(step, OperandAt(step, 1)) & step.mask;
  const uint32_t poison = PoisonOf(step, OperandAt(step, 1)) != 0 ? kAllLanes : 0;
  if constexpr (vote == Vote::kBallot) {
    uint32_t* target = Target<uint32_t>(step, OperandAt(step, 0));
    ForLanes(step.mask, [&](int lane) { target[lane] = bits; });
    SetPoison(step, OperandAt(step, 0), poison);
  } else {
    const bool holds = vote == Vote::kAny ? bits != 0 : bits == step.mask;
    SetBits(step, OperandAt(step, 0), holds ? kAllLanes : 0, poison);
  }
  return Outcome::kNext;
}

Outcome Elect(Step& step) {
  uint32_t members;
  if (!Gather(step, OperandAt(step, 1), &members)) return Outcome::kBlocked;
  // The same lane each time; which one is the machine's choice.
  const int wanted = step.machine.elected_lane();
  const int leader = step.mask >> wanted & 1 ? wanted : std::countr_zero(step.mask);
  const Operand& pair = OperandAt(step, 0);
  if (pair.items.size() != 2) throw Error("elect.sync without a predicate");
  if (pair.items[0].kind != OperandKind::kNone) {
    uint32_t* target = Target<uint32_t>(step, pair.items[0]);
    ForLanes(step.mask, [&](int lane) { target[lane] = static_cast<uint32_t>(leader); });
    SetPoison(step, pair.items[0], 0);
  }
  SetBits(step, pair.items[1], 1u << leader, 0);
  return Outcome::kNext;
}

Outcome SyncWarp(Step& step) {
  uint32_t members;
  if (!Gather(step, OperandAt(step, 0), &members)) return Outcome::kBlocked;
  if (step.machine.checker() && IsWhole(step)) Synchronised(&step.warp);
  return Outcome::kNext;
}

}  // namespace

void RegisterWarpOperations() {
  Register("shfl.sync.idx.b32", Shuffle<Direction::kIndex>);
  Register("shfl.sync.bfly.b32", Shuffle<Direction::kButterfly>);
  Register("shfl.sync.up.b32", Shuffle<Direction::kUp>);
  Register("shfl.sync.down.b32", Shuffle<Direction::kDown>);
  Register("match.any.sync.b32", MatchAny);
  Register("vote.sync.any.pred", VoteOf<Vote::kAny>);
  Register("vote.sync.all.pred", VoteOf<Vote::kAll>);
  Register("vote.sync.ballot.b32", VoteOf<Vote::kBallot>);
  Register("elect.sync", Elect);
  Register("bar.warp.sync", SyncWarp);
}

}  // namespace emulator
