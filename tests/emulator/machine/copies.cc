// cp.async and bulk copies.

#include <algorithm>

#include "accesses.h"
#include "barriers.h"

namespace emulator {
namespace {

int Component(Step& step, int* component, const char* what) {
  Checker* checker = step.machine.checker();
  if (checker != nullptr && *component < 0) {
    const Warp& warp = step.warp;
    *component = checker->NewComponent(
        warp.cta->grid->number, false,
        std::string(what) + " of CTA " + std::to_string(warp.cta->index) + ", warp " + std::to_string(warp.index));
  }
  return *component;
}

// --- cp.async -----------------------------------------------------------------------------------------------------

class Copy : public AsyncOperation {
 public:
  explicit Copy(Step& step) : AsyncOperation(step) {
    Addresses(step, OperandAt(step, 0), &to_);
    Addresses(step, OperandAt(step, 1), &from_);
    bytes_ = OperandAt(step, 2).value;
    const bool in_l2 = instruction->operation->name.find(".cg.") != std::string::npos;
    if (bytes_ != 16 && (in_l2 || (bytes_ != 4 && bytes_ != 8))) throw Error("cp.async of so many bytes");
    for (int64_t& lane : read_.lane) lane = bytes_;
    if (step.instruction.operands.size() > 3) {
      const Operand& how = OperandAt(step, 3);
      NeedKnown(step, how, "what a cp.async reads");
      if (how.bytes == 1) {  // a predicate: read nothing
        const uint32_t skip = Bits(step, how);
        ForLanes(lanes, [&](int lane) { read_.lane[lane] = skip >> lane & 1 ? 0 : bytes_; });
      } else {
        Row<uint32_t> scratch;
        const uint32_t* sizes = Source<uint32_t>(step, how, &scratch);
        ForLanes(lanes, [&](int lane) {
          if (sizes[lane] > bytes_) throw Error("a cp.async reads more than it writes");
          read_.lane[lane] = sizes[lane];
        });
      }
    }
    ForLanes(lanes, [&](int lane) { Places(step.machine, lane); });  // wrong addresses are found now
    if (step.machine.checker()) {
      actor.component = Component(step, &step.warp.copy_component, "the cp.async copies");
      actor.count = step.warp.copy_count + 1;
    }
    step.warp.copy_count++;
  }

  void Perform(Machine& machine) override {
    ForLanes(lanes, [&](int lane) {
      const auto [from, to] = Places(machine, lane);
      const int64_t read = read_.lane[lane];
      Touch(machine, to, bytes_, true, actor, view);
      if (read > 0) {
        Touch(machine, from, read, false, actor, view);
        NeedWritten(machine, from, read);
        CopyBytes(machine, from, to, read);
      }
      if (read < bytes_) {
        const uint8_t zeros[16] = {};
        const Place rest{to.data + read, to.marks + read, to.space, to.owner, to.offset + read};
        WriteBytes(machine, rest, bytes_ - read, zeros, false);
      }
    });
  }

 private:
  std::pair<Place, Place> Places(Machine& machine, int lane) {
    const Place to = warp->cta->shared.At(to_.lane[lane], bytes_, bytes_);
    // Where nothing is read the address may be any.
    if (read_.lane[lane] == 0) return {to, to};
    return {machine.memory().At(from_.lane[lane], read_.lane[lane], bytes_), to};
  }

  Row<uint64_t> to_, from_;
  Row<int64_t> read_;
  int64_t bytes_;
};

Outcome CopyAsync(Step& step) {
  auto copy = std::make_shared<Copy>(step);
  step.warp.copies.push_back(copy);
  step.warp.copy_groups[copy.get()] = step.warp.open_group;
  step.machine.Issue(copy);
  return Outcome::kNext;
}

Outcome CommitCopies(Step& step) {
  ForLanes(step.mask, [&](int lane) { step.warp.open_group[static_cast<size_t>(lane)]++; });
  return Outcome::kNext;
}

Outcome WaitForCopies(Step& step, uint32_t most_pending) {
  Warp& warp = step.warp;
  Operations wanted;
  for (const auto& copy : warp.copies) {
    const auto& groups = warp.copy_groups[copy.get()];
    ForLanes(step.mask & copy->lanes, [&](int lane) {
      const auto at = static_cast<size_t>(lane);
      const bool is_wanted = groups[at] + most_pending < warp.open_group[at];
      if (is_wanted && (wanted.empty() || wanted.back() != copy)) wanted.push_back(copy);
    });
  }
  if (!std::all_of(wanted.begin(), wanted.end(), [](const auto& copy) { return copy->done; })) {
    return Machine::Block(
        step,
        [wanted] { return std::all_of(wanted.begin(), wanted.end(), [](const auto& copy) { return copy->done; }); },
        "its cp.async copies");
  }
  if (step.machine.checker() && !wanted.empty()) {
    Checker::CompleteForSelf(warp.copy_component, wanted.back()->actor.count, &warp.view);
  }
  for (const auto& copy : wanted) {
    if (copy->lanes & ~step.mask) continue;  // other lanes have yet to wait
    warp.copy_groups.erase(copy.get());
    warp.copies.erase(std::find(warp.copies.begin(), warp.copies.end(), copy));
  }
  return Outcome::kNext;
}

Outcome WaitGroup(Step& step) { return WaitForCopies(step, static_cast<uint32_t>(OperandAt(step, 0).value)); }

Outcome WaitAll(Step& step) {
  CommitCopies(step);
  return WaitForCopies(step, 0);
}

// The arrival of threads on an mbarrier when their copies so far are complete.
class CopiesArrive : public AsyncOperation {
 public:
  explicit CopiesArrive(Step& step) : AsyncOperation(step) {
    Addresses(step, OperandAt(step, 0), &addresses_);
    ForLanes(lanes, [&](int lane) {
      MbarrierAt(*warp->cta, addresses_.lane[lane]);
      TouchMbarrier(step, *warp->cta, addresses_.lane[lane]);
    });
    count_ = step.warp.copy_count;
  }

  void Perform(Machine& machine) override {
    ForLanes(lanes, [&](int lane) {
      Mbarrier& barrier = MbarrierAt(*warp->cta, addresses_.lane[lane]);
      if (machine.checker() && count_ > 0) Checker::Complete(warp->copy_component, count_, &barrier.arriving);
      ArriveOn(&barrier, *warp, 1);
    });
  }

 private:
  Row<uint64_t> addresses_;
  uint32_t count_;
};

Outcome ArriveWithCopies(Step& step) {
  step.machine.Issue(std::make_shared<CopiesArrive>(step), step.warp.copies);
  return Outcome::kNext;
}

// --- Bulk copies --------------------------------------------------------------------------------------------------

// A part of a bulk copy from global to shared memory; its bytes are counted as it is complete.
class BulkPiece : public AsyncOperation {
 public:
  BulkPiece(Step& step, Cta* cta, uint64_t to, uint64_t from, int64_t bytes, uint64_t barrier)
      : AsyncOperation(step), cta_(cta), to_(to), from_(from), bytes_(bytes), barrier_(barrier) {
    if (step.machine.checker()) {
      Mbarrier& counted = MbarrierAt(*cta, barrier);
      actor.component = Component(step, &counted.component, "a bulk copy");
      actor.count = ++counted.copies;
      actor.access = Access::kAsync;
    }
    if (cta != warp->cta) peer = cta;
  }

  void Perform(Machine& machine) override {
    const Place from = machine.memory().At(from_, bytes_, 16), to = cta_->shared.At(to_, bytes_, 16);
    Touch(machine, from, bytes_, false, actor, view);
    NeedWritten(machine, from, bytes_);
    Touch(machine, to, bytes_, true, actor, view);
    CopyBytes(machine, from, to, bytes_);
    Mbarrier& barrier = MbarrierAt(*cta_, barrier_);
    Knowledge* arriving = peer == nullptr ? &barrier.arriving : &barrier.arriving_others;
    if (machine.checker()) Checker::Complete(actor.component, actor.count, arriving);
    CompleteBytes(&barrier, bytes_);
  }

 private:
  Cta* cta_;
  uint64_t to_, from_;
  int64_t bytes_;
  uint64_t barrier_;
};

template <bool in_cluster>
Outcome BulkCopy(Step& step) {
  Row<uint64_t> to, from, barrier;
  Row<uint32_t> scratch;
  Addresses(step, OperandAt(step, 0), &to);
  Addresses(step, OperandAt(step, 1), &from);
  NeedKnown(step, OperandAt(step, 2), "the size of a copy");
  const uint32_t* sizes = Source<uint32_t>(step, OperandAt(step, 2), &scratch);
  Addresses(step, OperandAt(step, 3), &barrier);
  ForLanes(step.mask, [&](int lane) {
    const int64_t bytes = sizes[lane];
    if (bytes == 0 || bytes % 16 != 0)
      throw Error("a bulk copy is of multiples of 16 bytes, not " + std::to_string(bytes));
    Cta& cta = in_cluster ? step.machine.Peer(*step.warp.cta, to.lane[lane]) : *step.warp.cta;
    if (in_cluster && &step.machine.Peer(*step.warp.cta, barrier.lane[lane]) != &cta) {
      throw Error("a bulk copy goes to one CTA and is counted by another's mbarrier");
    }
    const uint64_t mask = in_cluster ? 0xFFFFFF : ~uint64_t{0};
    const uint64_t target = to.lane[lane] & mask, counted = barrier.lane[lane] & mask;
    step.machine.memory().At(from.lane[lane], bytes, 16);  // wrong addresses are found now
    cta.shared.At(target, bytes, 16);
    MbarrierAt(cta, counted);
    TouchMbarrier(step, cta, counted);
    for (int64_t done = 0; done < bytes;) {  // in one or two parts, which are complete in any order
      int64_t part = bytes - done;
      if (step.machine.options().order != Order::kEager && done == 0 && bytes > 16 && step.machine.random().OneIn(2)) {
        part = 16 * (1 + static_cast<int64_t>(step.machine.random().Below(static_cast<size_t>(bytes / 16) - 1)));
      }
      const auto at = static_cast<uint64_t>(done);
      step.machine.Issue(std::make_shared<BulkPiece>(step, &cta, target + at, from.lane[lane] + at, part, counted));
      done += part;
    }
  });
  return Outcome::kNext;
}

}  // namespace

void RegisterCopies() {
  for (const std::string prefetch : {"", ".L2::64B", ".L2::128B", ".L2::256B"}) {
    Register("cp.async.ca.shared.global" + prefetch, CopyAsync);
    Register("cp.async.cg.shared.global" + prefetch, CopyAsync);
    Register("cp.async.ca.shared::cta.global" + prefetch, CopyAsync);
    Register("cp.async.cg.shared::cta.global" + prefetch, CopyAsync);
  }
  Register("cp.async.commit_group", CommitCopies);
  Register("cp.async.wait_group", WaitGroup);
  Register("cp.async.wait_all", WaitAll);
  Register("cp.async.mbarrier.arrive.noinc.shared.b64", ArriveWithCopies);
  Register("cp.async.mbarrier.arrive.noinc.shared::cta.b64", ArriveWithCopies);
  for (const std::string hint : {"", ".L2::cache_hint"}) {
    Register("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes" + hint, BulkCopy<true>);
    Register("cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes" + hint, BulkCopy<false>);
  }
}

}  // namespace emulator
