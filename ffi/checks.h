// Decodes buffers and attributes of any XLA custom call, and refuses those that are not as needed.
//
// Every refusal is INVALID_ARGUMENT and says which operand or attribute, what it got and what it needs. What is
// accepted builds no text and allocates nothing: on a GPU this is part of what every eager call costs.

#ifndef JAX_MOE_CHECKS_H_
#define JAX_MOE_CHECKS_H_

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"

// Returns from the enclosing function when `expression`, an ffi::Error, is one.
#define JAX_MOE_TRY(expression) \
  if (::xla::ffi::Error error = (expression); error.failure()) return error

namespace jax_moe {

namespace ffi = ::xla::ffi;

// Cold, so that the compiler keeps the code that words refusals away from the code that every call runs.
[[gnu::cold]] inline ffi::Error Refuse(const std::string& what) {
  return ffi::Error::InvalidArgument("jax_moe: " + what);
}

inline std::string DataTypeName(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::U8:
      return "u8";
    case ffi::S32:
      return "s32";
    case ffi::F32:
      return "f32";
    case ffi::BF16:
      return "bf16";
    case ffi::F8E4M3FN:
      return "f8e4m3fn";
    default:
      return "dtype#" + std::to_string(static_cast<int>(dtype));
  }
}

inline std::string Describe(ffi::DataType dtype, const int64_t* dims, size_t rank) {
  constexpr size_t kMostShown = 8;
  std::string text = DataTypeName(dtype);
  for (size_t i = 0; i < rank && i < kMostShown; ++i) text.append(i ? "," : "[").append(std::to_string(dims[i]));
  return text.append(rank == 0 ? "[]" : rank > kMostShown ? ",...]" : "]");
}

inline std::string Describe(const ffi::AnyBuffer& buffer) {
  return Describe(buffer.element_type(), buffer.dimensions().begin(), buffer.dimensions().size());
}

inline ffi::Error CheckSize(std::string_view name, int64_t size, int64_t least, int64_t multiple) {
  if (size >= least && size % multiple == 0) return ffi::Error::Success();
  return Refuse(std::string(name) + ": got " + std::to_string(size) + ", needs a multiple of " +
                std::to_string(multiple) + " that is at least " + std::to_string(least));
}

// True when the bytes of such a buffer can be counted in an int64.
inline bool IsAddressable(ffi::DataType dtype, std::initializer_list<int64_t> dims) {
  int64_t bytes = static_cast<int64_t>(ffi::ByteWidth(dtype));
  for (int64_t dim : dims) {
    if (dim < 0 || __builtin_mul_overflow(bytes, dim, &bytes)) return false;
  }
  return true;
}

// Checks that `buffer` is exactly dtype[dims], and that its data can be read as such.
inline ffi::Error CheckBuffer(std::string_view name, const ffi::AnyBuffer& buffer, ffi::DataType dtype,
                              std::initializer_list<int64_t> dims) {
  const ffi::AnyBuffer::Dimensions got = buffer.dimensions();
  bool matches = buffer.element_type() == dtype && got.size() == dims.size();
  bool is_empty = false;
  for (size_t i = 0; matches && i < dims.size(); ++i) {
    matches = got[i] == dims.begin()[i];
    is_empty |= got[i] == 0;
  }
  if (!matches) {
    return Refuse(std::string(name) + ": got " + Describe(buffer) + ", needs " +
                  Describe(dtype, dims.begin(), dims.size()));
  }
  if (!IsAddressable(dtype, dims)) return Refuse(std::string(name) + ": " + Describe(buffer) + " is too large");
  const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.untyped_data());
  if (!is_empty && (address == 0 || address % ffi::ByteWidth(dtype) != 0)) {
    return Refuse(std::string(name) + ": its data is null or not aligned to its elements");
  }
  return ffi::Error::Success();
}

template <typename T>
ffi::Error GetData(std::string_view name, const ffi::AnyBuffer& buffer, ffi::DataType dtype,
                   std::initializer_list<int64_t> dims, T** data) {
  *data = static_cast<T*>(buffer.untyped_data());
  return CheckBuffer(name, buffer, dtype, dims);
}

template <typename Enum>
struct Choice {
  std::string_view name;
  Enum value;
};

// A dictionary of attributes; `path` is where it stands in those of the call: "", "kernels." or "kernels.gemm1.".
struct Attributes {
  ffi::Dictionary dictionary;
  std::string path;

  [[gnu::cold]] ffi::Error Refuse(std::string_view name, const std::string& what) const {
    return jax_moe::Refuse("attribute " + path + std::string(name) + ": " + what);
  }

  template <typename T>
  ffi::Error Get(std::string_view name, T* value) const {
    ffi::ErrorOr<T> got = dictionary.get<T>(name);
    if (got.has_error()) return Refuse(name, got.error().message());
    *value = *got;
    return ffi::Error::Success();
  }

  template <typename Enum>
  ffi::Error GetChoice(std::string_view name, std::initializer_list<Choice<Enum>> choices, Enum* value) const {
    std::string_view got;
    JAX_MOE_TRY(Get(name, &got));
    for (const Choice<Enum>& choice : choices) {
      if (choice.name != got) continue;
      *value = choice.value;
      return ffi::Error::Success();
    }
    std::string needs;
    for (const Choice<Enum>& choice : choices) needs += (needs.empty() ? "" : " | ") + std::string(choice.name);
    constexpr size_t kMostShown = 32;
    return Refuse(name, "got '" + std::string(got.substr(0, kMostShown)) + "', needs " + needs);
  }

  ffi::Error GetUnsigned(std::string_view name, uint32_t least, uint32_t most, uint32_t* value) const {
    int64_t got = 0;
    JAX_MOE_TRY(Get(name, &got));
    if (got < least || got > most) {
      return Refuse(name,
                    "got " + std::to_string(got) + ", needs " + std::to_string(least) + ".." + std::to_string(most));
    }
    *value = static_cast<uint32_t>(got);
    return ffi::Error::Success();
  }

  ffi::Error GetText(std::string_view name, std::string* value) const {
    std::string_view got;
    JAX_MOE_TRY(Get(name, &got));
    *value = got;
    return got.empty() ? Refuse(name, "is empty") : ffi::Error::Success();
  }
};

}  // namespace jax_moe

#endif  // JAX_MOE_CHECKS_H_
