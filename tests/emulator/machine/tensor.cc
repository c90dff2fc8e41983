// tcgen05: allocation of tensor memory, loads and stores, copies from shared memory, commits and fences.

#include "tensor.h"

#include <algorithm>
#include <bit>

#include "barriers.h"

namespace emulator {

// --- Allocation ---------------------------------------------------------------------------------------------------

int Columns(Step& step, const Operand& operand) {
  const auto columns = Uniform<uint32_t>(step, operand, "the number of columns");
  if (columns < 32 || columns > 512 || !std::has_single_bit(columns)) {
    throw Error(std::to_string(columns) + " columns: needs a power of two from 32 to 512");
  }
  return static_cast<int>(columns);
}

namespace {

// The allocating and the freeing of columns, as an access to all of their cells.
void TouchColumns(Step& step, int column, int columns) {
  Checker* checker = step.machine.checker();
  if (checker == nullptr) return;
  const Actor actor = ActorOf(step, Access::kTensorFree);
  for (int lane = 0; lane < TensorMemory::kTensorLanes; ++lane) {
    for (int i = column; i < std::min(column + columns, TensorMemory::kColumns); ++i) {
      checker->TouchTensor(step.warp.cta->home->index, lane, i, true, actor, step.warp.view);
    }
  }
}

}  // namespace

Place AllocationTarget(Step& step) { return step.warp.cta->shared.At(UniformAddress(step, OperandAt(step, 0)), 4, 4); }

void WriteAllocation(Step& step, const Place& place, int column) {
  TouchColumns(step, column, Columns(step, OperandAt(step, 1)));  // what others do there must come after
  Touch(step.machine, place, 4, true, ActorOf(step), step.warp.view);
  WriteBytes(step.machine, place, 4, &column, false);
}

namespace {

Outcome Allocate(Step& step) {
  Cta& cta = *step.warp.cta;
  const int columns = Columns(step, OperandAt(step, 1));
  if (!cta.may_allocate) throw Error("allocates after it has given up the permit");
  const Place place = AllocationTarget(step);
  TensorMemory* tensor = &cta.home->tensor;
  const std::vector<int> room = tensor->Room(columns);
  if (room.empty()) {
    return Machine::Block(
        step, [tensor, columns] { return !tensor->Room(columns).empty(); },
        [columns] { return std::to_string(columns) + " free columns of tensor memory"; });
  }
  const bool any = step.machine.options().order == Order::kRandom;
  const int column = any ? room[step.machine.random().Below(room.size())] : room[0];
  tensor->Allocate(cta.number, column, columns);
  WriteAllocation(step, place, column);
  return Outcome::kNext;
}

}  // namespace

Outcome Free(Step& step) {
  Cta& cta = *step.warp.cta;
  const TensorAddress address(Uniform<uint32_t>(step, OperandAt(step, 0), "an address of tensor memory"));
  const int columns = Columns(step, OperandAt(step, 1));
  if (address.lane != 0) throw Error("frees columns from a lane that is not the first");
  TouchColumns(step, address.column, columns);
  if (Checker* checker = step.machine.checker()) checker->ForgetTensor(cta.home->index, address.column, columns);
  cta.home->tensor.Free(cta.number, address.column, columns);
  return Outcome::kNext;
}

Outcome GiveUpPermit(Step& step) {
  step.warp.cta->may_allocate = false;
  return Outcome::kNext;
}

namespace {

// --- Loads and stores ---------------------------------------------------------------------------------------------

enum class Shape { k32x32b, k16x256b };

// Where item `i` of a warp's lane lies, beside the address.
template <Shape shape>
TensorAddress CellOf(int lane, int i) {
  TensorAddress cell(0);
  if constexpr (shape == Shape::k32x32b) {
    cell.lane = lane;
    cell.column = i;
  } else {
    cell.lane = lane / 4 + i / 2 % 2 * 8;
    cell.column = i / 4 * 8 + lane % 4 * 2 + i % 2;
  }
  return cell;
}

template <Shape shape>
class RowOperation : public TensorOperation {
 protected:
  RowOperation(Step& step, const Operand& address, const Operand& registers, int count)
      : TensorOperation(step), address_(static_cast<uint32_t>(UniformAddress(step, address))) {
    const bool is_vector = registers.kind == OperandKind::kVector;
    if (is_vector ? static_cast<int>(registers.items.size()) != count : count != 1) throw Error("so many registers");
    for (int i = 0; i < count; ++i) {
      registers_.push_back(is_vector ? registers.items[static_cast<size_t>(i)] : registers);
    }
    const int first = warp->index % 4 * 32;  // what the warp can reach
    const bool reaches = address_.lane == first || (shape == Shape::k16x256b && address_.lane == first + 16);
    if (!reaches) {
      throw Error("warp " + std::to_string(warp->index) + " cannot access lanes from " + std::to_string(address_.lane));
    }
    Check(address_.lane, address_.column, shape == Shape::k32x32b ? count : count * 2);
  }

  TensorAddress address_;
  std::vector<Operand> registers_;
};

template <Shape shape>
class RowLoad : public RowOperation<shape> {
 public:
  RowLoad(Step& step, int count) : RowOperation<shape>(step, OperandAt(step, 1), OperandAt(step, 0), count) {
    for (const Operand& item : this->registers_) {
      Target<uint32_t>(step, item);
      SetPoison(step, item, kAllLanes);  // until it is performed
    }
    if (step.machine.checker()) {
      this->actor.component = TensorComponent(step, &step.warp.load_component, "the tcgen05 loads");
      this->actor.count = ++step.warp.load_count;
      this->actor.access = Access::kTensorRow;
    }
  }

  bool WritesRegister(int reg) const override {
    return std::any_of(this->registers_.begin(), this->registers_.end(),
                       [reg](const Operand& r) { return r.reg == reg; });
  }

  void Perform(Machine& machine) override {
    const Program& program = *this->warp->cta->grid->program;
    for (size_t i = 0; i < this->registers_.size(); ++i) {
      const int reg = this->registers_[i].reg;
      auto* row = reinterpret_cast<uint32_t*>(this->warp->row(program, reg));
      uint32_t poison = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        const TensorAddress cell = CellOf<shape>(lane, static_cast<int>(i));
        bool is_poison = false;
        row[lane] =
            this->Read(machine, this->address_.lane + cell.lane, this->address_.column + cell.column, &is_poison);
        if (is_poison) poison |= 1u << lane;
      }
      this->warp->poison[static_cast<size_t>(reg)] = poison;
    }
  }
};

template <Shape shape>
class RowStore : public RowOperation<shape> {
 public:
  RowStore(Step& step, int count) : RowOperation<shape>(step, OperandAt(step, 0), OperandAt(step, 1), count) {
    for (const Operand& item : this->registers_) {
      Row<uint32_t> scratch;
      poison_.push_back(PoisonOf(step, item));
      values_.emplace_back();
      std::copy_n(Source<uint32_t>(step, item, &scratch), kLanes, values_.back().lane);
    }
    if (step.machine.checker()) {
      this->actor.component = TensorComponent(step, &step.warp.store_component, "the tcgen05 stores");
      this->actor.count = ++step.warp.store_count;
      this->actor.access = Access::kTensorRow;
    }
  }

  void Perform(Machine& machine) override {
    for (size_t i = 0; i < values_.size(); ++i) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const TensorAddress cell = CellOf<shape>(lane, static_cast<int>(i));
        this->Write(machine, this->address_.lane + cell.lane, this->address_.column + cell.column,
                    values_[i].lane[lane], poison_[i] >> lane & 1);
      }
    }
  }

 private:
  std::vector<Row<uint32_t>> values_;
  std::vector<uint32_t> poison_;
};

template <Shape shape, int count>
Outcome Load(Step& step) {
  const auto load = std::make_shared<RowLoad<shape>>(step, count);
  step.warp.loads.push_back(load);
  step.machine.Issue(load);
  return Outcome::kNext;
}

template <Shape shape, int count>
Outcome Store(Step& step) {
  const auto store = std::make_shared<RowStore<shape>>(step, count);
  step.warp.stores.push_back(store);
  step.machine.Issue(store);
  return Outcome::kNext;
}

bool AllDone(const Operations& operations) {
  return std::all_of(operations.begin(), operations.end(), [](const auto& each) { return each->done; });
}

template <bool loads>
Outcome WaitRows(Step& step) {
  Warp* warp = &step.warp;
  Operations* operations = loads ? &warp->loads : &warp->stores;
  if (!AllDone(*operations)) {
    return Machine::Block(
        step, [operations] { return AllDone(*operations); }, loads ? "its tcgen05 loads" : "its tcgen05 stores");
  }
  operations->clear();
  if (step.machine.checker()) {
    const int component = loads ? warp->load_component : warp->store_component;
    const uint32_t count = loads ? warp->load_count : warp->store_count;
    if (component >= 0) Checker::CompleteForSelf(component, count, &warp->view);
  }
  return Outcome::kNext;
}

// --- Copies from shared memory, and commits -----------------------------------------------------------------------

// 32 rows of 16 bytes to 4 columns of lanes 0 to 31, and again of each 32 lanes.
class ScaleCopy : public TensorOperation {
 public:
  explicit ScaleCopy(Step& step)
      : TensorOperation(step), to_(static_cast<uint32_t>(UniformAddress(step, OperandAt(step, 0)))) {
    const auto descriptor = Uniform<uint64_t>(step, OperandAt(step, 1), "a descriptor");
    start_ = (descriptor & 0x3FFF) << 4;
    stride_ = static_cast<int64_t>(descriptor >> 32 & 0x3FFF) << 4;
    if ((descriptor >> 46 & 7) != 1) throw Error("a descriptor without its constant");
    if (descriptor >> 49 != 0) throw Error("the emulator knows copies without a swizzle only");
    if (descriptor & (uint64_t{3} << 14 | uint64_t{3} << 30)) throw Error("reserved bits of a descriptor are set");
    if (to_.lane != 0) throw Error("a copy for all warps starts at a lane that is not the first");
    Span(step);
    ForCtas([&] {
      Check(0, to_.column, 4);
      for (int row = 0; row < 32; ++row) PlaceOf(row);
    });
    if (step.machine.checker()) {
      actor.component = TensorComponent(step, &step.warp.tensor_component, "the products and copies");
      actor.count = ++step.warp.tensor_count;
      actor.access = Access::kTensorCopy;
    }
  }

  void Perform(Machine& machine) override {
    ForCtas([&] { CopyRows(machine); });  // from each CTA's own shared memory
  }

 private:
  void CopyRows(Machine& machine) {
    for (int row = 0; row < 32; ++row) {
      const Place place = PlaceOf(row);
      Touch(machine, place, 16, false, actor, view);
      for (int i = 0; i < 4; ++i) {
        uint32_t word;
        const bool poison = ReadBytes(
            {place.data + 4 * i, place.marks + 4 * i, place.space, place.owner, place.offset + 4 * i}, 4, &word);
        for (int lane = row; lane < TensorMemory::kTensorLanes; lane += 32) {
          Write(machine, lane, to_.column + i, word, poison);
        }
      }
    }
  }

  Place PlaceOf(int row) const {
    return at->shared.At(start_ + static_cast<uint64_t>(row / 8 * stride_ + row % 8 * 16), 16, 16);
  }

  TensorAddress to_;
  uint64_t start_;
  int64_t stride_;
};

Outcome CopyScales(Step& step) {
  OneThread(step);
  JoinPipeline(step, std::make_shared<ScaleCopy>(step), {});
  return Outcome::kNext;
}

// The arrival on an mbarrier, perhaps another CTA's, when the thread's products and copies so far are complete.
class CommitArrives : public AsyncOperation {
 public:
  CommitArrives(Step& step, Cta* cta, uint64_t barrier)
      : AsyncOperation(step), cta_(cta), barrier_(barrier), count_(step.warp.tensor_count) {
    if (cta != warp->cta) peer = cta;
    MbarrierAt(*cta, barrier);
    TouchMbarrier(step, *cta, barrier);
  }

  void Perform(Machine& machine) override {
    Mbarrier& barrier = MbarrierAt(*cta_, barrier_);
    if (machine.checker()) {
      // What the thread's operations were ordered after was complete before they were.
      Knowledge* arriving = peer == nullptr ? &barrier.arriving : &barrier.arriving_others;
      Checker::CompletePipeline(view, arriving);
      if (count_ > 0) Checker::Complete(warp->tensor_component, count_, arriving);
    }
    ArriveOn(&barrier, *warp, 1);
  }

 private:
  Cta* cta_;
  uint64_t barrier_;
  uint32_t count_;
};

Outcome Commit(Step& step) {
  const int lane = OneThread(step);
  const uint64_t address = UniformAddress(step, OperandAt(step, 0));
  const auto& earlier = step.warp.tensor[static_cast<size_t>(lane)];
  const auto arrive_at = [&](Cta* cta) {
    step.machine.Issue(std::make_shared<CommitArrives>(step, cta, address & 0xFFFFFF), earlier);
  };
  if (step.instruction.operands.size() == 1) {
    arrive_at(&step.machine.Peer(*step.warp.cta, address));
    return Outcome::kNext;
  }
  const uint32_t mask = Uniform<uint32_t>(step, OperandAt(step, 1), "a mask of CTAs") & 0xFFFF;
  const auto& ctas = step.warp.cta->cluster->ctas;
  if (mask == 0 || mask >> ctas.size() != 0) throw Error("a commit to CTAs that the cluster does not have");
  ForLanes(mask,
           [&](int rank) { arrive_at(&step.machine.Peer(*step.warp.cta, static_cast<uint64_t>(rank + 1) << 24)); });
  return Outcome::kNext;
}

Outcome FenceBefore(Step& step) {
  if (step.machine.checker()) Checker::TensorFenceBefore(&step.warp.view);
  return Outcome::kNext;
}

Outcome FenceAfter(Step& step) {
  if (step.machine.checker()) Checker::TensorFenceAfter(&step.warp.view);
  return Outcome::kNext;
}

template <int count>
void RegisterCounts() {
  const std::string times = ".x" + std::to_string(count) + ".b32";
  Register("tcgen05.ld.sync.aligned.32x32b" + times, Load<Shape::k32x32b, count>, true);
  Register("tcgen05.st.sync.aligned.32x32b" + times, Store<Shape::k32x32b, count>, true);
  if constexpr (count <= 32) {
    Register("tcgen05.ld.sync.aligned.16x256b" + times, Load<Shape::k16x256b, 4 * count>, true);
    Register("tcgen05.st.sync.aligned.16x256b" + times, Store<Shape::k16x256b, 4 * count>, true);
  }
  if constexpr (count < 128) RegisterCounts<2 * count>();
}

}  // namespace

int TensorComponent(Step& step, int* component, const char* what) {
  if (*component < 0) {
    const Warp& warp = step.warp;
    *component = step.machine.checker()->NewComponent(
        warp.cta->grid->number, true,
        std::string(what) + " of CTA " + std::to_string(warp.cta->index) + ", warp " + std::to_string(warp.index));
  }
  return *component;
}

Cta& PeerOf(const Cta& cta) {
  const auto rank = static_cast<size_t>(cta.rank ^ 1);
  if (rank >= cta.cluster->ctas.size()) throw Error("the CTA is in no pair: its cluster has no other");
  return *cta.cluster->ctas[rank];
}

void TensorOperation::Span(Step& step) {
  if (step.instruction.operation->variant != 2) return;
  peer = &PeerOf(*warp->cta);
  if (peer->live_warps == 0) throw Error("the other CTA of the pair has ended");
  ctas = {warp->cta, peer};
  if (warp->cta->rank % 2 == 1) std::swap(ctas[0], ctas[1]);
}

void TensorOperation::Check(int lane, int column, int columns) const {
  at->home->tensor.Check(at->number, lane, column, columns);
}

void TensorOperation::TouchCell(Machine& machine, int lane, int column, bool writes) const {
  if (Checker* checker = machine.checker()) {
    checker->TouchTensor(at->home->index, lane, column, writes, actor, view);
  }
}

uint32_t TensorOperation::Read(Machine& machine, int lane, int column, bool* poison) const {
  TouchCell(machine, lane, column, false);
  TensorMemory& tensor = at->home->tensor;
  if (tensor.mark(lane, column) != kWritten) *poison = true;
  return tensor.cell(lane, column);
}

void TensorOperation::Write(Machine& machine, int lane, int column, uint32_t value, bool poison) const {
  TouchCell(machine, lane, column, true);
  TensorMemory& tensor = at->home->tensor;
  tensor.cell(lane, column) = value;
  tensor.mark(lane, column) = poison ? kPoison : kWritten;
}

int OneThread(const Step& step) {
  if (!std::has_single_bit(step.mask)) {
    throw Error("issued by " + std::to_string(std::popcount(step.mask)) + " lanes; one is meant");
  }
  return std::countr_zero(step.mask);
}

void JoinPipeline(Step& step, std::shared_ptr<AsyncOperation> operation, const Operations& before) {
  auto& pipeline = step.warp.tensor[static_cast<size_t>(OneThread(step))];
  pipeline.erase(std::remove_if(pipeline.begin(), pipeline.end(), [](const auto& each) { return each->done; }),
                 pipeline.end());
  pipeline.push_back(operation);
  step.machine.Issue(std::move(operation), before);
}

void RegisterTensorMemory() {
  Register("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32", Allocate, true);
  Register("tcgen05.dealloc.cta_group::1.sync.aligned.b32", Free, true);
  Register("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", GiveUpPermit, true);
  RegisterCounts<1>();
  Register("tcgen05.wait::ld.sync.aligned", WaitRows<true>, true);
  Register("tcgen05.wait::st.sync.aligned", WaitRows<false>, true);
  Register("tcgen05.cp.cta_group::1.32x128b.warpx4", CopyScales);
  Register("tcgen05.cp.cta_group::2.32x128b.warpx4", CopyScales, false, 2);
  for (const std::string group : {"1", "2"}) {
    const std::string name = "tcgen05.commit.cta_group::" + group + ".mbarrier::arrive::one.shared::cluster";
    Register(name + ".b64", Commit);
    Register(name + ".multicast::cluster.b64", Commit);
  }
  Register("tcgen05.fence::before_thread_sync", FenceBefore);
  Register("tcgen05.fence::after_thread_sync", FenceAfter);
}

}  // namespace emulator
