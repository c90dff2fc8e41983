// Matrices of a warp: 8 x 8 words of 16 bits from shared memory, and products of 16 x 8 x 16, bf16 with fp32 sums.
//
// A sum's 16 products are added exactly and rounded once, as in wgmma.cc.

#include "accesses.h"
#include "numbers.h"
#include "operands.h"

namespace emulator {
namespace {

const Operand& Item(const Operand& operand, size_t index, size_t count) {
  if (operand.kind != OperandKind::kVector || operand.items.size() != count) throw Error("so many registers");
  return operand.items[index];
}

// Lane 8*i + r has the address of row r of matrix i; word i of lane 4*r + q is values 2*q, 2*q + 1 of that row.
Outcome LoadMatrices(Step& step) {
  const Operand& result = OperandAt(step, 0);
  Row<uint64_t> addresses;
  Addresses(step, OperandAt(step, 1), &addresses);
  const Actor actor = ActorOf(step);
  for (size_t i = 0; i < 4; ++i) {
    const Operand& item = Item(result, i, 4);
    uint32_t poison = 0;
    uint32_t* target = Target<uint32_t>(step, item);
    for (int row = 0; row < 8; ++row) {
      Place place = step.warp.cta->shared.At(addresses.lane[8 * static_cast<int>(i) + row], 16, 16);
      Touch(step.machine, place, 16, false, actor, step.warp.view);
      for (int q = 0; q < 4; ++q, place.data += 4, place.marks += 4, place.offset += 4) {
        if (ReadBytes(place, 4, &target[4 * row + q])) poison |= 1u << (4 * row + q);
      }
    }
    SetPoison(step, item, poison);
  }
  return Outcome::kNext;
}

// Registers i of A: row lane/4 + 8*(i%2), k 2*(lane%4) + 8*(i/2); of B: the same k, column lane/4; of the sums: rows as
// A, column 2*(lane%4) + i%2.
Outcome Multiply(Step& step) {
  constexpr int kRows = 16, kColumns = 8, kK = 16;
  float a[kRows][kK], b[kK][kColumns];
  uint32_t a_poison = 0, b_poison = 0;  // by row, by column
  Row<uint32_t> scratch;
  for (int i = 0; i < 6; ++i) {
    const bool is_a = i < 4;
    const int j = is_a ? i / 2 : i - 4;
    const Operand& item = is_a ? Item(OperandAt(step, 1), static_cast<size_t>(i), 4)
                               : Item(OperandAt(step, 2), static_cast<size_t>(i - 4), 2);
    const uint32_t poison = PoisonOf(step, item);
    const uint32_t* words = Source<uint32_t>(step, item, &scratch);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int k = lane % 4 * 2 + 8 * j, line = lane / 4 + (is_a ? 8 * (i % 2) : 0);
      for (int half = 0; half < 2; ++half) {
        (is_a ? a[line][k + half] : b[k + half][line]) = FromBf16(words[lane] >> 16 * half & 0xFFFF);
      }
      if (poison >> lane & 1) (is_a ? a_poison : b_poison) |= 1u << line;
    }
  }
  Row<float> sums[4];
  uint32_t poison[4] = {};
  for (size_t i = 0; i < 4; ++i) {
    const Operand& item = Item(OperandAt(step, 3), i, 4);
    poison[i] = PoisonOf(step, item);
    Row<float> before;
    const float* old = Source<float>(step, item, &before);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int r = lane / 4 + 8 * static_cast<int>(i / 2), n = lane % 4 * 2 + static_cast<int>(i % 2);
      double sum = 0.0;
      for (int k = 0; k < kK; ++k) sum += static_cast<double>(a[r][k]) * static_cast<double>(b[k][n]);
      sums[i].lane[lane] = Canonical(static_cast<float>(sum + static_cast<double>(old[lane])));
      if (a_poison >> r & 1 || b_poison >> n & 1) poison[i] |= 1u << lane;
    }
  }
  for (size_t i = 0; i < 4; ++i) {  // results may be the registers of operands
    const Operand& item = Item(OperandAt(step, 0), i, 4);
    float* target = Target<float>(step, item);
    for (int lane = 0; lane < kLanes; ++lane) target[lane] = sums[i].lane[lane];
    SetPoison(step, item, poison[i]);
  }
  return Outcome::kNext;
}

}  // namespace

void RegisterMatrices() {
  Register("ldmatrix.sync.aligned.m8n8.x4.shared.b16", LoadMatrices, true);
  Register("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", Multiply, true);
}

}  // namespace emulator
