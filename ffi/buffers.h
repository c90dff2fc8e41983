// The operands and results of a custom call, taken out of its frame once, with the names that a refusal calls them by.

#ifndef JAX_MOE_BUFFERS_H_
#define JAX_MOE_BUFFERS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "checks.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe {

inline constexpr size_t kMostOperands = 16;
inline constexpr size_t kMostResults = 16;  // the output and its workspaces

class Operands {
 public:
  // `names` of all of them, in order; they outlive this.
  explicit Operands(std::span<const std::string_view> names) : names_(names) {}

  // After it has succeeded they are all there, and can be indexed freely.
  ffi::Error Take(const ffi::RemainingArgs& args) {
    if (args.size() != size()) {
      return Refuse("operands: got " + std::to_string(args.size()) + ", needs " + std::to_string(size()));
    }
    for (size_t i = 0; i < size(); ++i) {
      ffi::ErrorOr<ffi::AnyBuffer> buffer = args.get<ffi::AnyBuffer>(i);
      if (buffer.has_error()) return Refuse(std::string(names_[i]) + ": " + buffer.error().message());
      buffers_[i] = *buffer;
    }
    return ffi::Error::Success();
  }

  size_t size() const { return names_.size(); }
  std::string_view name(size_t operand) const { return names_[operand]; }
  const ffi::AnyBuffer& operator[](size_t operand) const { return *buffers_[operand]; }

  // Size `axis` of an operand whose exact shape is checked later; checks the rank that this needs.
  ffi::Error GetSize(size_t operand, size_t rank, size_t axis, int64_t* size) const {
    const ffi::AnyBuffer& buffer = (*this)[operand];
    if (buffer.dimensions().size() != rank) {
      return Refuse(std::string(name(operand)) + ": got " + Describe(buffer) + ", needs " + std::to_string(rank) +
                    " dimensions");
    }
    *size = buffer.dimensions()[axis];
    return ffi::Error::Success();
  }

  template <typename T>
  ffi::Error GetData(size_t operand, ffi::DataType dtype, std::initializer_list<int64_t> dims, const T** data) const {
    return jax_moe::GetData(name(operand), (*this)[operand], dtype, dims, data);
  }

  // As GetData, for f32 operands that may be absent (f32[0]): *data is null then.
  ffi::Error GetOptionalData(size_t operand, std::initializer_list<int64_t> dims, const float** data) const {
    *data = nullptr;
    const ffi::AnyBuffer::Dimensions got = (*this)[operand].dimensions();
    if ((*this)[operand].element_type() == ffi::F32 && got.size() == 1 && got[0] == 0) return ffi::Error::Success();
    return GetData(operand, ffi::F32, dims, data);
  }

 private:
  std::span<const std::string_view> names_;
  std::array<std::optional<ffi::AnyBuffer>, kMostOperands> buffers_;  // no buffer has a default
};

using Results = std::array<std::optional<ffi::AnyBuffer>, kMostResults>;  // those that the call has, then none

// Size 1 of a matrix whose exact shape is checked later.
inline ffi::Error GetColumns(std::string_view name, const ffi::AnyBuffer& buffer, int64_t* columns) {
  if (buffer.dimensions().size() != 2) {
    return Refuse(std::string(name) + ": got " + Describe(buffer) + ", needs 2 dimensions");
  }
  *columns = buffer.dimensions()[1];
  return ffi::Error::Success();
}

// `needed` results, of which a refusal says that they are `what`.
inline ffi::Error GetResults(const ffi::RemainingRets& rets, size_t needed, std::string_view what, Results* results) {
  if (rets.size() != needed || needed > kMostResults) {
    return Refuse("results: got " + std::to_string(rets.size()) + ", needs " + std::to_string(needed) +
                  std::string(what));
  }
  for (size_t i = 0; i < needed; ++i) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> buffer = rets.get<ffi::AnyBuffer>(i);
    if (buffer.has_error()) return Refuse("result " + std::to_string(i) + ": " + buffer.error().message());
    (*results)[i] = **buffer;
  }
  return ffi::Error::Success();
}

}  // namespace jax_moe

#endif  // JAX_MOE_BUFFERS_H_
