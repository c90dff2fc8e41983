// Hostile calls of the CPU handler, meant to be built with -DJAX_MOE_SANITIZE=ON: `hostile_calls SEED COUNT`.
//
// A call is made valid first and then, usually, spoilt in one or more ways: an operand's or result's shape, rank, dtype
// or pointer, their number, an attribute's presence, type or value. Each spoilt call must be refused with
// INVALID_ARGUMENT and a message. Calls that are valid in form carry hostile contents (ids and offsets from anywhere in
// int32, random bits for scales, NaN weights); those must succeed, write all of the output, give zeros to tokens
// without a local expert, and give the same bits whatever the workspaces held before and whichever threads worked.
//
// The last line has a digest of all answers. It is the same for every compiler and instruction set.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "tests/call_frame.h"

extern "C" XLA_FFI_Error* JaxMoeFusedMoeCpu(XLA_FFI_CallFrame* call_frame);
extern "C" const char* JaxMoeCpuKernels();

namespace jax_moe::testing {
namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t Bits() {  // splitmix64
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int64_t Below(int64_t end) { return static_cast<int64_t>(Bits() % static_cast<uint64_t>(end)); }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  template <typename T>
  T Of(const std::vector<T>& choices) {
    return choices[static_cast<size_t>(Below(static_cast<int64_t>(choices.size())))];
  }

 private:
  uint64_t state_;
};

// Of everything that the handler answered: 64-bit FNV-1a over codes, messages and outputs.
class Digest {
 public:
  uint64_t value() const { return value_; }

  void Add(const Outcome& outcome, XLA_FFI_DataType out_dtype) {
    AddBytes(&outcome.code, sizeof(outcome.code));
    AddBytes(outcome.message.data(), outcome.message.size());
    if (outcome.code != XLA_FFI_Error_Code_OK) return;
    const std::vector<uint8_t>& out = outcome.results[0];
    if (out_dtype == XLA_FFI_DataType_BF16) {
      AddFloats<uint16_t>(out, 0x7F80);
    } else {
      AddFloats<uint32_t>(out, 0x7F800000);
    }
  }

 private:
  // All NaNs count as one: which sign and payload they get is the CPU's choice.
  template <typename T>
  void AddFloats(const std::vector<uint8_t>& out, T infinity) {
    for (size_t i = 0; i + sizeof(T) <= out.size(); i += sizeof(T)) {
      T bits;
      std::memcpy(&bits, out.data() + i, sizeof(T));
      const auto magnitude = static_cast<T>(bits & (std::numeric_limits<T>::max() >> 1));
      if (magnitude > infinity) bits = static_cast<T>(infinity + 1);
      AddBytes(&bits, sizeof(T));
    }
  }
  void AddBytes(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i < size; ++i) value_ = (value_ ^ bytes[i]) * 0x100000001B3u;
  }

  uint64_t value_ = 0xCBF29CE484222325u;
};

template <typename T, typename Generate>
void Fill(Buffer* buffer, const Generate& generate) {
  for (size_t i = 0; i + sizeof(T) <= buffer->bytes.size(); i += sizeof(T)) {
    const T value = generate();
    std::memcpy(buffer->bytes.data() + i, &value, sizeof(T));
  }
}

// A call that must be accepted, small enough that thousands run in seconds; contents are hostile.
HandlerCall ValidCall(Random* random) {
  constexpr auto kU8 = XLA_FFI_DataType_U8;
  constexpr auto kF8 = XLA_FFI_DataType_F8E4M3FN;
  constexpr auto kF32 = XLA_FFI_DataType_F32;
  constexpr auto kS32 = XLA_FFI_DataType_S32;
  constexpr auto kBF16 = XLA_FFI_DataType_BF16;
  const std::string activation = random->Of<std::string>({"swiglu", "geglu", "relu2", "situ"});
  const bool quantized = random->OneIn(2), dynamic = !quantized && random->OneIn(2), ordered = random->OneIn(2),
             input = random->OneIn(2);
  const int64_t t = random->Of<int64_t>({0, 1, 1, 2, 3, 5, 9}), k = random->Of<int64_t>({1, 2, 3, 4});
  const int64_t l = random->Of<int64_t>({1, 2, 3, 7}), p = activation == "relu2" ? 1 : 2;
  const int64_t h = 16 * (1 + random->Below(3)), i = 16 * (1 + random->Below(3));
  const bool out_is_bf16 = random->OneIn(2);
  const bool has_scales = quantized || random->OneIn(2);
  const auto optional = [&](bool present, std::vector<int64_t> dims) {
    return Buffer(kF32, present ? dims : std::vector<int64_t>{0});
  };

  HandlerCall call;
  call.operands = {
      Buffer(kBF16, {t, h}),
      Buffer(kS32, {t, k}),
      Buffer(kF32, {t, k}),
      Buffer(kS32, {}),
      Buffer(kU8, {l, p, i, h / 2}),
      Buffer(kF8, {l, p, i, h / 16}),
      Buffer(kF32, {l, p}),
      optional(has_scales, {}),
      optional(random->OneIn(2), {l, p, i}),
      Buffer(kU8, {l, h, i / 2}),
      Buffer(kF8, {l, h, i / 16}),
      Buffer(kF32, {l}),
      optional(has_scales, {l}),
      optional(random->OneIn(2), {l, h}),
  };
  call.results = {
      Buffer(out_is_bf16 ? kBF16 : kF32, {t, h}),
      Buffer(kS32, {t * k}),
      Buffer(kS32, {l + 1}),
      Buffer(kS32, {l}),
      Buffer(kF32, {input ? t * k : t, h}),
      Buffer(kF32, {t * k, i}),
      Buffer(kF32, {ordered       ? t * k
                    : out_is_bf16 ? t
                                  : 0,
                    h}),
  };
  if (dynamic) {
    call.results.push_back(Buffer(kF32, {input ? t * k : t}));
    call.results.push_back(Buffer(kF32, {t * k}));
  }
  const float infinity = std::numeric_limits<float>::infinity();
  call.attributes = {
      {"activation", activation},
      {"alpha", random->Of<float>({1.0f, 0.0f, -3.0f, infinity})},
      {"beta", random->Of<float>({0.0f, 1.0f, 4.0f, std::numeric_limits<float>::quiet_NaN()})},
      {"combine", ordered ? "ordered" : "atomic"},
      {"limit", random->Of<float>({infinity, 7.0f, 0.0f, -1.0f})},
      {"precision", dynamic                     ? "w4a4_dynamic"
                    : !quantized                ? "w4a16"
                    : input || random->OneIn(2) ? "w4a4"
                                                : "w4a4_rounded_x"},
      {"weight_on", input ? "input" : "output"},
  };

  for (Buffer& operand : call.operands) Fill<uint8_t>(&operand, [&] { return static_cast<uint8_t>(random->Bits()); });
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min(), kMax = std::numeric_limits<int32_t>::max();
  const auto offset = static_cast<int32_t>(random->Of<int64_t>({0, 0, 0, l, -1, kMin, kMax, kMax - l + 1}));
  Fill<int32_t>(&call.operands[3], [&] { return offset; });
  Fill<int32_t>(&call.operands[1], [&] {
    const int64_t near = int64_t{offset} - 1 + random->Below(l + 2);  // one below the local experts to one above
    return random->OneIn(6) || near < kMin || near > kMax ? random->Of<int32_t>({kMin, kMax, -1, 0, kMin + 1, 1 << 30})
                                                          : static_cast<int32_t>(near);
  });
  if (random->OneIn(2)) {  // half of the calls have scales and weights that are mostly finite
    for (size_t operand : {2, 6, 7, 11, 12}) {
      Fill<float>(&call.operands[operand],
                  [&] { return random->Of<float>({1.0f, 1e-3f, 0.0f, -1.0f, 1e-38f, 1e38f, -0.0f, 1e-44f}); });
    }
  }
  return call;
}

void Resize(Buffer* buffer) {
  constexpr int64_t kMostBytes = 1 << 16;
  int64_t size = buffer->ElementSize();
  for (int64_t dim : buffer->dims) {
    if (dim < 0 || __builtin_mul_overflow(size, dim, &size) || size > kMostBytes) {
      size = 1;  // too large to allocate: the handler must refuse it by its type alone
      break;
    }
  }
  buffer->bytes.resize(static_cast<size_t>(size));
}

// Changes one thing about a buffer that makes it wrong wherever it stands. Every size of a call is shared by at least
// two buffers, so changing it in one is always an error; only turning an operand into f32[0] is not, which says
// "absent".
void SpoilBuffer(Random* random, Buffer* buffer) {
  const Buffer before = *buffer;
  const auto is_absent = [](const Buffer& b) {
    return b.dtype == XLA_FFI_DataType_F32 && b.dims == std::vector<int64_t>{0};
  };
  if (is_absent(before)) {
    buffer->dims.assign(5, 1);
    Resize(buffer);
    return;
  }
  const auto rank = static_cast<int64_t>(before.dims.size());
  while (buffer->SameTypeAs(before) || is_absent(*buffer)) {
    *buffer = before;
    const int64_t axis = rank == 0 ? 0 : random->Below(rank);
    switch (random->Below(5)) {
      case 0:
        if (rank == 0) break;
        buffer->dims[axis] = random->Of<int64_t>(
            {before.dims[axis] + 1, before.dims[axis] - 1, before.dims[axis] * 2, before.dims[axis] / 2,
             before.dims[axis] + 16, 0, -1, -16, int64_t{1} << 31, int64_t{1} << 40,
             std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()});
        break;
      case 1:
        buffer->dims.push_back(random->Of<int64_t>({1, 0, 2}));
        break;
      case 2:
        if (rank != 0) buffer->dims.erase(buffer->dims.begin() + axis);
        break;
      case 3:
        buffer->dtype = random->Of<XLA_FFI_DataType>(
            {XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16, XLA_FFI_DataType_U8, XLA_FFI_DataType_S32,
             XLA_FFI_DataType_S64, XLA_FFI_DataType_F8E4M3FN, XLA_FFI_DataType_F8E5M2, XLA_FFI_DataType_F4E2M1FN,
             XLA_FFI_DataType_TOKEN, XLA_FFI_DataType_PRED, XLA_FFI_DataType_F16, XLA_FFI_DataType_INVALID});
        break;
      default:
        if (before.bytes.empty()) break;
        buffer->misalignment = before.ElementSize() > 1 && random->OneIn(2) ? 1 : 0;
        buffer->is_null = buffer->misalignment == 0;
        return;
    }
  }
  Resize(buffer);
}

void SpoilAttribute(Random* random, HandlerCall* call) {
  auto attribute = call->attributes.begin();
  std::advance(attribute, random->Below(static_cast<int64_t>(call->attributes.size())));
  const bool is_text = std::holds_alternative<std::string>(attribute->second);
  switch (random->Below(3)) {
    case 0:
      call->attributes.erase(attribute);
      return;
    case 1:
      attribute->second = int32_t{0};
      return;
    default:
      if (is_text) {
        const std::string text = std::get<std::string>(attribute->second);
        attribute->second =
            random->Of<std::string>({"", text + " ", text.substr(1), "W4A16", std::string(5000, 'x'), "\xff\0"});
      } else {
        attribute->second = std::string("1.0");
      }
  }
}

void Spoil(Random* random, HandlerCall* call) {
  const std::string& precision = std::get<std::string>(call->attributes["precision"]);
  const bool needs_scales = precision != "w4a16" && precision != "w4a4_dynamic";
  switch (random->Below(9)) {
    case 0:
      SpoilAttribute(random, call);
      return;
    case 8:
      if (needs_scales) {
        call->operands[random->Of<size_t>({7, 12})] = Buffer(XLA_FFI_DataType_F32, {0});
        return;
      }
      [[fallthrough]];
    case 1:
      call->operands.erase(call->operands.begin() + random->Below(static_cast<int64_t>(call->operands.size())));
      return;
    case 2:
      call->operands.push_back(random->Of(call->operands));
      return;
    case 3:
      if (random->OneIn(2)) {
        call->results.pop_back();
      } else {
        call->results.push_back(random->Of(call->results));
      }
      return;
    case 4: {
      const size_t index = static_cast<size_t>(random->Below(static_cast<int64_t>(call->results.size())));
      Buffer& result = call->results[index];
      const XLA_FFI_DataType before = result.dtype;
      SpoilBuffer(random, &result);
      const bool is_float = result.dtype == XLA_FFI_DataType_F32 || result.dtype == XLA_FFI_DataType_BF16;
      if (index == 0 && result.dtype != before && is_float) result.dtype = XLA_FFI_DataType_F16;  // either was right
      return;
    }
    default:
      SpoilBuffer(random, &call->operands[static_cast<size_t>(random->Below(int64_t(call->operands.size())))]);
  }
}

template <typename T>
T At(const Buffer& buffer, int64_t index) {
  T value;
  std::memcpy(&value, buffer.bytes.data() + index * sizeof(T), sizeof(T));
  return value;
}

// Whether the tokens without a local expert have rows of zeros.
bool SkippedTokensAreZero(const HandlerCall& call, const std::vector<uint8_t>& out) {
  const std::vector<int64_t>& shape = call.operands[1].dims;
  const int64_t offset = At<int32_t>(call.operands[3], 0), local_experts = call.operands[11].dims[0];
  for (int64_t token = 0; token < shape[0]; ++token) {
    bool is_local = false;
    for (int64_t slot = 0; slot < shape[1]; ++slot) {
      const int64_t id = At<int32_t>(call.operands[1], token * shape[1] + slot);
      is_local |= offset <= id && id < offset + local_experts;
    }
    const size_t row_bytes = out.size() / static_cast<size_t>(shape[0]);
    for (size_t i = 0; i < row_bytes && !is_local; ++i) {
      if (out[static_cast<size_t>(token) * row_bytes + i] != 0) return false;
    }
  }
  return true;
}

[[noreturn]] void Fail(const HandlerCall& call, const char* what, const Outcome& outcome) {
  std::fprintf(stderr, "%s: code %d, message '%s'\n", what, outcome.code, outcome.message.c_str());
  for (const auto* buffers : {&call.operands, &call.results}) {
    for (const Buffer& buffer : *buffers) {
      std::fprintf(stderr, "  dtype %d%s%s [", buffer.dtype, buffer.is_null ? " null" : "",
                   buffer.misalignment != 0 ? " misaligned" : "");
      for (int64_t dim : buffer.dims) std::fprintf(stderr, " %lld", static_cast<long long>(dim));
      std::fprintf(stderr, " ]\n");
    }
  }
  std::exit(1);
}

int Run(uint64_t seed, int64_t count) {
  Random random(seed);
  Digest digest;
  int64_t refused = 0, accepted = 0;
  for (int64_t n = 0; n < count; ++n) {
    HandlerCall call = ValidCall(&random);
    const bool spoilt = !random.OneIn(4);
    if (spoilt) Spoil(&random, &call);
    const Pool pool = random.Of<Pool>({Pool::kNone, Pool::kNone, Pool::kLate, Pool::kLate, Pool::kEager});
    for (Buffer& result : call.results) Fill<uint8_t>(&result, [] { return uint8_t{0xFF}; });  // NaN, or -1
    const Outcome outcome = Invoke(JaxMoeFusedMoeCpu, call, pool);
    digest.Add(outcome, call.results[0].dtype);
    if (spoilt) {
      if (outcome.code != XLA_FFI_Error_Code_INVALID_ARGUMENT) Fail(call, "a spoilt call was not refused", outcome);
      if (outcome.message.find("jax_moe: ") != 0) Fail(call, "a refusal does not say what is wrong", outcome);
      ++refused;
      continue;
    }
    if (outcome.code != XLA_FFI_Error_Code_OK) Fail(call, "a valid call was refused", outcome);
    if (!SkippedTokensAreZero(call, outcome.results[0])) Fail(call, "a token without an expert is not zero", outcome);
    for (Buffer& result : call.results) Fill<uint8_t>(&result, [&] { return static_cast<uint8_t>(random.Bits()); });
    const Outcome again = Invoke(JaxMoeFusedMoeCpu, call, Pool::kNone);
    if (again.results[0] != outcome.results[0]) Fail(call, "the output depends on what the results held", again);
    ++accepted;
  }
  std::printf(
      "%s kernels, seed %llu: %lld hostile calls, %lld refused, %lld run twice with hostile contents, digest %016llx\n",
      JaxMoeCpuKernels(), static_cast<unsigned long long>(seed), static_cast<long long>(count),
      static_cast<long long>(refused), static_cast<long long>(accepted),
      static_cast<unsigned long long>(digest.value()));
  return 0;
}

}  // namespace
}  // namespace jax_moe::testing

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s SEED COUNT\n", argv[0]);
    return 2;
  }
  return jax_moe::testing::Run(std::strtoull(argv[1], nullptr, 10), std::strtoll(argv[2], nullptr, 10));
}
