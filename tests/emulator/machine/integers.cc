// Integer and logical operations, comparisons, selections and moves.

#include <algorithm>
#include <bit>

#include "step.h"

namespace emulator {
namespace {

using u32 = uint32_t;
using s32 = int32_t;
using u64 = uint64_t;
using s64 = int64_t;

// 16-bit values lie zero-extended in 32 bits.
u32 Low16(u32 value) { return value & 0xFFFF; }
s32 Signed16(u32 value) { return static_cast<int16_t>(value); }

template <typename T>
constexpr int kBits = static_cast<int>(8 * sizeof(T));

template <typename T>
T ShiftLeft(T value, u32 amount) {
  return amount >= static_cast<u32>(kBits<T>) ? T{0} : static_cast<T>(value << amount);
}

template <typename T>
T ShiftRight(T value, u32 amount) {  // of a signed type: with the sign
  return static_cast<T>(value >> std::min<u32>(amount, static_cast<u32>(kBits<T>) - 1)) *
         static_cast<T>(std::is_signed_v<T> || amount < static_cast<u32>(kBits<T>));
}

template <typename T>
T Divide(T a, T b) {  // what PTX leaves open is all ones
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && b == static_cast<T>(-1))
    return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
  return a / b;
}

template <typename T>
T Remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return a % b;
}

// A number for each bit of a truth table, as PTX has it.
u32 Lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

u32 Permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 pick = selector >> (4 * i) & 15;
    u32 byte = static_cast<u32>(bytes >> (8 * (pick & 7))) & 0xFF;
    if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << (8 * i);
  }
  return result;
}

u32 ExtractBits(u32 value, u32 start, u32 length) {
  start &= 0xFF, length &= 0xFF;
  if (start > 31 || length == 0) return 0;
  return (value >> start) & (length >= 32 ? ~0u : (1u << length) - 1);
}

s32 ExtractSigned(u32 value, u32 start, u32 length) {
  start &= 0xFF, length &= 0xFF;
  if (length == 0) return 0;
  const u32 last = std::min(31u, start + length - 1);
  const u32 sign = value >> last & 1;
  u32 bits = ExtractBits(value, start, length);
  const u32 have = start > 31 ? 0 : std::min(length, 32 - start);
  if (sign && have < 32) bits |= ~0u << have;
  return static_cast<s32>(bits);
}

u32 InsertBits(u32 bits, u32 into, u32 start, u32 length) {
  start &= 0xFF, length &= 0xFF;
  if (start > 31 || length == 0) return into;
  const u32 mask = (length >= 32 ? ~0u : (1u << length) - 1) << start;
  return (into & ~mask) | (bits << start & mask);
}

// --- Comparisons --------------------------------------------------------------------------------------------------

// What a comparison is joined with a predicate by: the variant of its operation.
enum Join { kNone, kAnd, kOr, kXor };

template <typename T, typename F>
Handler Comparison(F) {
  return [](Step& step) {
    Row<T> first, second;
    const Operand &a = OperandAt(step, 1), &b = OperandAt(step, 2);
    uint32_t poison = PoisonOf(step, a) | PoisonOf(step, b);
    const T *left = Source<T>(step, a, &first), *right = Source<T>(step, b, &second);
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(F{}(left[lane], right[lane])) << lane;
    const int join = step.instruction.operation->variant;
    if (join != kNone) {
      const Operand& other = OperandAt(step, 3);
      const uint32_t joined = Bits(step, other), other_poison = PoisonOf(step, other);
      // What one side decides alone is known.
      const uint32_t decides = join == kAnd ? 0 : kAllLanes;
      const uint32_t decided = join == kXor ? 0 : (~poison & ~(bits ^ decides)) | (~other_poison & ~(joined ^ decides));
      poison = (poison | other_poison) & ~decided;
      bits = join == kAnd ? bits & joined : join == kOr ? bits | joined : bits ^ joined;
    }
    SetBits(step, OperandAt(step, 0), bits, poison);
    return Outcome::kNext;
  };
}

template <typename T, typename F>
void RegisterComparison(const std::string& comparison, const std::string& type, F f) {
  const std::string name = "setp." + comparison + ".";
  Register(name + type, Comparison<T>(f), false, kNone);
  Register(name + "and." + type, Comparison<T>(f), false, kAnd);
  Register(name + "or." + type, Comparison<T>(f), false, kOr);
  Register(name + "xor." + type, Comparison<T>(f), false, kXor);
}

template <typename T>
void RegisterOrderings(const std::string& type) {
  RegisterComparison<T>("eq", type, [](T a, T b) { return a == b; });
  RegisterComparison<T>("ne", type, [](T a, T b) { return a != b; });
  RegisterComparison<T>("lt", type, [](T a, T b) { return a < b; });
  RegisterComparison<T>("le", type, [](T a, T b) { return a <= b; });
  RegisterComparison<T>("gt", type, [](T a, T b) { return a > b; });
  RegisterComparison<T>("ge", type, [](T a, T b) { return a >= b; });
}

void RegisterComparisons() {
  RegisterOrderings<s32>("s32");
  RegisterOrderings<u32>("u32");
  RegisterOrderings<s64>("s64");
  RegisterOrderings<u64>("u64");
  RegisterOrderings<float>("f32");
  for (const std::string type : {"b16", "s16", "u16"}) {
    RegisterComparison<u32>("eq", type, [](u32 a, u32 b) { return Low16(a) == Low16(b); });
    RegisterComparison<u32>("ne", type, [](u32 a, u32 b) { return Low16(a) != Low16(b); });
  }
  RegisterComparison<u32>("lt", "s16", [](u32 a, u32 b) { return Signed16(a) < Signed16(b); });
  RegisterComparison<u32>("gt", "s16", [](u32 a, u32 b) { return Signed16(a) > Signed16(b); });
  RegisterComparison<u32>("lt", "u16", [](u32 a, u32 b) { return Low16(a) < Low16(b); });
  RegisterComparison<u32>("gt", "u16", [](u32 a, u32 b) { return Low16(a) > Low16(b); });
  RegisterComparison<u32>("eq", "b32", [](u32 a, u32 b) { return a == b; });
  RegisterComparison<u32>("ne", "b32", [](u32 a, u32 b) { return a != b; });
  RegisterComparison<u64>("eq", "b64", [](u64 a, u64 b) { return a == b; });
  RegisterComparison<u64>("ne", "b64", [](u64 a, u64 b) { return a != b; });
  RegisterComparison<float>("equ", "f32", [](float a, float b) { return !(a < b) && !(a > b); });
  RegisterComparison<float>("neu", "f32", [](float a, float b) { return !(a == b); });
  RegisterComparison<float>("ltu", "f32", [](float a, float b) { return !(a >= b); });
  RegisterComparison<float>("leu", "f32", [](float a, float b) { return !(a > b); });
  RegisterComparison<float>("gtu", "f32", [](float a, float b) { return !(a <= b); });
  RegisterComparison<float>("geu", "f32", [](float a, float b) { return !(a < b); });
  RegisterComparison<float>("num", "f32", [](float a, float b) { return a == a && b == b; });
  RegisterComparison<float>("nan", "f32", [](float a, float b) { return !(a == a && b == b); });
}

// --- Predicates, selections, moves --------------------------------------------------------------------------------

Outcome AndPredicates(Step& step) {
  const Operand &a = OperandAt(step, 1), &b = OperandAt(step, 2);
  const uint32_t left = Bits(step, a), right = Bits(step, b), p = PoisonOf(step, a), q = PoisonOf(step, b);
  SetBits(step, OperandAt(step, 0), left & right, (p | q) & ~(~p & ~left) & ~(~q & ~right));
  return Outcome::kNext;
}

Outcome OrPredicates(Step& step) {
  const Operand &a = OperandAt(step, 1), &b = OperandAt(step, 2);
  const uint32_t left = Bits(step, a), right = Bits(step, b), p = PoisonOf(step, a), q = PoisonOf(step, b);
  SetBits(step, OperandAt(step, 0), left | right, (p | q) & ~(~p & left) & ~(~q & right));
  return Outcome::kNext;
}

Outcome XorPredicates(Step& step) {
  const Operand &a = OperandAt(step, 1), &b = OperandAt(step, 2);
  SetBits(step, OperandAt(step, 0), Bits(step, a) ^ Bits(step, b), PoisonOf(step, a) | PoisonOf(step, b));
  return Outcome::kNext;
}

Outcome NotPredicate(Step& step) {
  const Operand& a = OperandAt(step, 1);
  SetBits(step, OperandAt(step, 0), ~Bits(step, a), PoisonOf(step, a));
  return Outcome::kNext;
}

Outcome MovePredicate(Step& step) {
  const Operand& a = OperandAt(step, 1);
  SetBits(step, OperandAt(step, 0), Bits(step, a), PoisonOf(step, a));
  return Outcome::kNext;
}

template <typename T>
Outcome Select(Step& step) {
  Row<T> first, second;
  const Operand &a = OperandAt(step, 1), &b = OperandAt(step, 2), &choice = OperandAt(step, 3);
  const uint32_t bits = Bits(step, choice);
  const uint32_t poison = PoisonOf(step, choice) | (PoisonOf(step, a) & bits) | (PoisonOf(step, b) & ~bits);
  const T *left = Source<T>(step, a, &first), *right = Source<T>(step, b, &second);
  T* target = Target<T>(step, OperandAt(step, 0));
  ForLanes(step.mask, [&](int lane) { target[lane] = bits >> lane & 1 ? left[lane] : right[lane]; });
  SetPoison(step, OperandAt(step, 0), poison);
  return Outcome::kNext;
}

// A register from equal parts, the lowest first, and parts from a register.
template <typename Whole>
void Pack(Step& step, const Operand& result, const Operand& vector) {
  const int part_bits = kBits<Whole> / static_cast<int>(vector.items.size());
  Whole* target = Target<Whole>(step, result);
  Row<Whole> value{};
  uint32_t poison = 0;
  for (size_t i = 0; i < vector.items.size(); ++i) {
    Row<u32> scratch;
    poison |= PoisonOf(step, vector.items[i]);
    const u32* part = Source<u32>(step, vector.items[i], &scratch);
    const u32 keep = part_bits == 32 ? ~0u : (1u << part_bits) - 1;
    for (int lane = 0; lane < kLanes; ++lane) {
      value.lane[lane] |= static_cast<Whole>(part[lane] & keep) << (part_bits * static_cast<int>(i));
    }
  }
  ForLanes(step.mask, [&](int lane) { target[lane] = value.lane[lane]; });
  SetPoison(step, result, poison);
}

template <typename Whole>
void Unpack(Step& step, const Operand& vector, const Operand& source) {
  const int part_bits = kBits<Whole> / static_cast<int>(vector.items.size());
  const u32 keep = part_bits == 32 ? ~0u : (1u << part_bits) - 1;
  Row<Whole> scratch, copy;
  const uint32_t poison = PoisonOf(step, source);
  const Whole* value = Source<Whole>(step, source, &scratch);
  std::copy(value, value + kLanes, copy.lane);  // a part may be the register itself
  for (size_t i = 0; i < vector.items.size(); ++i) {
    if (vector.items[i].kind == OperandKind::kNone) continue;
    u32* target = Target<u32>(step, vector.items[i]);
    ForLanes(step.mask, [&](int lane) {
      target[lane] = static_cast<u32>(copy.lane[lane] >> (part_bits * static_cast<int>(i))) & keep;
    });
    SetPoison(step, vector.items[i], poison);
  }
}

template <typename T>
Outcome Move(Step& step) {
  const Operand &result = OperandAt(step, 0), &source = OperandAt(step, 1);
  const size_t parts = std::max(result.items.size(), source.items.size());
  if (parts != 0 && parts != 2 && parts != 4) throw Error("a move of so many parts");
  if (result.kind == OperandKind::kVector) {
    Unpack<T>(step, result, source);
  } else if (source.kind == OperandKind::kVector) {
    Pack<T>(step, result, source);
  } else {
    Row<T> scratch;
    const uint32_t poison = PoisonOf(step, source);
    const T* value = Source<T>(step, source, &scratch);
    T* target = Target<T>(step, result);
    const T keep = result.bytes == 2 ? static_cast<T>(0xFFFF) : static_cast<T>(~T{0});
    ForLanes(step.mask, [&](int lane) { target[lane] = value[lane] & keep; });
    SetPoison(step, result, poison);
  }
  return Outcome::kNext;
}

// --- The table ----------------------------------------------------------------------------------------------------

template <typename T>
void RegisterArithmetic(const std::string& type) {
  using U = std::make_unsigned_t<T>;
  Register("add." + type, Elementwise<U, U, U>([](U a, U b) { return static_cast<U>(a + b); }));
  Register("sub." + type, Elementwise<U, U, U>([](U a, U b) { return static_cast<U>(a - b); }));
  Register("mul.lo." + type, Elementwise<U, U, U>([](U a, U b) { return static_cast<U>(a * b); }));
  Register("mad.lo." + type, Elementwise<U, U, U, U>([](U a, U b, U c) { return static_cast<U>(a * b + c); }));
  Register("div." + type, Elementwise<T, T, T>([](T a, T b) { return Divide(a, b); }));
  Register("rem." + type, Elementwise<T, T, T>([](T a, T b) { return Remainder(a, b); }));
  Register("min." + type, Elementwise<T, T, T>([](T a, T b) { return std::min(a, b); }));
  Register("max." + type, Elementwise<T, T, T>([](T a, T b) { return std::max(a, b); }));
  Register("shr." + type, Elementwise<T, T, u32>([](T a, u32 n) { return ShiftRight(a, n); }));
  Register("mul.hi." + type, Elementwise<T, T, T>([](T a, T b) {
             using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
             return static_cast<T>(static_cast<Wide>(a) * b >> kBits<T>);
           }));
}

void Register16() {
  for (const std::string type : {"s16", "u16"}) {
    Register("add." + type, Elementwise<u32, u32, u32>([](u32 a, u32 b) { return Low16(a + b); }));
    Register("sub." + type, Elementwise<u32, u32, u32>([](u32 a, u32 b) { return Low16(a - b); }));
    Register("mul.lo." + type, Elementwise<u32, u32, u32>([](u32 a, u32 b) { return Low16(a * b); }));
  }
  Register("shr.s16", Elementwise<u32, u32, u32>(
                          [](u32 a, u32 n) { return Low16(static_cast<u32>(Signed16(a) >> std::min(n, 15u))); }));
  Register("shr.u16", Elementwise<u32, u32, u32>([](u32 a, u32 n) { return n > 15 ? 0 : Low16(a) >> n; }));
  Register("shl.b16", Elementwise<u32, u32, u32>([](u32 a, u32 n) { return n > 15 ? 0 : Low16(a << n); }));
  Register("and.b16", Elementwise<u32, u32, u32>([](u32 a, u32 b) { return Low16(a & b); }));
  Register("or.b16", Elementwise<u32, u32, u32>([](u32 a, u32 b) { return Low16(a | b); }));
  Register("xor.b16", Elementwise<u32, u32, u32>([](u32 a, u32 b) { return Low16(a ^ b); }));
  Register("not.b16", Elementwise<u32, u32>([](u32 a) { return Low16(~a); }));
}

template <typename T>
void RegisterLogic(const std::string& type) {
  Register("and." + type, Elementwise<T, T, T>([](T a, T b) { return a & b; }));
  Register("or." + type, Elementwise<T, T, T>([](T a, T b) { return a | b; }));
  Register("xor." + type, Elementwise<T, T, T>([](T a, T b) { return a ^ b; }));
  Register("not." + type, Elementwise<T, T>([](T a) { return static_cast<T>(~a); }));
  Register("shl." + type, Elementwise<T, T, u32>([](T a, u32 n) { return ShiftLeft(a, n); }));
}

}  // namespace

void RegisterIntegers() {
  RegisterArithmetic<s32>("s32");
  RegisterArithmetic<u32>("u32");
  RegisterArithmetic<s64>("s64");
  RegisterArithmetic<u64>("u64");
  Register16();
  RegisterLogic<u32>("b32");
  RegisterLogic<u64>("b64");
  RegisterComparisons();
  Register("mul.wide.s32", Elementwise<s64, s32, s32>([](s32 a, s32 b) { return static_cast<s64>(a) * b; }));
  Register("mul.wide.u32", Elementwise<u64, u32, u32>([](u32 a, u32 b) { return static_cast<u64>(a) * b; }));
  Register("mul.wide.s16", Elementwise<s32, u32, u32>([](u32 a, u32 b) { return Signed16(a) * Signed16(b); }));
  Register("mul.wide.u16", Elementwise<u32, u32, u32>([](u32 a, u32 b) { return Low16(a) * Low16(b); }));
  Register("mad.wide.s32", Elementwise<u64, s32, s32, u64>(
                               [](s32 a, s32 b, u64 c) { return static_cast<u64>(static_cast<s64>(a) * b) + c; }));
  Register("mad.wide.u32", Elementwise<u64, u32, u32, u64>([](u32 a, u32 b, u64 c) { return u64{a} * b + c; }));
  Register("neg.s32", Elementwise<u32, u32>([](u32 a) { return 0 - a; }));
  Register("neg.s64", Elementwise<u64, u64>([](u64 a) { return 0 - a; }));
  Register("abs.s32", Elementwise<u32, u32>([](u32 a) { return a >> 31 ? 0 - a : a; }));
  Register("popc.b32", Elementwise<u32, u32>([](u32 a) { return static_cast<u32>(std::popcount(a)); }));
  Register("popc.b64", Elementwise<u32, u64>([](u64 a) { return static_cast<u32>(std::popcount(a)); }));
  Register("clz.b32", Elementwise<u32, u32>([](u32 a) { return static_cast<u32>(std::countl_zero(a)); }));
  Register("brev.b32", Elementwise<u32, u32>([](u32 a) {
             u32 result = 0;
             for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
             return result;
           }));
  Register("bfind.u32",
           Elementwise<u32, u32>([](u32 a) { return a == 0 ? ~0u : 31 - static_cast<u32>(std::countl_zero(a)); }));
  Register("shf.r.wrap.b32", Elementwise<u32, u32, u32, u32>([](u32 low, u32 high, u32 n) {
             return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> (n & 31));
           }));
  Register("shf.l.wrap.b32", Elementwise<u32, u32, u32, u32>([](u32 low, u32 high, u32 n) {
             return static_cast<u32>((static_cast<u64>(high) << 32 | low) << (n & 31) >> 32);
           }));
  Register("shf.r.clamp.b32", Elementwise<u32, u32, u32, u32>([](u32 low, u32 high, u32 n) {
             return static_cast<u32>((static_cast<u64>(high) << 32 | low) >> std::min(n, 32u));
           }));
  Register("shf.l.clamp.b32", Elementwise<u32, u32, u32, u32>([](u32 low, u32 high, u32 n) {
             return n >= 32 ? low : static_cast<u32>((static_cast<u64>(high) << 32 | low) << n >> 32);
           }));
  Register("lop3.b32",
           Elementwise<u32, u32, u32, u32, u32>([](u32 a, u32 b, u32 c, u32 t) { return Lop3(a, b, c, t); }));
  Register("prmt.b32", Elementwise<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return Permute(a, b, c); }));
  Register("bfe.u32", Elementwise<u32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return ExtractBits(a, b, c); }));
  Register("bfe.s32", Elementwise<s32, u32, u32, u32>([](u32 a, u32 b, u32 c) { return ExtractSigned(a, b, c); }));
  Register("bfi.b32",
           Elementwise<u32, u32, u32, u32, u32>([](u32 a, u32 b, u32 c, u32 d) { return InsertBits(a, b, c, d); }));
  Register("and.pred", AndPredicates);
  Register("or.pred", OrPredicates);
  Register("xor.pred", XorPredicates);
  Register("not.pred", NotPredicate);
  Register("mov.pred", MovePredicate);
  for (const std::string type : {"b16", "u16", "s16", "b32", "u32", "s32", "f32"}) {
    Register("selp." + type, Select<u32>);
    Register("mov." + type, Move<u32>);
  }
  for (const std::string type : {"b64", "u64", "s64"}) {
    Register("selp." + type, Select<u64>);
    Register("mov." + type, Move<u64>);
  }
}

}  // namespace emulator
