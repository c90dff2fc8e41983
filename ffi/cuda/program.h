// What one custom call site launches: options, sizes and a list of kernel launches with their images and arguments,
// decoded and checked once, when XLA instantiates the call, and loaded once on each device. No kernel is known here by
// name: which there are, and in which order, is the call's to say. What kind of call it is, kinds.h knows.
//
// The attribute `kernels` is a dictionary that jax_moe/kernels/ writes:
//   sizes            {num_tokens, top_k, ...}: those of problem.h, i64 each, that the kernels were planned for
//   weight_bytes     {"down.payload", ...}: bytes of operands whose layout is the platform's, i64 each
//   workspace_bytes  i64[n]  sizes of results 1..n
//   launches         "sort gemm1 gemm2", names in the order of launch; empty exactly where x has no rows
//   adds             "gemm2", the first launch that adds into the output, and the first that is given it; empty where
//                    none adds: combine="ordered", ragged_dot, parcels, or no launches
//   and for each name in `launches` a dictionary,
//     image      the cubin, as bytes        name       of the kernel in it
//     grid       CTAs                       threads    in a CTA
//     cluster    CTAs in a cluster          shared     bytes of dynamic shared memory of a CTA
//     overlap    1: may start before the kernel in front of it on the stream has finished (it then waits itself). The
//                first launch may not: kernels read operands without a wait, and what is in front writes them
//     arguments  "operand:1 result:0 null i32:128", the kernel's parameters in order; null is a pointer
// Bytes and not a handle: a serialised executable carries them along and runs where no compiler is installed.

#ifndef JAX_MOE_CUDA_PROGRAM_H_
#define JAX_MOE_CUDA_PROGRAM_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/driver.h"
#include "cuda/kinds.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe::cuda {

namespace ffi = ::xla::ffi;

inline constexpr size_t kMostArguments = 64;  // of one kernel

struct Argument {
  enum class Kind { kOperand, kResult, kScalar };
  Kind kind;
  uint32_t value;  // index of the operand or result, or the scalar's 32 bits (a null pointer is a 0)

  bool operator==(const Argument&) const = default;
};

struct Launch {
  std::string name;    // in the list of launches
  std::string kernel;  // its name in the image
  std::string image;
  uint32_t grid = 0;
  uint32_t threads = 0;
  uint32_t cluster = 0;
  uint32_t shared_bytes = 0;
  bool overlap = false;
  std::vector<Argument> arguments;

  bool IsGiven(const Argument& argument) const;
};

// The state of a call site. XLA shares it between all devices and threads; everything but the functions by context is
// constant after Decode.
class Program {
 public:
  static ffi::TypeId id;

  // Refuses attributes that no buffers can make a valid call, so that a call has only its buffers left to check: every
  // launch has a kernel, every argument is a buffer that such a call has, and the list says what the output needs.
  static ffi::ErrorOr<std::unique_ptr<Program>> Decode(std::unique_ptr<Kind> kind, const ffi::Dictionary& attributes);

  explicit Program(std::unique_ptr<Kind> kind) : kind_(std::move(kind)) {}

  const Kind& kind() const { return *kind_; }
  const CallSizes& sizes() const { return sizes_; }
  int64_t weight_bytes(size_t i) const { return weight_bytes_[i]; }  // of kind().packed_weights()[i]
  const std::vector<int64_t>& workspace_bytes() const { return workspace_bytes_; }
  const std::vector<Launch>& launches() const { return launches_; }
  std::optional<size_t> first_that_adds() const { return first_that_adds_; }

  // Loads the kernels into the current context unless they are there. Not to be called while capturing.
  ffi::Error Load(const Driver& driver);

  // The functions of the launches in the current context, and behind them that of zero_kernel.h or null; an error if
  // Load has not been called in it.
  ffi::Error Loaded(const Driver& driver, const Function** functions) const;

 private:
  ffi::Error DecodeKernels(const Attributes& kernels);
  ffi::Error CheckLaunches(const Attributes& kernels);

  const std::unique_ptr<Kind> kind_;
  CallSizes sizes_ = {};
  std::array<int64_t, kMostWeights> weight_bytes_ = {};
  std::vector<int64_t> workspace_bytes_;
  std::vector<Launch> launches_;
  std::optional<size_t> first_that_adds_;

  mutable std::mutex mutex_;
  // By context id; guarded by mutex_. What is in it stays as it is, where it is.
  std::map<unsigned long long, std::vector<Function>> functions_;
};

// "CUDA_ERROR_INVALID_VALUE (invalid argument)".
std::string ErrorText(const Driver& driver, Result result);

}  // namespace jax_moe::cuda

#endif  // JAX_MOE_CUDA_PROGRAM_H_
