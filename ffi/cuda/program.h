// What one custom call site launches: options, kernels, their images and their arguments, decoded and checked once,
// when XLA instantiates the call, and loaded once on each device.
//
// The attribute `kernels` is a dictionary that jax_moe/kernels/lowering.py writes:
//   shape            i64[7]  T, K, L, P, H, I and the bytes of an output element, that the kernels were planned for
//   weight_bytes     i64[4]  sizes of the prepared gate_up payload and block scale, down payload and block scale
//   workspace_bytes  i64[n]  sizes of results 1..n
//   sort, prepare, gemm1, gemm2, combine: one dictionary for each kernel that the call launches,
//     image      the cubin, as bytes        name       of the kernel in it
//     grid       blocks                     block      threads in a block
//     cluster    blocks in a cluster        shared     bytes of dynamic shared memory
//     overlap    1: may start before the kernel in front of it on the stream has finished (it then waits itself)
//     arguments  "operand:1 result:0 null i32:128", the kernel's parameters in order; null is a pointer
// Bytes and not a handle: a serialised executable carries them along and runs where no compiler is installed.

#ifndef JAX_MOE_CUDA_PROGRAM_H_
#define JAX_MOE_CUDA_PROGRAM_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe::cuda {

namespace ffi = ::xla::ffi;

enum Step : size_t { kSort, kPrepare, kGemm1, kGemm2, kCombine, kNumSteps };

inline constexpr const char* kStepNames[kNumSteps] = {"sort", "prepare", "gemm1", "gemm2", "combine"};

inline constexpr size_t kMostArguments = 64;  // of one kernel

struct Argument {
  enum class Kind { kOperand, kResult, kScalar };
  Kind kind;
  uint32_t value;  // index of the operand or result, or the scalar's 32 bits (a null pointer is a 0)
};

struct Kernel {
  bool present = false;
  std::string image;
  std::string name;
  uint32_t grid = 0;
  uint32_t block = 0;
  uint32_t cluster = 0;
  uint32_t shared_bytes = 0;
  bool overlap = false;
  std::vector<Argument> arguments;
};

using Functions = std::array<Function, kNumSteps>;  // null where the call has no such kernel

// The state of a call site. XLA shares it between all devices and threads; everything but the functions by context is
// constant after Decode.
class Program {
 public:
  static ffi::TypeId id;

  // Refuses attributes that no buffers can make a valid call, so that a call has only its buffers left to check: the
  // kernels that the options need are there, and every argument is a buffer that such a call has.
  static ffi::ErrorOr<std::unique_ptr<Program>> Decode(const ffi::Dictionary& attributes);

  const Options& options() const { return options_; }
  const Kernel& kernel(Step step) const { return kernels_[step]; }
  const std::array<int64_t, 7>& shape() const { return shape_; }
  const std::array<int64_t, 4>& weight_bytes() const { return weight_bytes_; }
  const std::vector<int64_t>& workspace_bytes() const { return workspace_bytes_; }

  // Loads the kernels into the current context unless they are there. Not to be called while capturing.
  ffi::Error Load(const Driver& driver);

  // The functions in the current context; an error if Load has not been called in it.
  ffi::Error Loaded(const Driver& driver, Functions* functions) const;

 private:
  ffi::Error DecodeKernels(const ffi::Dictionary& attributes);
  ffi::Error CheckKernels() const;

  Options options_;
  std::array<Kernel, kNumSteps> kernels_;
  std::array<int64_t, 7> shape_;
  std::array<int64_t, 4> weight_bytes_;
  std::vector<int64_t> workspace_bytes_;

  mutable std::mutex mutex_;
  std::map<unsigned long long, Functions> functions_;  // by context id; guarded by mutex_
};

// "CUDA_ERROR_INVALID_VALUE (invalid argument)".
std::string ErrorText(const Driver& driver, Result result);

}  // namespace jax_moe::cuda

#endif  // JAX_MOE_CUDA_PROGRAM_H_
