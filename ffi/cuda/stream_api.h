// What launch_sequence.h is instantiated with on a GPU: the driver's streams and graphs, and the launches of a call.

#ifndef JAX_MOE_CUDA_STREAM_API_H_
#define JAX_MOE_CUDA_STREAM_API_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "buffers.h"
#include "cuda/driver.h"
#include "cuda/program.h"
#include "cuda/zero_kernel.h"

namespace jax_moe::cuda {

// The stream API that launch_sequence.h asks for, and a note of the driver call that failed first.
class StreamApi {
 public:
  using Stream = cuda::Stream;
  using Node = cuda::GraphNode;
  struct Entry {
    Graph graph = nullptr;
    std::vector<GraphNode> dependencies;
  };

  // `zero`: zero_kernel.h's; null: there is none here.
  StreamApi(const Driver& driver, Function zero) : driver_(driver), zero_(zero) {}

  const char* failed_call() const { return failed_call_; }

  Result IsCapturing(Stream stream, bool* capturing, Entry* entry) {
    int status = kCaptureNone;
    uint64_t id = 0;
    const GraphNode* dependencies = nullptr;  // the driver's, until the stream's next work
    size_t count = 0;
    const Result result =
        Check("cuStreamGetCaptureInfo",
              driver_.cuStreamGetCaptureInfo(stream, &status, &id, &entry->graph, &dependencies, &count));
    *capturing = status == kCaptureActive;
    if (result != kSuccess || status == kCaptureNone) return result;
    if (status != kCaptureActive) return Check("cuStreamGetCaptureInfo", kErrorStreamCaptureInvalidated);
    entry->dependencies.assign(dependencies, dependencies + count);
    return kSuccess;
  }

  Result Zero(Stream stream, void* destination, size_t bytes) {
    return Check("cuMemsetD8Async", driver_.cuMemsetD8Async(Address(destination), 0, bytes, stream));
  }

  Result AddZeroNode(const Entry& entry, void* destination, size_t bytes, Node* node) {
    if (bytes <= kShortBytes && zero_ != nullptr) {
      unsigned count = static_cast<unsigned>(bytes);
      void* parameters[] = {&destination, &count};
      const KernelNodeParams params = {zero_, 1, 1, 1, kZeroThreads, 1, 1, 0, parameters, nullptr, nullptr, nullptr};
      return Check("cuGraphAddKernelNode", driver_.cuGraphAddKernelNode(node, entry.graph, entry.dependencies.data(),
                                                                        entry.dependencies.size(), &params));
    }
    Context context = nullptr;
    if (Result result = Check("cuCtxGetCurrent", driver_.cuCtxGetCurrent(&context))) return result;
    // One row, the only shape of memset that can be updated in an instantiated graph; of words, as H is a multiple
    // of 16.
    constexpr unsigned kWord = 4;
    const MemsetNodeParams params = {Address(destination), 0, 0, kWord, bytes / kWord, 1};
    return Check("cuGraphAddMemsetNode", driver_.cuGraphAddMemsetNode(node, entry.graph, entry.dependencies.data(),
                                                                      entry.dependencies.size(), &params, context));
  }

  Result AddDependency(Stream stream, Node node) {
    return Check("cuStreamUpdateCaptureDependencies",
                 driver_.cuStreamUpdateCaptureDependencies(stream, &node, 1, kAddCaptureDependencies));
  }

  Result AddEmptyNode(Stream stream, const Entry& entry) {
    Node node = nullptr;
    const Result result =
        Check("cuGraphAddEmptyNode",
              driver_.cuGraphAddEmptyNode(&node, entry.graph, entry.dependencies.data(), entry.dependencies.size()));
    if (result != kSuccess) return result;
    return Check("cuStreamUpdateCaptureDependencies",
                 driver_.cuStreamUpdateCaptureDependencies(stream, &node, 1, kSetCaptureDependencies));
  }

  Result Launch(Stream stream, Function function, const cuda::Launch& launch, void** parameters) {
    LaunchAttribute attributes[2] = {};
    unsigned num_attributes = 0;
    if (launch.cluster > 1) {
      LaunchAttribute& attribute = attributes[num_attributes++];
      attribute.id = kLaunchClusterDimension;
      attribute.value.cluster = {launch.cluster, 1, 1};
    }
    if (launch.overlap) {
      LaunchAttribute& attribute = attributes[num_attributes++];
      attribute.id = kLaunchProgrammaticStreamSerialization;
      attribute.value.programmatic_stream_serialization = 1;
    }
    const LaunchConfig config = {launch.grid,         1,      1,          launch.threads, 1, 1,
                                 launch.shared_bytes, stream, attributes, num_attributes};
    return Check("cuLaunchKernelEx", driver_.cuLaunchKernelEx(&config, function, parameters, nullptr));
  }

  // Writes the graph being captured, as `dot` reads it, to the folder JAX_MOE_GRAPH_DUMP, one file a captured call.
  void DumpGraph(Stream stream, std::string_view kind, int64_t number) {
    static const char* const folder = std::getenv("JAX_MOE_GRAPH_DUMP");
    bool capturing = false;
    Entry entry;
    if (folder == nullptr || IsCapturing(stream, &capturing, &entry) != kSuccess) return;
    const std::string path = std::string(folder) + "/" + std::string(kind) + "." + std::to_string(number) + ".dot";
    constexpr unsigned kVerbose = 1;
    Check("cuGraphDebugDotPrint", driver_.cuGraphDebugDotPrint(entry.graph, path.c_str(), kVerbose));
  }

 private:
  static DevicePointer Address(void* pointer) { return reinterpret_cast<DevicePointer>(pointer); }

  Result Check(const char* call, Result result) {
    if (result != kSuccess && *failed_call_ == '\0') failed_call_ = call;
    return result;
  }

  const Driver& driver_;
  const Function zero_;
  const char* failed_call_ = "";
};

// The launches of one call with its buffers, as launch_sequence.h asks for them.
struct CallLaunches {
  StreamApi& api;
  const Program& program;
  const Function* functions;
  const Operands& operands;
  const Results& results;

  Result Launch(Stream stream, size_t index) {
    const cuda::Launch& launch = program.launches()[index];
    uint64_t values[kMostArguments];
    void* parameters[kMostArguments];
    for (size_t i = 0; i < launch.arguments.size(); ++i) {
      values[i] = Value(launch.arguments[i]);
      parameters[i] = &values[i];
    }
    return api.Launch(stream, functions[index], launch, parameters);
  }

  // Program::Decode has seen that the buffers are there. Of a scalar the driver reads the low four bytes, of a null
  // pointer all eight.
  uint64_t Value(const Argument& argument) const {
    if (argument.kind == Argument::Kind::kScalar) return argument.value;
    const bool is_operand = argument.kind == Argument::Kind::kOperand;
    const ffi::AnyBuffer& buffer = is_operand ? operands[argument.value] : *results[argument.value];
    return reinterpret_cast<uint64_t>(buffer.untyped_data());
  }
};

}  // namespace jax_moe::cuda

#endif  // JAX_MOE_CUDA_STREAM_API_H_
