// What CTAs of a cluster do to each other's shared memory, and what the two CTAs of a pair do together: allocations
// with .cta_group::2. (tensor.cc and products.cc have copies, products and commits for both.)

#include <algorithm>

#include "barriers.h"
#include "tensor.h"

namespace emulator {
namespace {

constexpr uint64_t kOffset = 0xFFFFFF;  // of a shared address: what is above says in which CTA (MapAddress)

// --- Shared memory of the cluster ---------------------------------------------------------------------------------

// An arrival at another CTA's mbarrier: on its way for a while, after the instruction.
class RemoteArrival : public AsyncOperation {
 public:
  RemoteArrival(Step& step, Cta* cta, uint64_t barrier, bool releases)
      : AsyncOperation(step), barrier_(barrier), releases_(releases) {
    peer = cta;
    global_only = true;  // the CTA that it comes from may end
    if (step.machine.checker()) view = Released(step);
    MbarrierAt(*cta, barrier);
    TouchMbarrier(step, *cta, barrier);
  }

  void Perform(Machine& machine) override {
    Mbarrier& barrier = MbarrierAt(*peer, barrier_);
    if (Checker* checker = machine.checker(); checker && releases_) checker->Release(view, &barrier.arriving_others);
    ArriveOn(&barrier, *warp, 1);
  }

 private:
  uint64_t barrier_;
  bool releases_;
};

// `of_cluster`: released at the scope of the cluster. At that of the CTA, another CTA learns nothing by it.
template <bool of_cluster>
Outcome ArriveInCluster(Step& step) {
  const auto& operands = step.instruction.operands;
  const size_t at = operands[0].kind == OperandKind::kAddress ? 0 : 1;
  if (operands.size() != at + 1) throw Error("the emulator knows arrivals of one in the cluster only");
  if (at == 1 && operands[0].kind == OperandKind::kRegister) throw Error("an arrival in the cluster has no result");
  Row<uint64_t> addresses;
  Addresses(step, OperandAt(step, at), &addresses);
  ForLanes(step.mask, [&](int lane) {
    Cta& cta = step.machine.Peer(*step.warp.cta, addresses.lane[lane]);
    const uint64_t address = addresses.lane[lane] & kOffset;
    if (&cta != step.warp.cta) {
      auto arrival = std::make_shared<RemoteArrival>(step, &cta, address, of_cluster);
      std::erase_if(step.warp.remote, [](const auto& each) { return each->done; });
      step.warp.remote.push_back(arrival);
      step.machine.Issue(std::move(arrival));
      return;
    }
    Mbarrier& barrier = MbarrierAt(cta, address);
    TouchMbarrier(step, cta, address);
    if (Checker* checker = step.machine.checker()) checker->Release(Released(step), &barrier.arriving);
    ArriveOn(&barrier, step.warp, 1);
  });
  if (step.machine.checker()) NextEpoch(&step.warp);
  return Outcome::kNext;
}

Outcome StoreInCluster(Step& step) {
  Row<uint64_t> addresses;
  Row<uint32_t> scratch;
  Addresses(step, OperandAt(step, 0), &addresses);
  const uint32_t poison = PoisonOf(step, OperandAt(step, 1));
  const uint32_t* values = Source<uint32_t>(step, OperandAt(step, 1), &scratch);
  const Actor actor = ActorOf(step);
  ForLanes(step.mask, [&](int lane) {
    Cta& cta = step.machine.Peer(*step.warp.cta, addresses.lane[lane]);
    const Place place = cta.shared.At(addresses.lane[lane] & kOffset, 4, 4);
    Touch(step.machine, place, 4, true, actor, step.warp.view);
    WriteBytes(step.machine, place, 4, values + lane, poison >> lane & 1);
  });
  return Outcome::kNext;
}

// --- Allocation by a pair -----------------------------------------------------------------------------------------

enum Kind { kAllocate, kFree, kGiveUpPermit };  // of Cta::together

// Comes to an operation that the pair performs together; whether the other CTA has come too. PTX lets the first of the
// two wait or go on; here it always waits.
bool Together(Step& step, Kind kind) {
  Warp& warp = step.warp;
  if (warp.together == 0) warp.together = ++warp.cta->together[kind];
  const Cta* peer = &PeerOf(*warp.cta);
  const int number = warp.together;
  if (peer->together[kind] >= number) return true;
  Machine::Block(
      step, [peer, kind, number] { return peer->together[kind] >= number; }, [] { return "the other CTA of its pair"; },
      true);
  return false;
}

std::vector<int> RoomInBoth(const Cta& one, const Cta& other, int columns) {
  std::vector<int> room = one.home->tensor.Room(columns);
  const std::vector<int> there = other.home->tensor.Room(columns);
  std::erase_if(room, [&](int column) { return std::find(there.begin(), there.end(), column) == there.end(); });
  return room;
}

// The same columns in both CTAs.
Outcome AllocateTogether(Step& step) {
  Cta& cta = *step.warp.cta;
  Cta& peer = PeerOf(cta);
  const int columns = Columns(step, OperandAt(step, 1));
  if (!cta.may_allocate) throw Error("allocates after it has given up the permit");
  if (cta.home == peer.home) throw Error("the emulator has both CTAs of a pair on one multiprocessor");
  const Place place = AllocationTarget(step);
  cta.wanted_columns = columns;
  if (!Together(step, kAllocate)) return Outcome::kBlocked;
  if (cta.granted_column < 0) {
    if (peer.wanted_columns != columns) throw Error("the CTAs of a pair allocate different numbers of columns");
    const std::vector<int> room = RoomInBoth(cta, peer, columns);
    if (room.empty()) {
      return Machine::Block(
          step, [&cta, &peer, columns] { return cta.granted_column >= 0 || !RoomInBoth(cta, peer, columns).empty(); },
          [columns] { return std::to_string(columns) + " free columns of tensor memory in both CTAs"; });
    }
    const bool any = step.machine.options().order == Order::kRandom;
    const int column = any ? room[step.machine.random().Below(room.size())] : room[0];
    for (Cta* each : {&cta, &peer}) {
      each->home->tensor.Allocate(each->number, column, columns);
      each->granted_column = column;
    }
  }
  WriteAllocation(step, place, std::exchange(cta.granted_column, -1));
  step.warp.together = 0;
  return Outcome::kNext;
}

template <Kind kind, Outcome (*operation)(Step&)>
Outcome PerformTogether(Step& step) {
  if (!Together(step, kind)) return Outcome::kBlocked;
  step.warp.together = 0;
  return operation(step);
}

}  // namespace

void RegisterPairs() {
  Register("mbarrier.arrive.shared::cluster.b64", ArriveInCluster<false>);
  Register("mbarrier.arrive.release.cta.shared::cluster.b64", ArriveInCluster<false>);
  Register("mbarrier.arrive.release.cluster.shared::cluster.b64", ArriveInCluster<true>);
  Register("st.shared::cluster.b32", StoreInCluster);
  Register("st.shared::cluster.u32", StoreInCluster);
  Register("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32", AllocateTogether, true);
  Register("tcgen05.dealloc.cta_group::2.sync.aligned.b32", PerformTogether<kFree, Free>, true);
  Register("tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned", PerformTogether<kGiveUpPermit, GiveUpPermit>,
           true);
}

}  // namespace emulator
