// Barriers of a CTA and of a cluster, and mbarriers.

#include "barriers.h"

#include <algorithm>

#include "accesses.h"

namespace emulator {
namespace {

// --- Named barriers -----------------------------------------------------------------------------------------------

struct Arrival {
  NamedBarrier* barrier;
  uint64_t generation;
};

Arrival ArriveAt(Step& step) {
  Warp& warp = step.warp;
  const Cta& cta = *warp.cta;
  const auto id = Uniform<uint32_t>(step, OperandAt(step, 0), "the number of a barrier");
  if (id >= cta.barriers.size()) throw Error("a CTA has 16 barriers");
  const int threads = step.instruction.operands.size() > 1
                          ? static_cast<int>(Uniform<uint32_t>(step, OperandAt(step, 1), "the threads of a barrier"))
                          : (cta.grid->threads + kLanes - 1) / kLanes * kLanes;
  if (threads <= 0 || threads % kLanes != 0) throw Error("a barrier is for whole warps");
  NamedBarrier& barrier = warp.cta->barriers[id];
  if (barrier.arrived != 0 && barrier.threads != threads) {
    throw Error("barrier " + std::to_string(id) + " is used for " + std::to_string(barrier.threads) + " and for " +
                std::to_string(threads) + " threads");
  }
  barrier.threads = threads;
  barrier.arrived += kLanes;
  const uint64_t generation = barrier.generation;
  if (Checker* checker = step.machine.checker()) {
    checker->Release(warp.view, &barrier.arriving);
    NextEpoch(&warp);
  }
  if (barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.generation++;
    barrier.complete = std::exchange(barrier.arriving, {});
  }
  return {&barrier, generation};
}

// Blocks the first time and goes on the second.
Outcome SyncThreads(Step& step) {
  Warp& warp = step.warp;
  if (warp.barrier_generation == 0) {
    const Arrival arrival = ArriveAt(step);
    warp.barrier_generation = arrival.generation + 1;
    if (arrival.barrier->generation == arrival.generation) {
      const auto [barrier, generation] = arrival;
      const auto what = [barrier] {
        return "a barrier where " + std::to_string(barrier->arrived) + " of " + std::to_string(barrier->threads) +
               " threads are";
      };
      return Machine::Block(step, [barrier, generation] { return barrier->generation != generation; }, what, true);
    }
  }
  const auto id = Uniform<uint32_t>(step, OperandAt(step, 0), "the number of a barrier");
  warp.barrier_generation = 0;
  if (Checker* checker = step.machine.checker()) {
    checker->Acquire(warp.cta->barriers[id].complete, &warp.view);
    Synchronised(&warp);
  }
  return Outcome::kNext;
}

Outcome ArriveThreads(Step& step) {
  ArriveAt(step);
  return Outcome::kNext;
}

// --- Clusters -----------------------------------------------------------------------------------------------------

int WarpsOf(const Cluster& cluster) {
  int warps = 0;
  for (const Cta* cta : cluster.ctas) warps += (cta->grid->threads + kLanes - 1) / kLanes;
  return warps;
}

template <bool releases>
Outcome ArriveCluster(Step& step) {
  Cluster& cluster = *step.warp.cta->cluster;
  step.warp.cluster_generation = cluster.generation + 1;
  if (releases) {  // and with it its arrivals at other CTAs' mbarriers are performed
    for (const auto& each : std::exchange(step.warp.remote, {})) {
      if (!each->done) step.machine.Force(each.get());
    }
  }
  if (Checker* checker = step.machine.checker(); checker && releases) {
    checker->Release(step.warp.view, &cluster.arriving);
    NextEpoch(&step.warp);
  }
  if (++cluster.arrived == WarpsOf(cluster)) {
    cluster.arrived = 0;
    cluster.generation++;
    cluster.complete = std::exchange(cluster.arriving, {});
  }
  return Outcome::kNext;
}

Outcome WaitCluster(Step& step) {
  const Cluster* cluster = step.warp.cta->cluster.get();
  const uint64_t generation = step.warp.cluster_generation;
  if (generation == 0) throw Error("waits for the cluster without having arrived");
  if (cluster->generation < generation) {
    return Machine::Block(
        step, [cluster, generation] { return cluster->generation >= generation; }, "the warps of its cluster");
  }
  step.warp.cluster_generation = 0;
  if (Checker* checker = step.machine.checker()) {
    checker->Acquire(cluster->complete, &step.warp.view);
    Synchronised(&step.warp);
  }
  return Outcome::kNext;
}

Outcome MapAddress(Step& step) {
  Row<uint32_t> a, b;
  const uint32_t* address = Source<uint32_t>(step, OperandAt(step, 1), &a);
  const uint32_t* rank = Source<uint32_t>(step, OperandAt(step, 2), &b);
  const uint32_t poison = PoisonOf(step, OperandAt(step, 1)) | PoisonOf(step, OperandAt(step, 2));
  uint32_t* target = Target<uint32_t>(step, OperandAt(step, 0));
  ForLanes(step.mask, [&](int lane) { target[lane] = (address[lane] & 0xFFFFFF) | (rank[lane] + 1) << 24; });
  SetPoison(step, OperandAt(step, 0), poison);
  return Outcome::kNext;
}

// --- Mbarriers ----------------------------------------------------------------------------------------------------

Outcome Initialise(Step& step) {
  Cta& cta = *step.warp.cta;
  Row<uint64_t> addresses;
  Row<uint32_t> scratch;
  Addresses(step, OperandAt(step, 0), &addresses);
  NeedKnown(step, OperandAt(step, 1), "the count of an mbarrier");
  const uint32_t* counts = Source<uint32_t>(step, OperandAt(step, 1), &scratch);
  const Actor actor = ActorOf(step);
  ForLanes(step.mask, [&](int lane) {
    const Place place = cta.shared.At(addresses.lane[lane], 8, 8);
    Touch(step.machine, place, 8, true, actor, step.warp.view);
    if (counts[lane] == 0 || counts[lane] >= 1u << 20) throw Error("an mbarrier's count is 1 to 2**20 - 1");
    if (cta.mbarriers.count(place.offset) != 0) throw Error("an mbarrier is initialised twice");
    Mbarrier barrier;
    barrier.expected = barrier.pending = counts[lane];
    cta.mbarriers[place.offset] = barrier;
    std::memset(place.marks, kBarrierByte, 8);
  });
  return Outcome::kNext;
}

Outcome Invalidate(Step& step) {
  Cta& cta = *step.warp.cta;
  const Place place = cta.shared.At(UniformAddress(step, OperandAt(step, 0)), 8, 8);
  MbarrierAt(cta, static_cast<uint64_t>(place.offset));
  Touch(step.machine, place, 8, true, ActorOf(step), step.warp.view);
  cta.mbarriers.erase(place.offset);
  std::memset(place.marks, kPoison, 8);
  return Outcome::kNext;
}

// mbarrier.arrive: operands are [state,] address [, count or bytes].
template <bool expects_bytes>
Outcome Arrive(Step& step) {
  const auto& operands = step.instruction.operands;
  const size_t at = operands[0].kind == OperandKind::kAddress ? 0 : 1;
  Row<uint64_t> addresses;
  Row<uint32_t> scratch;
  Addresses(step, OperandAt(step, at), &addresses);
  const uint32_t* numbers = nullptr;
  if (operands.size() > at + 1) {
    NeedKnown(step, operands[at + 1], "the count of an arrival");
    numbers = Source<uint32_t>(step, operands[at + 1], &scratch);
  }
  if (expects_bytes && numbers == nullptr) throw Error("an arrival without the bytes that it expects");
  Row<uint64_t> states{};
  ForLanes(step.mask, [&](int lane) {
    Cta& cta = *step.warp.cta;
    Mbarrier& barrier = MbarrierAt(cta, addresses.lane[lane]);
    TouchMbarrier(step, cta, addresses.lane[lane]);
    states.lane[lane] = barrier.phase;
    if (expects_bytes) barrier.bytes += numbers[lane];
    if (Checker* checker = step.machine.checker()) checker->Release(Released(step), &barrier.arriving);
    ArriveOn(&barrier, step.warp, expects_bytes || numbers == nullptr ? 1 : numbers[lane]);
  });
  if (step.machine.checker()) NextEpoch(&step.warp);
  if (at == 1 && operands[0].kind == OperandKind::kRegister) {
    uint64_t* target = Target<uint64_t>(step, operands[0]);
    ForLanes(step.mask, [&](int lane) { target[lane] = states.lane[lane]; });
    SetPoison(step, operands[0], 0);
  }
  return Outcome::kNext;
}

Outcome ExpectBytes(Step& step) {
  Cta& cta = *step.warp.cta;
  const uint64_t address = UniformAddress(step, OperandAt(step, 0));
  TouchMbarrier(step, cta, address);
  MbarrierAt(cta, address).bytes += Uniform<uint32_t>(step, OperandAt(step, 1), "the bytes that are expected");
  return Outcome::kNext;
}

// Waits for the end of the phase of a parity. `may_block`: returns when it has ended, or, in some orders, before.
// `of_others`: at the scope of the cluster, so that it also learns what other CTAs released.
template <bool may_block, bool acquires, bool of_others = false>
Outcome WaitParity(Step& step) {
  Cta& cta = *step.warp.cta;
  Row<uint64_t> addresses;
  Row<uint32_t> scratch;
  Addresses(step, OperandAt(step, 1), &addresses);
  NeedKnown(step, OperandAt(step, 2), "the parity of a wait");
  const uint32_t* parities = Source<uint32_t>(step, OperandAt(step, 2), &scratch);
  uint32_t ended = 0;
  ForLanes(step.mask, [&](int lane) {
    if (parities[lane] > 1) throw Error("a parity is 0 or 1");
    if ((MbarrierAt(cta, addresses.lane[lane]).phase & 1) != parities[lane]) ended |= 1u << lane;
  });
  TouchMbarrier(step, cta, addresses.lane[__builtin_ctz(step.mask)]);
  const bool gives_up = step.machine.options().order == Order::kRandom && step.machine.random().OneIn(16);
  if (ended == 0 && may_block && !gives_up) {
    const int lane = __builtin_ctz(step.mask);
    const Mbarrier* barrier = &MbarrierAt(cta, addresses.lane[lane]);
    const uint32_t parity = parities[lane];
    const auto what = [barrier, parity, address = addresses.lane[lane]] {
      return "mbarrier " + Hex(address) + " to end its phase of parity " + std::to_string(parity) + " (of its phase " +
             std::to_string(barrier->phase) + " there are " + std::to_string(barrier->pending) + " arrivals and " +
             std::to_string(barrier->bytes) + " bytes to come)";
    };
    return Machine::Block(step, [barrier, parity] { return (barrier->phase & 1) != parity; }, what);
  }
  if (Checker* checker = step.machine.checker(); checker && acquires) {
    ForLanes(step.mask & ended, [&](int lane) {
      const Mbarrier& barrier = MbarrierAt(cta, addresses.lane[lane]);
      checker->Acquire(barrier.complete, &step.warp.view);
      if (of_others) checker->Acquire(barrier.complete_others, &step.warp.view);
    });
  }
  SetBits(step, OperandAt(step, 0), ended, 0);
  return Outcome::kNext;
}

}  // namespace

namespace {

std::string Describe(const std::map<std::pair<int, int>, int64_t>& arrivals) {
  std::string text;
  for (const auto& [who, count] : arrivals) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " of warp " + std::to_string(who.second);
  }
  return text;
}

}  // namespace

View Released(const Step& step) {
  const Warp& warp = step.warp;
  View view = warp.view;
  if (IsWhole(step) || !step.machine.options().check_lanes) return view;
  const auto limit = [](Counts* counts, const Counts& to, int component) {
    const auto at = static_cast<size_t>(component);
    if (component < 0 || at >= counts->size()) return;
    (*counts)[at] = at < to.size() ? std::min((*counts)[at], to[at]) : 0;
  };
  // Waits for products, and for loads from and stores to tensor memory, are of the warp as a whole.
  for (const int component : {warp.component, warp.copy_component}) {
    limit(&view.knowledge.seen, warp.synchronised.seen, component);
    limit(&view.knowledge.fenced, warp.synchronised.fenced, component);
    limit(&view.knowledge.released, warp.synchronised.released, component);
  }
  return view;
}

void NextEpoch(Warp* warp) {
  for (const int component : {warp->component, warp->lanes_component}) {
    warp->view.knowledge.seen[static_cast<size_t>(component)]++;
  }
}

void Synchronised(Warp* warp) {
  warp->synchronised = warp->view.knowledge;
  NextEpoch(warp);
}

Mbarrier& MbarrierAt(Cta& cta, uint64_t address) {
  const auto found = cta.mbarriers.find(static_cast<int64_t>(address));
  if (found == cta.mbarriers.end()) throw Error("there is no mbarrier at " + Hex(address));
  return found->second;
}

void TouchMbarrier(Step& step, Cta& cta, uint64_t address) {
  if (!step.machine.checker()) return;
  Touch(step.machine, cta.shared.At(address, 8, 8), 8, true, ActorOf(step, Access::kAtomic), step.warp.view);
}

void ArriveOn(Mbarrier* barrier, const Warp& warp, int64_t count) {
  if (count > barrier->pending) {
    throw Error("more arrivals than the phase of the mbarrier has: " + std::to_string(barrier->pending) + " to come");
  }
  barrier->pending -= count;
  barrier->arrived[{warp.cta->number, warp.index}] += count;
  Advance(barrier);
}

void CompleteBytes(Mbarrier* barrier, int64_t bytes) {
  barrier->bytes -= bytes;
  Advance(barrier);
}

void Advance(Mbarrier* barrier) {
  if (barrier->pending != 0 || barrier->bytes != 0) return;
  // A count that is too small ends a phase before all have arrived: then others arrive in the next one.
  if (barrier->phase == 0) barrier->first = barrier->arrived;
  if (barrier->arrived != barrier->first) {
    throw Error("phase " + std::to_string(barrier->phase) + " of an mbarrier of " + std::to_string(barrier->expected) +
                " has other arrivals than its first: " + Describe(barrier->arrived) + ", not " +
                Describe(barrier->first));
  }
  barrier->arrived.clear();
  barrier->pending = barrier->expected;
  barrier->phase++;
  barrier->complete = std::exchange(barrier->arriving, {});
  barrier->complete_others = std::exchange(barrier->arriving_others, {});
}

void RegisterBarriers() {
  Register("bar.sync", SyncThreads, true);
  Register("barrier.sync", SyncThreads, true);
  Register("barrier.cta.sync.aligned", SyncThreads, true);
  Register("bar.arrive", ArriveThreads, true);
  Register("barrier.cluster.arrive", ArriveCluster<true>, true);
  Register("barrier.cluster.arrive.aligned", ArriveCluster<true>, true);
  Register("barrier.cluster.arrive.relaxed", ArriveCluster<false>, true);
  Register("barrier.cluster.arrive.relaxed.aligned", ArriveCluster<false>, true);
  Register("barrier.cluster.wait", WaitCluster, true);
  Register("barrier.cluster.wait.aligned", WaitCluster, true);
  Register("mapa.shared::cluster.u32", MapAddress);
  Register("mbarrier.init.shared.b64", Initialise);
  Register("mbarrier.init.shared::cta.b64", Initialise);
  Register("mbarrier.inval.shared.b64", Invalidate);
  Register("mbarrier.arrive.shared.b64", Arrive<false>);
  Register("mbarrier.arrive.shared::cta.b64", Arrive<false>);
  Register("mbarrier.arrive.expect_tx.shared.b64", Arrive<true>);
  Register("mbarrier.arrive.expect_tx.shared::cta.b64", Arrive<true>);
  Register("mbarrier.expect_tx.relaxed.cta.shared::cta.b64", ExpectBytes);
  Register("mbarrier.try_wait.parity.shared.b64", WaitParity<true, true>);
  Register("mbarrier.try_wait.parity.shared::cta.b64", WaitParity<true, true>);
  Register("mbarrier.try_wait.parity.acquire.cta.shared::cta.b64", WaitParity<true, true>);
  Register("mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64", WaitParity<true, true, true>);
  Register("mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64", WaitParity<true, false>);
  Register("mbarrier.test_wait.parity.shared.b64", WaitParity<false, true>);
}

}  // namespace emulator
