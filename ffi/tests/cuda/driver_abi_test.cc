// Compares driver.h, which repeats the driver's binary interface, with NVIDIA's own header where that is installed.
// Compiling it is the test.

#include <cuda.h>

#include <cstddef>

#include "cuda/driver.h"

namespace jax_moe::cuda {

static_assert(sizeof(DevicePointer) == sizeof(CUdeviceptr) && sizeof(Result) == sizeof(CUresult));
static_assert(kSuccess == CUDA_SUCCESS && kErrorNoBinaryForGpu == CUDA_ERROR_NO_BINARY_FOR_GPU);
static_assert(kErrorStreamCaptureInvalidated == CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
static_assert(kCaptureNone == CU_STREAM_CAPTURE_STATUS_NONE && kCaptureActive == CU_STREAM_CAPTURE_STATUS_ACTIVE);
static_assert(kAddCaptureDependencies == CU_STREAM_ADD_CAPTURE_DEPENDENCIES);
static_assert(kSetCaptureDependencies == CU_STREAM_SET_CAPTURE_DEPENDENCIES);
static_assert(kFunctionMaxDynamicSharedBytes == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(kFunctionPreferredSharedCarveout == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT);
static_assert(kLaunchClusterDimension == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
static_assert(kLaunchProgrammaticStreamSerialization == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);

static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(offsetof(CUlaunchAttributeValue, clusterDim.z) == 2 * sizeof(unsigned));
static_assert(offsetof(CUlaunchAttributeValue, programmaticStreamSerializationAllowed) == 0);

static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(LaunchConfig, grid_x) == offsetof(CUlaunchConfig, gridDimX));
static_assert(offsetof(LaunchConfig, block_x) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(LaunchConfig, num_attributes) == offsetof(CUlaunchConfig, numAttrs));

static_assert(sizeof(MemsetNodeParams) == sizeof(CUDA_MEMSET_NODE_PARAMS));
static_assert(offsetof(MemsetNodeParams, destination) == offsetof(CUDA_MEMSET_NODE_PARAMS, dst));
static_assert(offsetof(MemsetNodeParams, pitch) == offsetof(CUDA_MEMSET_NODE_PARAMS, pitch));
static_assert(offsetof(MemsetNodeParams, value) == offsetof(CUDA_MEMSET_NODE_PARAMS, value));
static_assert(offsetof(MemsetNodeParams, element_bytes) == offsetof(CUDA_MEMSET_NODE_PARAMS, elementSize));
static_assert(offsetof(MemsetNodeParams, width) == offsetof(CUDA_MEMSET_NODE_PARAMS, width));
static_assert(offsetof(MemsetNodeParams, height) == offsetof(CUDA_MEMSET_NODE_PARAMS, height));

static_assert(sizeof(KernelNodeParams) == sizeof(CUDA_KERNEL_NODE_PARAMS_v2));
static_assert(offsetof(KernelNodeParams, function) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, func));
static_assert(offsetof(KernelNodeParams, grid_x) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, gridDimX));
static_assert(offsetof(KernelNodeParams, block_x) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, blockDimX));
static_assert(offsetof(KernelNodeParams, shared_bytes) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, sharedMemBytes));
static_assert(offsetof(KernelNodeParams, parameters) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, kernelParams));
static_assert(offsetof(KernelNodeParams, kernel) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, kern));
static_assert(offsetof(KernelNodeParams, context) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, ctx));

}  // namespace jax_moe::cuda
