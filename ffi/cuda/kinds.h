// The kinds of custom call that the CUDA handler serves. A kind says what its attributes, operands and sizes are called
// and how they are checked; all else, from loading kernels to the launch rule, is the same for every kind.

#ifndef JAX_MOE_CUDA_KINDS_H_
#define JAX_MOE_CUDA_KINDS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "buffers.h"
#include "checks.h"
#include "decode.h"
#include "decode_parcels.h"
#include "decode_product.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe::cuda {

namespace ffi = ::xla::ffi;

inline constexpr size_t kMostSizes = 8;
inline constexpr size_t kMostWeights = 4;

// The sizes of a call in the order of its kind's names, then zeros; the first is the number of rows of x.
using CallSizes = std::array<int64_t, kMostSizes>;

class Kind {
 public:
  virtual ~Kind() = default;

  virtual std::string_view name() const = 0;                            // in messages
  virtual std::span<const std::string_view> operand_names() const = 0;  // all, in order
  virtual std::span<const std::string_view> size_names() const = 0;     // in kernels.sizes
  virtual std::span<const size_t> packed_weights()
      const = 0;  // operands of which the call says how many bytes they have

  // The attributes beside the kernels. What follows holds once they are decoded.
  virtual ffi::Error DecodeOptions(const Attributes& call) = 0;
  virtual bool adds() const = 0;                             // the first launch that is given the output adds into it
  virtual std::span<const size_t> input_scales() const = 0;  // operands that some launch has to be given

  // Checks all buffers but packed weights and workspaces, and gives their sizes; `planned` are the program's.
  virtual ffi::Error GetSizes(const Operands& operands, const Results& results, const CallSizes& planned,
                              CallSizes* sizes) const = 0;
};

class FusedMoe final : public Kind {
 public:
  std::string_view name() const override { return "fused_moe"; }
  std::span<const std::string_view> operand_names() const override { return kOperandNames; }
  std::span<const std::string_view> size_names() const override { return kSizeNames; }
  std::span<const size_t> packed_weights() const override { return kWeights; }

  ffi::Error DecodeOptions(const Attributes& call) override { return jax_moe::DecodeOptions(call, &options_); }
  bool adds() const override { return options_.combine == Combine::kAtomic; }
  std::span<const size_t> input_scales() const override {
    return options_.precision == Precision::kW4A4 ? std::span(kScales) : std::span<const size_t>();
  }

  ffi::Error GetSizes(const Operands& operands, const Results& results, const CallSizes& planned,
                      CallSizes* sizes) const override {
    Problem p = {};  // its pointers serve the check: kernels are given buffers by number
    JAX_MOE_TRY(DecodeProblem(operands, results, options_, planned[kIntermediateSize], &p));
    *sizes = {p.num_tokens, p.top_k, p.local_experts, p.num_parts, p.hidden_size, p.intermediate_size, p.out_bytes};
    return ffi::Error::Success();
  }

 private:
  static constexpr size_t kIntermediateSize = 5;  // which only packed weights would tell
  static constexpr std::string_view kSizeNames[] = {
      "num_tokens", "top_k", "local_experts", "num_parts", "hidden_size", "intermediate_size", "out_bytes"};
  static constexpr size_t kWeights[] = {kGateUpPayload, kGateUpBlockScale, kDownPayload, kDownBlockScale};
  static constexpr size_t kScales[] = {kGateUpInputScale, kDownInputScale};
  static_assert(std::size(kSizeNames) <= kMostSizes && std::size(kWeights) <= kMostWeights);

  Options options_ = {};
};

class RaggedDot final : public Kind {
 public:
  std::string_view name() const override { return "ragged_dot"; }
  std::span<const std::string_view> operand_names() const override { return kProductOperandNames; }
  std::span<const std::string_view> size_names() const override { return kSizeNames; }
  std::span<const size_t> packed_weights() const override { return kWeights; }

  ffi::Error DecodeOptions(const Attributes& call) override { return DecodeProductPrecision(call, &precision_); }
  bool adds() const override { return false; }
  std::span<const size_t> input_scales() const override {
    return precision_ == Precision::kW4A4 ? std::span(kScales) : std::span<const size_t>();
  }

  ffi::Error GetSizes(const Operands& operands, const Results& results, const CallSizes&,
                      CallSizes* sizes) const override {
    Product p = {};
    JAX_MOE_TRY(DecodeProduct(operands, results, precision_, &p));
    *sizes = {p.num_rows, p.num_groups, p.local_groups, p.in_features, p.out_features, p.out_bytes};
    return ffi::Error::Success();
  }

 private:
  static constexpr std::string_view kSizeNames[] = {"num_rows",    "num_groups",   "local_groups",
                                                    "in_features", "out_features", "out_bytes"};
  static constexpr size_t kWeights[] = {kWeightsPayload, kWeightsBlockScale};
  static constexpr size_t kScales[] = {kWeightsInputScale};
  static_assert(std::size(kSizeNames) <= kMostSizes && std::size(kWeights) <= kMostWeights);

  Precision precision_ = Precision::kW4A16;
};

// Tokens as they travel in w4a4 (decode_parcels.h).
class Parcels final : public Kind {
 public:
  std::string_view name() const override { return "parcels"; }
  std::span<const std::string_view> operand_names() const override { return kParcelOperandNames; }
  std::span<const std::string_view> size_names() const override { return kSizeNames; }
  std::span<const size_t> packed_weights() const override { return {}; }

  ffi::Error DecodeOptions(const Attributes&) override { return ffi::Error::Success(); }
  bool adds() const override { return false; }
  std::span<const size_t> input_scales() const override { return kScales; }

  ffi::Error GetSizes(const Operands& operands, const Results& results, const CallSizes&,
                      CallSizes* sizes) const override {
    ParcelSizes p = {};
    JAX_MOE_TRY(DecodeParcels(operands, results, &p));
    *sizes = {p.num_tokens, p.top_k, p.hidden_size};
    return ffi::Error::Success();
  }

 private:
  static constexpr std::string_view kSizeNames[] = {"num_tokens", "top_k", "hidden_size"};
  static constexpr size_t kScales[] = {kParcelInputScale};
  static_assert(std::size(kSizeNames) <= kMostSizes);
};

}  // namespace jax_moe::cuda

#endif  // JAX_MOE_CUDA_KINDS_H_
