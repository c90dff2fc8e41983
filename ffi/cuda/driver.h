// The part of the CUDA driver API that the handler uses, reached by dlopen, so that the library loads on machines
// without CUDA and builds without the CUDA toolkit.
//
// The types repeat the driver's binary interface, which NVIDIA keeps stable; ffi/tests/cuda/driver_abi_test.cc compares
// them with cuda.h where that is installed. A `Driver` is a plain struct of function pointers, so that a test can fill
// it with its own functions.

#ifndef JAX_MOE_CUDA_DRIVER_H_
#define JAX_MOE_CUDA_DRIVER_H_

#include <cstddef>
#include <cstdint>

namespace jax_moe::cuda {

using Context = struct CUctx_st*;
using Function = struct CUfunc_st*;
using Graph = struct CUgraph_st*;
using GraphNode = struct CUgraphNode_st*;
using Module = struct CUmod_st*;
using Stream = struct CUstream_st*;
using DevicePointer = unsigned long long;
using Result = int;  // CUresult

inline constexpr Result kSuccess = 0;
inline constexpr Result kErrorNoBinaryForGpu = 209;
inline constexpr Result kErrorStreamCaptureInvalidated = 901;

inline constexpr int kCaptureNone = 0;
inline constexpr int kCaptureActive = 1;

inline constexpr unsigned kAddCaptureDependencies = 0;
inline constexpr unsigned kSetCaptureDependencies = 1;

inline constexpr int kFunctionMaxDynamicSharedBytes = 8;
inline constexpr int kFunctionPreferredSharedCarveout = 9;  // percent of the multiprocessor's memory

inline constexpr int kLaunchClusterDimension = 4;
inline constexpr int kLaunchProgrammaticStreamSerialization = 6;

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  char padding[4];
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
    int programmatic_stream_serialization;
  } value;
};

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

struct MemsetNodeParams {  // CUDA_MEMSET_NODE_PARAMS
  DevicePointer destination;
  std::size_t pitch;
  unsigned value;
  unsigned element_bytes;
  std::size_t width;  // in elements
  std::size_t height;
};

struct KernelNodeParams {  // CUDA_KERNEL_NODE_PARAMS_v2
  Function function;
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  void** parameters;
  void** extra;
  void* kernel;     // instead of a function
  Context context;  // of such a kernel
};

// Each member is named after the entry point that fills it; the comment gives a versioned symbol where there is one.
struct Driver {
  Result (*cuGetErrorName)(Result, const char**);
  Result (*cuGetErrorString)(Result, const char**);
  Result (*cuCtxGetCurrent)(Context*);
  Result (*cuCtxGetId)(Context, unsigned long long*);
  Result (*cuModuleLoadData)(Module*, const void*);
  Result (*cuModuleGetFunction)(Function*, Module, const char*);
  Result (*cuFuncSetAttribute)(Function, int, int);
  Result (*cuLaunchKernelEx)(const LaunchConfig*, Function, void** parameters, void** extra);
  Result (*cuMemsetD8Async)(DevicePointer, unsigned char, std::size_t, Stream);
  Result (*cuStreamGetCaptureInfo)(Stream, int*, std::uint64_t*, Graph*, const GraphNode**, std::size_t*);  // _v2
  Result (*cuStreamUpdateCaptureDependencies)(Stream, GraphNode*, std::size_t, unsigned);
  Result (*cuGraphAddMemsetNode)(GraphNode*, Graph, const GraphNode*, std::size_t, const MemsetNodeParams*, Context);
  Result (*cuGraphAddKernelNode)(GraphNode*, Graph, const GraphNode*, std::size_t, const KernelNodeParams*);  // _v2
  Result (*cuGraphAddEmptyNode)(GraphNode*, Graph, const GraphNode*, std::size_t);
  Result (*cuGraphDebugDotPrint)(Graph, const char*, unsigned);
};

// The process's driver, opened on first use; null when it cannot be, and then `*error` says why.
const Driver* GetDriver(const char** error);

// Makes GetDriver return `driver` from now on, or the real one again for null. For tests.
void SetDriverForTesting(const Driver* driver);

}  // namespace jax_moe::cuda

#endif  // JAX_MOE_CUDA_DRIVER_H_
