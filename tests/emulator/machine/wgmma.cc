// wgmma: 64 x N x 16 products of a warpgroup, bf16 with fp32 sums. A warp computes its 16 rows by itself: A is in its
// own registers, and B in shared memory is only read.
//
// The 16 products of a sum are added exactly (in double), and the result is rounded to fp32 as it is added to the sum.
// A GPU may round otherwise; where all sums are exact it cannot.

#include <algorithm>

#include "numbers.h"
#include "operands.h"

namespace emulator {
namespace {

constexpr int kRows = 16, kK = 16, kMostColumns = 256;

struct Descriptor {
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3FFF) << 4), stride(static_cast<int64_t>(bits >> 32 & 0x3FFF) << 4) {
    if (bits >> 62 != 1) throw Error("the emulator knows operands with the 128-byte swizzle only");
    if ((bits >> 49 & 7) != 0) throw Error("the operand does not start at a multiple of 1024 bytes (base offset)");
    if (bits & ~((uint64_t{3} << 62) | (uint64_t{0x3FFF} << 32) | (uint64_t{0x3FFF} << 16) | 0x3FFF)) {
      throw Error("reserved bits of a descriptor are set");
    }
  }
  uint64_t start;
  int64_t stride;
};

class Product : public AsyncOperation {
 public:
  Product(Step& step, int columns) : AsyncOperation(step), columns_(columns) {
    const auto& operands = step.instruction.operands;
    if (operands.size() != 7) throw Error("a product with A in registers has 7 operands");
    const Operand &d = operands[0], &a = operands[1];
    if (static_cast<int>(d.items.size()) != columns / 2 || a.items.size() != 4) throw Error("so many registers");
    for (const Operand& item : d.items) sums_.push_back(item.reg);
    for (const Operand& item : a.items) a_.push_back(item.reg);
    b_ = Uniform<uint64_t>(step, operands[2], "a descriptor");
    NeedKnown(step, operands[3], "whether a product accumulates");
    const uint32_t accumulate = Bits(step, operands[3]);
    if (accumulate != 0 && accumulate != kAllLanes) throw Error("lanes differ in whether the product accumulates");
    accumulate_ = accumulate != 0;
    if (operands[4].value != 1 || operands[5].value != 1 || operands[6].value != 0) {
      throw Error("the emulator knows no negated or transposed operands");
    }
    Descriptor{b_};
    for (const int reg : sums_) Occupy(reg, true);
    for (const int reg : a_) Occupy(reg, false);
    if (Checker* checker = step.machine.checker()) {
      Warp& warp = step.warp;
      if (warp.product_component < 0) {
        warp.product_component = checker->NewComponent(
            warp.cta->grid->number, false,
            "the products of CTA " + std::to_string(warp.cta->index) + ", warp " + std::to_string(warp.index));
      }
      actor.component = warp.product_component;
      actor.count = ++warp.product_count;
      actor.access = Access::kAsync;
    }
  }

  void Perform(Machine& machine) override {
    const Program& program = *warp->cta->grid->program;
    const Descriptor descriptor(b_);
    float a[kRows][kK];
    uint32_t a_poison = 0;  // by row
    for (int i = 0; i < 4; ++i) {
      const auto* row = reinterpret_cast<const uint32_t*>(warp->row(program, a_[static_cast<size_t>(i)]));
      const uint32_t poison = warp->poison[static_cast<size_t>(a_[static_cast<size_t>(i)])];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int r = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        a[r][k] = FromBf16(row[lane] & 0xFFFF);
        a[r][k + 1] = FromBf16(row[lane] >> 16);
        if (poison >> lane & 1) a_poison |= 1u << r;
      }
    }
    static thread_local float b[kK][kMostColumns];
    static thread_local bool b_poison[kMostColumns];
    for (int n = 0; n < columns_; ++n) {
      uint8_t bytes[2 * kK];
      b_poison[n] = ReadSwizzledRow(machine, *warp->cta, descriptor.start, n, descriptor.stride, 2, actor, view, bytes);
      for (int k = 0; k < kK; ++k) {
        uint16_t bits;
        std::memcpy(&bits, bytes + 2 * k, 2);
        b[k][n] = FromBf16(bits);
      }
    }
    static thread_local double sums[kRows][kMostColumns];
    for (int r = 0; r < kRows; ++r) {
      std::fill(sums[r], sums[r] + columns_, 0.0);
      for (int k = 0; k < kK; ++k) {
        const double factor = a[r][k];
        for (int n = 0; n < columns_; ++n) sums[r][n] += factor * static_cast<double>(b[k][n]);
      }
    }
    for (int i = 0; i < columns_ / 2; ++i) {
      const int reg = sums_[static_cast<size_t>(i)];
      auto* row = reinterpret_cast<float*>(warp->row(program, reg));
      uint32_t& poison = warp->poison_in_products[static_cast<size_t>(reg)];
      if (!accumulate_) poison = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int r = lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
        const double sum = sums[r][n] + (accumulate_ ? static_cast<double>(row[lane]) : 0.0);
        row[lane] = Canonical(static_cast<float>(sum));
        if (a_poison >> r & 1 || b_poison[n]) poison |= 1u << lane;
      }
    }
  }

  // The warp has waited for it: its registers may be used.
  void Retire() {
    for (const int reg : sums_) {
      if (--warp->in_flight[static_cast<size_t>(reg)] == 0) {
        warp->poison[static_cast<size_t>(reg)] = warp->poison_in_products[static_cast<size_t>(reg)];
      }
    }
    for (const int reg : a_) warp->in_flight[static_cast<size_t>(reg)]--;
  }

 private:
  void Occupy(int reg, bool is_sum) {
    if (reg < 0) throw Error("an operand is no register");
    const auto at = static_cast<size_t>(reg);
    if (is_sum && warp->in_flight[at] == 0) {
      warp->poison_in_products[at] = warp->poison[at];
      warp->poison[at] = kAllLanes;
    }
    warp->in_flight[at]++;
  }

  int columns_;
  std::vector<int> sums_, a_;
  uint64_t b_ = 0;
  bool accumulate_ = false;
};

template <int columns>
Outcome Multiply(Step& step) {
  Warp& warp = step.warp;
  const auto product = std::make_shared<Product>(step, columns);
  Operations before;
  if (!warp.products.empty()) before.push_back(warp.products.back());
  warp.products.push_back(product);
  warp.product_groups[product.get()] = warp.open_products;
  step.machine.Issue(product, before);
  return Outcome::kNext;
}

Outcome Commit(Step& step) {
  step.warp.open_products++;
  return Outcome::kNext;
}

Outcome WaitForProducts(Step& step) {
  Warp& warp = step.warp;
  const auto most_pending = static_cast<uint32_t>(OperandAt(step, 0).value);
  size_t wanted = 0;  // they are in order
  while (wanted < warp.products.size() &&
         warp.product_groups[warp.products[wanted].get()] + most_pending < warp.open_products) {
    ++wanted;
  }
  if (wanted == 0) return Outcome::kNext;
  const std::shared_ptr<AsyncOperation> last = warp.products[wanted - 1];
  if (!last->done) return Machine::Block(step, [last] { return last->done; }, "its products");
  if (step.machine.checker()) {
    Checker::CompleteForSelf(warp.product_component, last->actor.count, &warp.view);
  }
  for (size_t i = 0; i < wanted; ++i) {
    static_cast<Product*>(warp.products[i].get())->Retire();
    warp.product_groups.erase(warp.products[i].get());
  }
  warp.products.erase(warp.products.begin(), warp.products.begin() + static_cast<int64_t>(wanted));
  return Outcome::kNext;
}

Outcome Fence(Step&) { return Outcome::kNext; }

template <int columns>
void RegisterWidths() {
  Register("wgmma.mma_async.sync.aligned.m64n" + std::to_string(columns) + "k16.f32.bf16.bf16", Multiply<columns>,
           true);
  if constexpr (columns > 8) RegisterWidths<columns - 8>();
}

}  // namespace

void RegisterWgmma() {
  RegisterWidths<kMostColumns>();
  Register("wgmma.fence.sync.aligned", Fence, true);
  Register("wgmma.commit_group.sync.aligned", Commit, true);
  Register("wgmma.wait_group.sync.aligned", WaitForProducts, true);
}

}  // namespace emulator
