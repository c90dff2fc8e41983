// tcgen05.mma: products of 128 rows of A with N rows of B, with fp32 sums in tensor memory.
//
// The products of a step (64 values of e2m1 with their scales, or 16 of bf16) are added exactly, in double, and rounded
// to fp32 once, as they are added to the sum. A GPU may round otherwise; where all sums are exact it cannot.

#include <algorithm>

#include "numbers.h"
#include "operands.h"
#include "tensor.h"

namespace emulator {
namespace {

constexpr int kRows = 128, kMostColumns = 256;
constexpr int kStepBytes = 32;  // of a row of A or B

uint32_t Field(uint32_t bits, int first, int last) { return bits >> first & ((1u << (last - first + 1)) - 1); }

void NeedField(uint32_t bits, int first, int last, uint32_t wanted, const char* what) {
  if (Field(bits, first, last) != wanted) {
    throw Error("instruction descriptor " + Hex(bits) + ": bits " + std::to_string(first) + " to " +
                std::to_string(last) + " (" + what + ") are " + std::to_string(Field(bits, first, last)) +
                ", the emulator knows " + std::to_string(wanted));
  }
}

// N of an instruction descriptor, all other fields of which must be those of our products of `group` CTAs.
int ColumnsOf(uint32_t bits, bool fp4, int group) {
  const auto rows = static_cast<uint32_t>(kRows * group);
  if (fp4) {
    NeedField(bits, 0, 6, 0, "sparsity, reserved, id of B's scales");
    NeedField(bits, 7, 9, 1, "A is e2m1");
    NeedField(bits, 10, 12, 1, "B is e2m1");
    NeedField(bits, 24, 26, 0, "reserved");
    NeedField(bits, 27, 28, rows >> 7, "M");
    NeedField(bits, 29, 31, 0, "id of A's scales, K");
  } else {
    NeedField(bits, 0, 3, 0, "sparsity, saturation");
    NeedField(bits, 4, 6, 1, "sums are fp32");
    NeedField(bits, 7, 9, 1, "A is bf16");
    NeedField(bits, 10, 12, 1, "B is bf16");
    NeedField(bits, 24, 28, rows >> 4, "M");
    NeedField(bits, 29, 31, 0, "reserved, shift");
  }
  NeedField(bits, 13, 16, 0, "negated or transposed operands");
  NeedField(bits, 23, 23, 0, "type of the scales, or reserved");
  const int columns = static_cast<int>(Field(bits, 17, 22)) * 8;
  if (columns < 8 || columns > kMostColumns) throw Error("N is " + std::to_string(columns) + ", needs 8 to 256");
  if (columns % (8 * group) != 0) throw Error("N of two CTAs is a multiple of 16, not " + std::to_string(columns));
  return columns;
}

// A K-major operand in shared memory with the 128-byte swizzle.
struct Descriptor {
  explicit Descriptor(uint64_t bits = 0)
      : start((bits & 0x3FFF) << 4), stride(static_cast<int64_t>(bits >> 32 & 0x3FFF) << 4) {}

  static Descriptor Checked(uint64_t bits) {
    const Descriptor descriptor(bits);
    if (bits & (uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{0x1FF} << 52)) {
      throw Error("reserved bits of descriptor " + Hex(bits) + " are set");
    }
    if ((bits >> 46 & 7) != 1) throw Error("descriptor " + Hex(bits) + " is without its constant");
    if ((bits >> 61) != 2) throw Error("the emulator knows operands with the 128-byte swizzle only");
    if ((bits >> 16 & 0x3FFF) > 1) throw Error("the leading dimension's offset of a swizzled operand should be 1");
    if ((bits >> 49 & 7) != 0 || descriptor.start % 1024 > 128 - kStepBytes) {
      throw Error("the rows of an operand do not start at a multiple of 1024 bytes (descriptor " + Hex(bits) + ")");
    }
    return descriptor;
  }

  uint64_t start;
  int64_t stride;
};

// What both kinds of product share: operands that are read as the product is performed, and sums.
//
// With .cta_group::2 each of two CTAs has half the rows of A and of their sums, and half the rows of B, which both use.
class Product : public TensorOperation {
 public:
  Product(Step& step, bool fp4) : TensorOperation(step), sums_(AddressAt(step, 0)) {
    Span(step);
    const auto& operands = step.instruction.operands;
    const size_t expected = fp4 ? 7 : 5;
    if (operands.size() != expected)
      throw Error("the emulator knows products with so many operands only: " + std::to_string(expected));
    a_in_tensor_memory_ = operands[1].kind == OperandKind::kAddress;
    if (a_in_tensor_memory_) {
      if (fp4) throw Error("the emulator knows e2m1 in shared memory only");
      a_columns_ = AddressAt(step, 1);
      ForCtas([&] { Check(0, a_columns_.column, kStepBytes / 4); });
    } else {
      a_ = Descriptor::Checked(Uniform<uint64_t>(step, operands[1], "a descriptor"));
    }
    b_ = Descriptor::Checked(Uniform<uint64_t>(step, operands[2], "a descriptor"));
    columns_ = ColumnsOf(Uniform<uint32_t>(step, operands[3], "an instruction descriptor"), fp4, group());
    const Operand& accumulate = operands.back();
    NeedKnown(step, accumulate, "whether a product accumulates");
    accumulate_ = (Bits(step, accumulate) & step.mask) != 0;
    if (sums_.lane != 0 || a_columns_.lane != 0) throw Error("an operand starts at a lane that is not the first");
    ForCtas([&] { Check(0, sums_.column, columns_); });
    if (step.machine.checker()) {
      actor.component = TensorComponent(step, &step.warp.tensor_component, "the products and copies");
      actor.count = ++step.warp.tensor_count;
      actor.access = Access::kTensorProduct;
    }
  }

  // A later product of the thread must come after this one if it is of the same sums.
  bool SharesSums(const Product& other) const {
    return sums_.column < other.sums_.column + other.columns_ && other.sums_.column < sums_.column + columns_;
  }

 protected:
  static TensorAddress AddressAt(Step& step, size_t index) {
    return TensorAddress(static_cast<uint32_t>(UniformAddress(step, OperandAt(step, index))));
  }

  bool ReadA(Machine& machine, int row, uint8_t* bytes) const {
    if (!a_in_tensor_memory_) {
      return ReadSwizzledRow(machine, *at, a_.start, row, a_.stride, kStepBytes / 16, actor, view, bytes);
    }
    bool poison = false;
    for (int i = 0; i < kStepBytes / 4; ++i) {
      const uint32_t word = Read(machine, row, a_columns_.column + i, &poison);
      std::memcpy(bytes + 4 * i, &word, 4);
    }
    return poison;
  }

  bool ReadB(Machine& machine, int row, uint8_t* bytes) const {
    const int rows = columns_ / group();  // in each CTA
    Cta& cta = *ctas[static_cast<size_t>(row / rows)];
    return ReadSwizzledRow(machine, cta, b_.start, row % rows, b_.stride, kStepBytes / 16, actor, view, bytes);
  }

  void AddTo(Machine& machine, int row, int column, double sum, bool poison) const {
    TensorMemory& tensor = at->home->tensor;
    const int place = sums_.column + column;
    if (accumulate_) {
      poison |= tensor.mark(row, place) != kWritten;
      sum += static_cast<double>(Float(tensor.cell(row, place)));
    }
    Write(machine, row, place, BitsOf(Canonical(static_cast<float>(sum))), poison);
  }

  TensorAddress sums_, a_columns_{0};
  bool a_in_tensor_memory_ = false, accumulate_ = false;
  Descriptor a_, b_;
  int columns_ = 0;
};

class Bf16Product : public Product {
 public:
  explicit Bf16Product(Step& step) : Product(step, false) {}

  void Perform(Machine& machine) override {
    ForCtas([&] { Multiply(machine); });
  }

 private:
  void Multiply(Machine& machine) {
    constexpr int kK = kStepBytes / 2;
    static thread_local double b[kK][kMostColumns], sums[kMostColumns];
    static thread_local bool b_poison[kMostColumns];
    uint16_t values[kK];
    for (int n = 0; n < columns_; ++n) {
      b_poison[n] = ReadB(machine, n, reinterpret_cast<uint8_t*>(values));
      for (int k = 0; k < kK; ++k) b[k][n] = FromBf16(values[k]);
    }
    for (int row = 0; row < kRows; ++row) {
      const bool a_poison = ReadA(machine, row, reinterpret_cast<uint8_t*>(values));
      std::fill(sums, sums + columns_, 0.0);
      for (int k = 0; k < kK; ++k) {
        const double factor = FromBf16(values[k]);
        for (int n = 0; n < columns_; ++n) sums[n] += factor * b[k][n];
      }
      for (int n = 0; n < columns_; ++n) AddTo(machine, row, n, sums[n], a_poison || b_poison[n]);
    }
  }
};

class Fp4Product : public Product {
 public:
  explicit Fp4Product(Step& step) : Product(step, true), a_scales_(AddressAt(step, 4)), b_scales_(AddressAt(step, 5)) {
    if (a_scales_.lane != 0 || b_scales_.lane != 0) throw Error("scales start at a lane that is not the first");
    ForCtas([&] {
      Check(0, a_scales_.column, kRows / 32);
      Check(0, b_scales_.column, (columns_ + 31) / 32);
    });
  }

  void Perform(Machine& machine) override {
    ForCtas([&] { Multiply(machine); });
  }

 private:
  void Multiply(Machine& machine) {
    constexpr int kK = kStepBytes * 2, kBlocks = kK / 16;
    static thread_local float b[kK][kMostColumns], dots[kMostColumns];
    static thread_local double b_scales[kBlocks][kMostColumns], sums[kMostColumns];
    static thread_local bool b_poison[kMostColumns];
    uint8_t bytes[kStepBytes];
    double scales[kBlocks];
    for (int n = 0; n < columns_; ++n) {
      b_poison[n] = ReadB(machine, n, bytes);
      for (int k = 0; k < kK; ++k) b[k][n] = FromE2m1(bytes[k / 2] >> (4 * (k % 2)) & 15);
      b_poison[n] |= ReadScales(machine, b_scales_.column, n, scales);
      for (int i = 0; i < kBlocks; ++i) b_scales[i][n] = scales[i];
    }
    for (int row = 0; row < kRows; ++row) {
      bool a_poison = ReadA(machine, row, bytes);
      a_poison |= ReadScales(machine, a_scales_.column, row, scales);
      std::fill(sums, sums + columns_, 0.0);
      for (int block = 0; block < kBlocks; ++block) {
        std::fill(dots, dots + columns_, 0.0f);  // products are multiples of 1/4 up to 36: exact
        for (int k = 16 * block; k < 16 * block + 16; ++k) {
          const float factor = FromE2m1(bytes[k / 2] >> (4 * (k % 2)) & 15);
          for (int n = 0; n < columns_; ++n) dots[n] += factor * b[k][n];
        }
        for (int n = 0; n < columns_; ++n) {
          sums[n] += static_cast<double>(dots[n]) * (scales[block] * b_scales[block][n]);
        }
      }
      for (int n = 0; n < columns_; ++n) AddTo(machine, row, n, sums[n], a_poison || b_poison[n]);
    }
  }

  // The four scales of a row, which all four groups of 32 lanes must have alike.
  bool ReadScales(Machine& machine, int column, int row, double* scales) const {
    bool poison = false;
    const uint32_t word = Read(machine, row % 32, column + row / 32, &poison);
    for (int lane = row % 32 + 32; lane < TensorMemory::kTensorLanes; lane += 32) {
      if (Read(machine, lane, column + row / 32, &poison) != word && !poison) {
        throw Error("the scales of row " + std::to_string(row) + " differ between the groups of lanes");
      }
    }
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = word >> (8 * i) & 0xFF;
      if (code & 0x80 && !poison) throw Error("a scale of row " + std::to_string(row) + " has a sign");
      scales[i] = FromE4m3(code & 0x7F);
    }
    return poison;
  }

  TensorAddress a_scales_, b_scales_;
};

template <typename Kind>
Outcome Multiply(Step& step) {
  const int lane = OneThread(step);
  auto product = std::make_shared<Kind>(step);
  Operations before;  // copies, and products of the same sums
  for (const auto& earlier : step.warp.tensor[static_cast<size_t>(lane)]) {
    const auto* other = dynamic_cast<const Product*>(earlier.get());
    if (other == nullptr || product->SharesSums(*other)) before.push_back(earlier);
  }
  JoinPipeline(step, std::move(product), before);
  return Outcome::kNext;
}

}  // namespace

void RegisterTensorProducts() {
  for (const std::string collector : {"", ".collector::a::discard", ".collector::a::lastuse"}) {
    for (const int group : {1, 2}) {
      const std::string name = "tcgen05.mma.cta_group::" + std::to_string(group);
      Register(name + ".kind::f16" + collector, Multiply<Bf16Product>, false, group);
      Register(name + ".kind::mxf4nvf4.block_scale.block16" + collector, Multiply<Fp4Product>, false, group);
    }
  }
}

}  // namespace emulator
