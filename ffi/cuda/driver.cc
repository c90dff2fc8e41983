#include "cuda/driver.h"

#include <dlfcn.h>

#include <atomic>
#include <string>

namespace jax_moe::cuda {
namespace {

struct Opened {
  Driver driver = {};
  std::string error;
};

Opened Open() {
  Opened opened;
  // The soname that the driver package installs; the unversioned name belongs to the toolkit's stubs.
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    opened.error = std::string("the CUDA driver cannot be opened: ") + (reason == nullptr ? "?" : reason);
    return opened;
  }
  auto resolve = [&](auto* member, const char* symbol) {
    *reinterpret_cast<void**>(member) = dlsym(library, symbol);
    if (*member == nullptr && opened.error.empty()) {
      opened.error = std::string("the CUDA driver has no ") + symbol + "; CUDA 12.0 or newer is needed";
    }
  };
  Driver& driver = opened.driver;
#define JAX_MOE_RESOLVE(name) resolve(&driver.name, #name)
  JAX_MOE_RESOLVE(cuGetErrorName);
  JAX_MOE_RESOLVE(cuGetErrorString);
  JAX_MOE_RESOLVE(cuCtxGetCurrent);
  JAX_MOE_RESOLVE(cuCtxGetId);
  JAX_MOE_RESOLVE(cuModuleLoadData);
  JAX_MOE_RESOLVE(cuModuleGetFunction);
  JAX_MOE_RESOLVE(cuFuncSetAttribute);
  JAX_MOE_RESOLVE(cuLaunchKernelEx);
  JAX_MOE_RESOLVE(cuMemsetD8Async);
  resolve(&driver.cuStreamGetCaptureInfo, "cuStreamGetCaptureInfo_v2");
  JAX_MOE_RESOLVE(cuStreamUpdateCaptureDependencies);
  JAX_MOE_RESOLVE(cuGraphAddMemsetNode);
  resolve(&driver.cuGraphAddKernelNode, "cuGraphAddKernelNode_v2");
  JAX_MOE_RESOLVE(cuGraphAddEmptyNode);
  JAX_MOE_RESOLVE(cuGraphDebugDotPrint);
#undef JAX_MOE_RESOLVE
  return opened;
}

std::atomic<const Driver*> driver_for_testing{nullptr};

}  // namespace

const Driver* GetDriver(const char** error) {
  if (const Driver* driver = driver_for_testing.load(std::memory_order_acquire)) return driver;
  // Never closed: kernels stay loaded until the process ends.
  static const Opened* const opened = new Opened(Open());
  if (opened->error.empty()) return &opened->driver;
  *error = opened->error.c_str();
  return nullptr;
}

void SetDriverForTesting(const Driver* driver) { driver_for_testing.store(driver, std::memory_order_release); }

}  // namespace jax_moe::cuda
