// The smallest XLA FFI op that launches a GPU kernel which *adds* into its output:
//
//   y[s, d] = sum over rows t with ids[t] == s of x[t, d]
//
// The kernel is CuTe DSL (kernel.py), compiled in Python; its machine code travels in an attribute of the call. What is
// to be learned here is where the zeros come from. XLA hands the call an output buffer that holds anything, and reuses
// it. Under a command buffer (a CUDA graph) it also replays the call without calling us. So the zeroing must be part of
// what we enqueue, on every call: step 4. minimal_ffi.py in the folder beside this is the CPU's half, and comes first.

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// 1. The CUDA driver, opened at run time: then this file needs no CUDA toolkit to build, and loads where there is no
// GPU. CUDA 12 or newer. Every function returns 0 for success.
using Stream = struct CUstream_st*;

struct Driver {
  int (*cuLibraryLoadData)(void** library, const void* code, int* jit_options, void** jit_values, unsigned num_jit,
                           int* options, void** values, unsigned num_options);
  int (*cuLibraryGetKernel)(void** kernel, void* library, const char* name);
  int (*cuKernelGetFunction)(void** function, void* kernel);
  int (*cuMemsetD8Async)(uint64_t address, unsigned char value, size_t bytes, Stream stream);
  int (*cuLaunchKernel)(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream, void** parameters,
                        void** extra);
};

static const Driver* GetDriver() {
  static const Driver* const driver = []() -> const Driver* {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    static Driver found;
    auto resolve = [library](auto* function, const char* name) {
      return (*reinterpret_cast<void**>(function) = dlsym(library, name)) != nullptr;
    };
    const bool all = resolve(&found.cuLibraryLoadData, "cuLibraryLoadData") &&
                     resolve(&found.cuLibraryGetKernel, "cuLibraryGetKernel") &&
                     resolve(&found.cuKernelGetFunction, "cuKernelGetFunction") &&
                     resolve(&found.cuMemsetD8Async, "cuMemsetD8Async") &&
                     resolve(&found.cuLaunchKernel, "cuLaunchKernel");
    return all ? &found : nullptr;
  }();
  return driver;
}

static ffi::Error Failed(const char* call, int code) {
  return ffi::Error::Internal(std::string("segment_sum: ") + call + " returned " + std::to_string(code));
}

// 2. The state of a call site: made once by the instantiate stage, when XLA loads the program, and shared by every
// device and thread that runs it. A kernel of a *library* belongs to no context, so one handle serves all devices.
struct Kernel {
  static ffi::TypeId id;
  void* handle = nullptr;
};
ffi::TypeId Kernel::id = {};

static ffi::ErrorOr<std::unique_ptr<Kernel>> Instantiate(std::string_view image, std::string_view name) {
  const Driver* const driver = GetDriver();
  if (driver == nullptr) return ffi::Unexpected(ffi::Error::Internal("segment_sum: no CUDA driver, or an old one"));
  auto kernel = std::make_unique<Kernel>();
  void* library = nullptr;  // never unloaded: a program may be dropped while its last run is still on the GPU
  int code = driver->cuLibraryLoadData(&library, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (code != 0) return ffi::Unexpected(Failed("cuLibraryLoadData", code));
  code = driver->cuLibraryGetKernel(&kernel->handle, library, std::string(name).c_str());
  if (code != 0) return ffi::Unexpected(Failed("cuLibraryGetKernel", code));
  return kernel;
}

// 3. The initialize stage runs before every execution, and never inside a capture, where loading code is forbidden.
// This puts the kernel onto the current device, if it is not there yet.
static ffi::Error Initialize(Kernel* kernel) {
  void* function = nullptr;
  const int code = GetDriver()->cuKernelGetFunction(&function, kernel->handle);
  return code == 0 ? ffi::Error::Success() : Failed("cuKernelGetFunction", code);
}

// 4. The execute stage. The stream is either running or being captured into a graph. It makes no difference here: both
// the zeroing and the kernel are enqueued on it, in this order, so in the graph they are two nodes with an edge between
// them. Nothing is allocated, nothing waits, no other stream is touched: that is what the trait below promises.
static ffi::Error SegmentSum(Stream stream, Kernel* kernel, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> ids,
                             ffi::ResultBuffer<ffi::F32> y) {
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2 || ids.dimensions().size() != 1 ||
      ids.dimensions()[0] != x.dimensions()[0] || y->dimensions()[1] != x.dimensions()[1]) {
    return ffi::Error::InvalidArgument("segment_sum: needs x [T, D], ids [T] and a result [S, D]");
  }
  constexpr unsigned kThreads = 256;  // as kernel.py
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - kThreads;
  const auto total = static_cast<int64_t>(x.element_count());
  if (total > kMost || static_cast<int64_t>(y->element_count()) > kMost) {
    return ffi::Error::InvalidArgument("segment_sum: the kernel counts elements in int32");
  }
  auto address = [](const auto& buffer) { return reinterpret_cast<uint64_t>(buffer.untyped_data()); };
  if (y->element_count() == 0) return ffi::Error::Success();
  if (int code = GetDriver()->cuMemsetD8Async(address(*y), 0, y->size_bytes(), stream)) {
    return Failed("cuMemsetD8Async", code);
  }
  if (total == 0) return ffi::Error::Success();

  uint64_t pointers[] = {address(x), address(ids), address(*y)};
  int32_t numbers[] = {static_cast<int32_t>(total), static_cast<int32_t>(x.dimensions()[1]),
                       static_cast<int32_t>(y->dimensions()[0])};
  void* parameters[] = {&pointers[0], &pointers[1], &pointers[2], &numbers[0], &numbers[1], &numbers[2]};
  const auto grid = static_cast<unsigned>((total + kThreads - 1) / kThreads);
  const int code =
      GetDriver()->cuLaunchKernel(kernel->handle, grid, 1, 1, kThreads, 1, 1, 0, stream, parameters, nullptr);
  return code == 0 ? ffi::Error::Success() : Failed("cuLaunchKernel", code);
}

// 5. The symbols that Python registers: a stage each. `kCmdBufferCompatible` lets XLA record the call.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SegmentSumInstantiate, Instantiate,
    ffi::Ffi::BindInstantiate().Attr<std::string_view>("image").Attr<std::string_view>("name"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(SegmentSumInitialize, Initialize, ffi::Ffi::BindInitialize().Ctx<ffi::State<Kernel>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SegmentSumExecute, SegmentSum,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<Stream>>()
                                  .Ctx<ffi::State<Kernel>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()   // x    [T, D]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // ids  [T]
                                  .Ret<ffi::Buffer<ffi::F32>>(),  // y    [S, D]
                              {ffi::Traits::kCmdBufferCompatible});

// What Python registers as the state's type.
extern "C" void* SegmentSumTypeId() { return &Kernel::id; }

extern "C" const void* SegmentSumTypeInfo() {
  static constexpr XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<Kernel>();
  return &info;
}
