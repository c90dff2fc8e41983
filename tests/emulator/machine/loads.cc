// Loads, stores and atomic operations of single lanes.

#include <cmath>

#include "accesses.h"
#include "numbers.h"

namespace emulator {
namespace {

constexpr int kMostItems = 8;

// The registers that an instruction loads or stores: one, or those of a vector.
struct Items {
  explicit Items(const Operand& operand) {
    count = operand.kind == OperandKind::kVector ? static_cast<int>(operand.items.size()) : 1;
    first = operand.kind == OperandKind::kVector ? operand.items.data() : &operand;
    if (count > kMostItems) throw Error("a vector of so many items");
  }
  const Operand* first;
  int count;
};

template <Space space>
Place At(Step& step, uint64_t address, int64_t bytes) {
  if constexpr (space == Space::kGlobal) return step.machine.memory().At(address, bytes, bytes);
  return step.warp.cta->shared.At(address, bytes, bytes);
}

template <int bytes, bool is_signed>
uint64_t Widened(uint64_t value) {
  if constexpr (bytes == 8) return value;
  const int shift = 64 - 8 * bytes;
  return is_signed ? static_cast<uint64_t>(static_cast<int64_t>(value << shift) >> shift) : value;
}

void Assign(Step& step, const Operand& item, int lane, uint64_t value) {
  if (item.bytes == 8) {
    Target<uint64_t>(step, item)[lane] = value;
  } else {
    Target<uint32_t>(step, item)[lane] = static_cast<uint32_t>(item.bytes == 2 ? value & 0xFFFF : value);
  }
}

template <Space space, int bytes, bool is_signed, Access access = Access::kGeneric>
Outcome Load(Step& step) {
  const Items items(OperandAt(step, 0));
  Row<uint64_t> addresses;
  Addresses(step, OperandAt(step, 1), &addresses);
  const int64_t total = int64_t{bytes} * items.count;
  uint32_t poison[kMostItems] = {};
  const Actor actor = ActorOf(step, access);
  ForLanes(step.mask, [&](int lane) {
    const Place place = At<space>(step, addresses.lane[lane], total);
    Touch(step.machine, place, total, false, actor, step.warp.view);
    NeedWritten(step.machine, place, total);
    for (int i = 0; i < items.count; ++i) {
      const Place part{place.data + i * bytes, place.marks + i * bytes, space, place.owner, place.offset + i * bytes};
      uint64_t value = 0;
      if (ReadBytes(part, bytes, &value)) poison[i] |= 1u << lane;
      Assign(step, items.first[i], lane, Widened<bytes, is_signed>(value));
    }
  });
  for (int i = 0; i < items.count; ++i) SetPoison(step, items.first[i], poison[i]);
  return Outcome::kNext;
}

template <Space space, int bytes>
Outcome Store(Step& step) {
  const Items items(OperandAt(step, 1));
  Row<uint64_t> addresses;
  Addresses(step, OperandAt(step, 0), &addresses);
  const int64_t total = int64_t{bytes} * items.count;
  const Actor actor = ActorOf(step);
  for (int i = 0; i < items.count; ++i) {
    const Operand& item = items.first[i];
    const uint32_t poison = PoisonOf(step, item);
    Row<uint64_t> wide;
    Row<uint32_t> narrow;
    const uint64_t* wide_row = bytes == 8 ? Source<uint64_t>(step, item, &wide) : nullptr;
    const uint32_t* row = bytes == 8 ? nullptr : Source<uint32_t>(step, item, &narrow);
    ForLanes(step.mask, [&](int lane) {
      Place place = At<space>(step, addresses.lane[lane], total);
      if (i == 0) Touch(step.machine, place, total, true, actor, step.warp.view);
      place.data += i * bytes, place.marks += i * bytes, place.offset += i * bytes;
      const void* value = bytes == 8 ? static_cast<const void*>(wide_row + lane) : row + lane;
      WriteBytes(step.machine, place, bytes, value, poison >> lane & 1);
    });
  }
  return Outcome::kNext;
}

template <int bytes, bool is_signed>
Outcome LoadParameter(Step& step) {
  const Items items(OperandAt(step, 0));
  const Operand& address = OperandAt(step, 1);
  if (address.kind != OperandKind::kParameter) throw Error("a parameter is read by an address");
  const auto& parameters = step.warp.cta->grid->parameters;
  for (int i = 0; i < items.count; ++i) {
    const int64_t offset = address.value + int64_t{bytes} * i;
    if (offset < 0 || offset + bytes > static_cast<int64_t>(parameters.size()))
      throw Error("outside of the parameters");
    uint64_t value = 0;
    std::memcpy(&value, parameters.data() + offset, bytes);
    ForLanes(step.mask, [&](int lane) { Assign(step, items.first[i], lane, Widened<bytes, is_signed>(value)); });
    SetPoison(step, items.first[i], 0);
  }
  return Outcome::kNext;
}

// --- Atomic operations --------------------------------------------------------------------------------------------

float AddFlushed(float a, float b) { return Flushed(Canonical(Flushed(a) + Flushed(b))); }  // as on global memory

uint32_t AddF32(uint32_t a, uint32_t b) { return BitsOf(AddFlushed(Float(a), Float(b))); }
uint32_t AddInteger(uint32_t a, uint32_t b) { return a + b; }
uint32_t AddBf16x2(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int half = 0; half < 32; half += 16) {
    const double sum = static_cast<double>(FromBf16(a >> half & 0xFFFF)) + FromBf16(b >> half & 0xFFFF);
    result |= ToBf16(sum) << half;
  }
  return result;
}

using Combine = uint32_t (*)(uint32_t, uint32_t);

// red: asynchronous, in no order with others; each word on its own.
class Reduction : public AsyncOperation {
 public:
  Reduction(Step& step, Combine combine)
      : AsyncOperation(step), combine_(combine), items_(Items(OperandAt(step, 1)).count) {
    global_only = true;
    Addresses(step, OperandAt(step, 0), &addresses_);
    const Items items(OperandAt(step, 1));
    for (int i = 0; i < items_; ++i) {
      Row<uint32_t> scratch;
      poison_[i] = PoisonOf(step, items.first[i]);
      std::memcpy(values_[i].lane, Source<uint32_t>(step, items.first[i], &scratch), sizeof values_[i].lane);
    }
    ForLanes(lanes, [&](int lane) { At(step.machine, lane); });  // a wrong address is found now
    if (step.machine.checker()) {
      actor = ActorOf(step, Access::kAtomic);
    }
  }

  void Perform(Machine& machine) override {
    ForLanes(lanes, [&](int lane) {
      Place place = At(machine, lane);
      Touch(machine, place, 4 * items_, true, actor, view);
      for (int i = 0; i < items_; ++i, place.data += 4, place.marks += 4, place.offset += 4) {
        uint32_t old;
        const bool poison = ReadBytes(place, 4, &old) || poison_[i] >> lane & 1;
        const uint32_t value = combine_(old, values_[i].lane[lane]);
        WriteBytes(machine, place, 4, &value, poison);
      }
    });
  }

 private:
  Place At(Machine& machine, int lane) const {
    return machine.memory().At(addresses_.lane[lane], 4 * items_, 4 * items_);
  }

  Combine combine_;
  int items_;
  Row<uint64_t> addresses_;
  Row<uint32_t> values_[4];
  uint32_t poison_[4] = {};
};

template <uint32_t (*combine)(uint32_t, uint32_t)>
Outcome Reduce(Step& step) {
  step.machine.Issue(std::make_shared<Reduction>(step, combine));
  return Outcome::kNext;
}

template <Space space, uint32_t (*combine)(uint32_t, uint32_t)>
Outcome Atomic(Step& step) {
  const Operand& result = OperandAt(step, 0);
  Row<uint64_t> addresses;
  Addresses(step, OperandAt(step, 1), &addresses);
  Row<uint32_t> scratch, olds;
  const uint32_t* values = Source<uint32_t>(step, OperandAt(step, 2), &scratch);
  const uint32_t value_poison = PoisonOf(step, OperandAt(step, 2));
  uint32_t poison = 0;
  const Actor actor = ActorOf(step, Access::kAtomic);
  ForLanes(step.mask, [&](int lane) {
    const Place place = At<space>(step, addresses.lane[lane], 4);
    Touch(step.machine, place, 4, true, actor, step.warp.view);
    const bool old_poison = ReadBytes(place, 4, &olds.lane[lane]);
    const uint32_t value = combine(olds.lane[lane], values[lane]);
    WriteBytes(step.machine, place, 4, &value, old_poison || value_poison >> lane & 1);
    if (old_poison) poison |= 1u << lane;
  });
  uint32_t* target = Target<uint32_t>(step, result);
  ForLanes(step.mask, [&](int lane) { target[lane] = olds.lane[lane]; });
  SetPoison(step, result, poison);
  return Outcome::kNext;
}

// --- The table ----------------------------------------------------------------------------------------------------

template <int bytes, bool is_signed>
void RegisterType(const std::string& type) {
  for (const std::string vector : {"", ".v2", ".v4"}) {
    if (bytes * (vector.empty() ? 1 : vector[2] - '0') > 16) continue;
    for (const std::string cache :
         {"", ".nc", ".cs", ".L1::no_allocate", ".L1::no_allocate.L2::128B", ".nc.L1::no_allocate"}) {
      Register("ld.global" + cache + vector + "." + type, Load<Space::kGlobal, bytes, is_signed>);
    }
    Register("ld.relaxed.gpu.global" + vector + "." + type, Load<Space::kGlobal, bytes, is_signed, Access::kRelaxed>);
    Register("ld.shared" + vector + "." + type, Load<Space::kShared, bytes, is_signed>);
    Register("ld.param" + vector + "." + type, LoadParameter<bytes, is_signed>);
    for (const std::string cache : {"", ".cs", ".L1::no_allocate"}) {
      Register("st.global" + cache + vector + "." + type, Store<Space::kGlobal, bytes>);
    }
    Register("st.shared" + vector + "." + type, Store<Space::kShared, bytes>);
  }
}

}  // namespace

void RegisterMemory() {
  for (const std::string type : {"b8", "u8"}) RegisterType<1, false>(type);
  for (const std::string type : {"b16", "u16"}) RegisterType<2, false>(type);
  for (const std::string type : {"b32", "u32", "f32"}) RegisterType<4, false>(type);
  RegisterType<4, true>("s32");  // into a wider register with its sign
  for (const std::string type : {"b64", "u64", "s64"}) RegisterType<8, false>(type);
  RegisterType<1, true>("s8");
  RegisterType<2, true>("s16");
  Register("red.relaxed.gpu.global.add.f32", Reduce<AddF32>);
  Register("red.relaxed.gpu.global.add.v2.f32", Reduce<AddF32>);
  Register("red.relaxed.gpu.global.add.v4.f32", Reduce<AddF32>);
  Register("red.relaxed.gpu.global.add.noftz.bf16x2", Reduce<AddBf16x2>);
  Register("red.relaxed.gpu.global.add.noftz.v2.bf16x2", Reduce<AddBf16x2>);
  Register("red.relaxed.gpu.global.add.noftz.v4.bf16x2", Reduce<AddBf16x2>);
  Register("atom.relaxed.gpu.global.add.s32", Atomic<Space::kGlobal, AddInteger>);
  Register("atom.relaxed.gpu.global.add.u32", Atomic<Space::kGlobal, AddInteger>);
  Register("atom.global.add.s32", Atomic<Space::kGlobal, AddInteger>);
  Register("atom.global.add.u32", Atomic<Space::kGlobal, AddInteger>);
  Register("atom.shared.add.s32", Atomic<Space::kShared, AddInteger>);
  Register("atom.shared.add.u32", Atomic<Space::kShared, AddInteger>);
}

}  // namespace emulator
