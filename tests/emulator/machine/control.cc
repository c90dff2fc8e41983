// Branches and ends, special registers, order between grids, and fences.

#include <algorithm>

#include "step.h"

namespace emulator {

uint64_t SpecialValue(const Step& step, int64_t which, int lane) {
  const Cta& cta = *step.warp.cta;
  const Grid& grid = *cta.grid;
  switch (which) {  // numbers are those of encode.py
    case 0:
      return static_cast<uint64_t>(step.warp.index * kLanes + lane);  // %tid.x
    case 1:
      return static_cast<uint64_t>(grid.threads);  // %ntid.x
    case 2:
      return static_cast<uint64_t>(cta.index);  // %ctaid.x
    case 3:
      return static_cast<uint64_t>(grid.ctas);  // %nctaid.x
    case 4:
      return static_cast<uint64_t>(lane);  // %laneid
    case 5:
      return static_cast<uint64_t>(step.warp.index);  // %warpid
    case 6:
      return static_cast<uint64_t>(cta.rank);  // %cluster_ctarank
    case 7:
      return static_cast<uint64_t>(grid.cluster);  // %cluster_nctarank
    case 8:
      return static_cast<uint64_t>(cta.home->index);  // %smid
    case 9:
      return 0;  // .y and .z of places
    case 10:
      return 1;  // .y and .z of sizes
    case 11:
      return uint32_t{1} << lane;  // %lanemask_eq
    case 12:
      return (uint32_t{1} << lane) - 1;  // %lanemask_lt
    case 13:
      return (uint32_t{2} << lane) - 1;  // %lanemask_le
    case 14:
      return ~((uint32_t{2} << lane) - 1);  // %lanemask_gt
    case 15:
      return ~((uint32_t{1} << lane) - 1);  // %lanemask_ge
    case 16:
      return static_cast<uint64_t>(cta.index / grid.cluster);  // %clusterid.x
    case 17:
      return static_cast<uint64_t>(grid.ctas / grid.cluster);  // %nclusterid.x
    default:
      throw Error("a special register that the emulator does not know");
  }
}

namespace {

Outcome Branch(Step& step) {
  const int target = static_cast<int>(OperandAt(step, 0).value);
  const uint32_t others = step.group.mask & ~step.mask;
  if (others == 0) {
    step.group.pc = target;
    return Outcome::kJumped;
  }
  step.group.mask = others;
  step.group.pc++;
  const uint32_t mask = step.mask;
  step.warp.groups.push_back({target, mask, {}});  // the last thing: step.group may have moved
  return Outcome::kJumped;
}

Outcome End(Step& step) {
  const uint32_t others = step.group.mask & ~step.mask;
  if (others != 0) {
    step.group.mask = others;
    step.group.pc++;
    return Outcome::kJumped;
  }
  auto& groups = step.warp.groups;
  groups.erase(groups.begin() + (&step.group - groups.data()));
  return Outcome::kJumped;
}

Outcome Trap(Step&) { throw Error("the kernel gives up"); }

Outcome Nothing(Step&) { return Outcome::kNext; }

Outcome WaitForPreceding(Step& step) {
  const Grid& grid = *step.warp.cta->grid;
  if (grid.number > 0) {
    const Grid* front = &step.machine.grids()[static_cast<size_t>(grid.number) - 1];
    if (!front->complete) {
      return Machine::Block(step, [front] { return front->complete; }, "the end of the grid in front");
    }
  }
  Knowledge& knowledge = step.warp.view.knowledge;
  knowledge.launches = std::max(knowledge.launches, grid.number - 1);
  knowledge.visible = std::max(knowledge.visible, grid.number - 1);
  return Outcome::kNext;
}

Outcome LaunchDependents(Step& step) {
  Cta& cta = *step.warp.cta;
  Grid& grid = *cta.grid;
  grid.dependents_know = std::min(grid.dependents_know, step.warp.view.knowledge.launches);
  if (!cta.released_dependents) {  // the first thread of a CTA speaks for it
    cta.released_dependents = true;
    grid.released++;
  }
  return Outcome::kNext;
}

Outcome SetRegisters(Step& step) {
  const int64_t count = OperandAt(step, 0).value;
  if (count < 24 || count > 256 || count % 8 != 0) throw Error("so many registers cannot be asked for");
  return Outcome::kNext;
}

Outcome ProxyFence(Step& step) {
  if (step.machine.checker()) Checker::ProxyFence(&step.warp.view);
  return Outcome::kNext;
}

}  // namespace

void RegisterControl() {
  Register("bra", Branch);
  Register("bra.uni", Branch);
  Register("ret", End);
  Register("exit", End);
  Register("trap", Trap);
  Register("griddepcontrol.wait", WaitForPreceding);
  Register("griddepcontrol.launch_dependents", LaunchDependents);
  Register("setmaxnreg.inc.sync.aligned.u32", SetRegisters, true);
  Register("setmaxnreg.dec.sync.aligned.u32", SetRegisters, true);
  Register("fence.proxy.async", ProxyFence);
  Register("fence.proxy.async.shared::cta", ProxyFence);
  Register("fence.proxy.async.global", ProxyFence);
  Register("fence.mbarrier_init.release.cluster", ProxyFence);
  // Order between threads comes from barriers here; a memory fence alone adds none.
  Register("fence.acq_rel.cta", Nothing);
  Register("fence.acq_rel.gpu", Nothing);
  Register("membar.gl", Nothing);
  Register("membar.cta", Nothing);
  Register("nanosleep.u32", Nothing);
}

}  // namespace emulator
