// Stand-ins for the test of the CUDA handler: a driver that records what it is asked to do, and as much of XLA as it
// takes to call a handler.

#ifndef JAX_MOE_TESTS_CUDA_FAKE_H_
#define JAX_MOE_TESTS_CUDA_FAKE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe::cuda::fake {

namespace ffi = ::xla::ffi;

// One launch, with the value of every parameter read through the pointers that the driver was given.
struct Launch {
  std::string kernel;
  LaunchConfig config;
  std::vector<LaunchAttribute> attributes;
  std::vector<uint64_t> parameters;
};

// What the fake driver knows and saw. The context is per thread, as in CUDA; everything else is behind the mutex.
struct Recorder {
  std::mutex mutex;
  std::vector<std::string> calls;  // "memset 64", "launch gemm1", "node memset 64 after 7", "depend 8", ...
  std::vector<Launch> launches;
  std::map<std::string, size_t> parameters_of;  // by kernel name
  std::set<std::string> loaded;
  int num_loads = 0;
  int capture_status = kCaptureNone;
  std::vector<GraphNode> capture_dependencies;
  uintptr_t last_node = 100;
  std::string failing_call, also_failing;  // entry points that return failing_code
  std::set<Stream> streams;                // that an entry point was given
  std::set<DevicePointer> zeroed;          // on the stream or as a node
  std::set<Context> memset_contexts;
  std::set<std::pair<std::string, std::string>> images;  // that a function was taken from: (name, image)
  std::map<int, int> function_attributes;                // the largest
  Result failing_code = 1;
};

inline Recorder* recorder = nullptr;
inline thread_local uintptr_t current_context = 1;

// Returns the failure that the test asked for, else success after noting `what` (unless it is empty).
inline Result Note(const char* entry_point, const std::string& what) {
  if (recorder->failing_call == entry_point || recorder->also_failing == entry_point) return recorder->failing_code;
  if (!what.empty()) recorder->calls.push_back(what);
  return kSuccess;
}

inline std::string Name(const void* handle) { return std::to_string(reinterpret_cast<uintptr_t>(handle)); }

inline std::string Names(const GraphNode* nodes, size_t count) {
  std::string names;
  for (size_t i = 0; i < count; ++i) names += (i ? "," : "") + Name(nodes[i]);
  return names;
}

inline GraphNode NewNode() { return reinterpret_cast<GraphNode>(++recorder->last_node); }

inline Driver MakeDriver() {
  using Lock = std::lock_guard<std::mutex>;
  Driver driver = {};
  driver.cuGetErrorName = [](Result, const char** name) -> Result { return *name = "CUDA_ERROR_FAKE", kSuccess; };
  driver.cuGetErrorString = [](Result, const char** text) -> Result { return *text = "as the test asked", kSuccess; };
  driver.cuCtxGetCurrent = [](Context* context) -> Result {
    const Lock lock(recorder->mutex);
    *context = reinterpret_cast<Context>(current_context);
    return Note("cuCtxGetCurrent", "");
  };
  driver.cuCtxGetId = [](Context context, unsigned long long* id) -> Result {
    *id = 1000 + (context == nullptr ? current_context : reinterpret_cast<uintptr_t>(context));
    const Lock lock(recorder->mutex);
    return Note("cuCtxGetId", "");
  };
  driver.cuModuleLoadData = [](Module* module, const void* image) -> Result {
    const Lock lock(recorder->mutex);
    *module = reinterpret_cast<Module>(const_cast<void*>(image));
    ++recorder->num_loads;
    return Note("cuModuleLoadData", "");
  };
  driver.cuModuleGetFunction = [](Function* function, Module module, const char* name) -> Result {
    const Lock lock(recorder->mutex);
    if (recorder->failing_call == "cuModuleGetFunction " + std::string(name)) return recorder->failing_code;
    recorder->images.insert({name, reinterpret_cast<const char*>(module)});
    *function = reinterpret_cast<Function>(const_cast<char*>(recorder->loaded.insert(name).first->c_str()));
    return Note("cuModuleGetFunction", "");
  };
  driver.cuFuncSetAttribute = [](Function, int attribute, int value) -> Result {
    const Lock lock(recorder->mutex);
    int& most = recorder->function_attributes[attribute];
    most = std::max(most, value);
    return Note("cuFuncSetAttribute", "");
  };
  driver.cuLaunchKernelEx = [](const LaunchConfig* config, Function function, void** parameters, void**) -> Result {
    const Lock lock(recorder->mutex);
    const std::string name = reinterpret_cast<const char*>(function);
    if (recorder->failing_call == "cuLaunchKernelEx " + name) return recorder->failing_code;
    Launch launch{name, *config, {config->attributes, config->attributes + config->num_attributes}, {}};
    for (size_t i = 0; i < recorder->parameters_of[name]; ++i) {
      launch.parameters.push_back(*static_cast<uint64_t*>(parameters[i]));
    }
    recorder->launches.push_back(launch);
    if (recorder->capture_status == kCaptureActive) recorder->capture_dependencies = {NewNode()};
    return Note("cuLaunchKernelEx", "launch " + name);
  };
  driver.cuMemsetD8Async = [](DevicePointer to, unsigned char value, size_t bytes, Stream stream) -> Result {
    const Lock lock(recorder->mutex);
    recorder->streams.insert(stream), recorder->zeroed.insert(to);
    return Note("cuMemsetD8Async", "memset " + std::to_string(bytes) + " to " + std::to_string(value));
  };
  driver.cuStreamGetCaptureInfo = [](Stream stream, int* status, uint64_t*, Graph* graph,
                                     const GraphNode** dependencies, size_t* count) -> Result {
    const Lock lock(recorder->mutex);
    recorder->streams.insert(stream);
    *status = recorder->capture_status;
    *graph = reinterpret_cast<Graph>(77);
    *dependencies = recorder->capture_dependencies.data();
    *count = recorder->capture_dependencies.size();
    return Note("cuStreamGetCaptureInfo", "");
  };
  driver.cuStreamUpdateCaptureDependencies = [](Stream stream, GraphNode* nodes, size_t count,
                                                unsigned flags) -> Result {
    const Lock lock(recorder->mutex);
    recorder->streams.insert(stream);
    if (flags == kSetCaptureDependencies) recorder->capture_dependencies.clear();
    recorder->capture_dependencies.insert(recorder->capture_dependencies.end(), nodes, nodes + count);
    return Note("cuStreamUpdateCaptureDependencies",
                (flags == kSetCaptureDependencies ? "set " : "add ") + Names(nodes, count));
  };
  driver.cuGraphAddMemsetNode = [](GraphNode* node, Graph, const GraphNode* dependencies, size_t count,
                                   const MemsetNodeParams* params, Context context) -> Result {
    const Lock lock(recorder->mutex);
    recorder->zeroed.insert(params->destination), recorder->memset_contexts.insert(context);
    *node = NewNode();
    return Note("cuGraphAddMemsetNode", "node " + Name(*node) + ": memset " +
                                            std::to_string(params->width * params->element_bytes) + " to " +
                                            std::to_string(params->value) + " rows " + std::to_string(params->height) +
                                            " after " + Names(dependencies, count));
  };
  driver.cuGraphAddKernelNode = [](GraphNode* node, Graph, const GraphNode* dependencies, size_t count,
                                   const KernelNodeParams* params) -> Result {
    const Lock lock(recorder->mutex);
    recorder->zeroed.insert(*static_cast<DevicePointer*>(params->parameters[0]));
    *node = NewNode();
    const unsigned bytes = *static_cast<unsigned*>(params->parameters[1]);
    const bool is_whole = params->grid_x * params->block_x * 16 >= bytes && params->shared_bytes == 0;
    return Note("cuGraphAddKernelNode", "node " + Name(*node) + ": " + reinterpret_cast<const char*>(params->function) +
                                            " of " + (is_whole ? "" : "a part of ") + std::to_string(bytes) +
                                            " after " + Names(dependencies, count));
  };
  driver.cuGraphAddEmptyNode = [](GraphNode* node, Graph, const GraphNode* dependencies, size_t count) -> Result {
    const Lock lock(recorder->mutex);
    *node = NewNode();
    return Note("cuGraphAddEmptyNode", "node " + Name(*node) + ": empty after " + Names(dependencies, count));
  };
  driver.cuGraphDebugDotPrint = [](Graph, const char*, unsigned) -> Result { return kSuccess; };
  return driver;
}

// Attributes as XLA lays them out: names sorted, values by pointer.
class Attributes {
 public:
  Attributes& Set(const std::string& name, const std::string& value) {
    strings_.push_back(value);
    spans_.push_back({strings_.back().data(), strings_.back().size()});
    return Put(name, XLA_FFI_AttrType_STRING, &spans_.back());
  }
  Attributes& Set(const std::string& name, const char* value) { return Set(name, std::string(value)); }
  Attributes& Set(const std::string& name, int64_t value) {
    numbers_.push_back({value});
    scalars_.push_back({XLA_FFI_DataType_S64, numbers_.back().data()});
    return Put(name, XLA_FFI_AttrType_SCALAR, &scalars_.back());
  }
  Attributes& Set(const std::string& name, float value) {
    floats_.push_back(value);
    scalars_.push_back({XLA_FFI_DataType_F32, &floats_.back()});
    return Put(name, XLA_FFI_AttrType_SCALAR, &scalars_.back());
  }
  Attributes& SetSizes(const std::string& name, std::vector<int64_t> value) {
    numbers_.push_back(std::move(value));
    arrays_.push_back({XLA_FFI_DataType_S64, numbers_.back().size(), numbers_.back().data()});
    return Put(name, XLA_FFI_AttrType_ARRAY, &arrays_.back());
  }
  Attributes& Set(const std::string& name, std::shared_ptr<Attributes> value) {
    children_.push_back(value);
    frames_.push_back(value->Frame());
    return Put(name, XLA_FFI_AttrType_DICTIONARY, &frames_.back());
  }
  void Erase(const std::string& name) { values_.erase(name); }

  XLA_FFI_Attrs Frame() {
    types_.clear(), names_.clear(), name_pointers_.clear(), pointers_.clear();
    for (auto& [name, value] : values_) {
      types_.push_back(value.first);
      names_.push_back({name.data(), name.size()});
      pointers_.push_back(value.second);
    }
    for (XLA_FFI_ByteSpan& name : names_) name_pointers_.push_back(&name);
    return {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,         static_cast<int64_t>(types_.size()), types_.data(),
            name_pointers_.data(),     pointers_.data()};
  }

 private:
  Attributes& Put(const std::string& name, XLA_FFI_AttrType type, void* value) {
    values_[name] = {type, value};
    return *this;
  }

  std::map<std::string, std::pair<XLA_FFI_AttrType, void*>> values_;
  // Deques: growing them moves nothing that a pointer was taken of.
  std::deque<std::string> strings_;
  std::deque<XLA_FFI_ByteSpan> spans_, names_;
  std::deque<std::vector<int64_t>> numbers_;
  std::deque<float> floats_;
  std::deque<XLA_FFI_Scalar> scalars_;
  std::deque<XLA_FFI_Array> arrays_;
  std::deque<XLA_FFI_Attrs> frames_;
  std::vector<std::shared_ptr<Attributes>> children_;
  std::vector<XLA_FFI_AttrType> types_;
  std::vector<XLA_FFI_ByteSpan*> name_pointers_;
  std::vector<void*> pointers_;
};

struct Buffer {
  XLA_FFI_DataType dtype;
  std::vector<int64_t> dims;
  uintptr_t address;
};

}  // namespace jax_moe::cuda::fake

// What the handlers' opaque pointers point to here.
struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

struct XLA_FFI_ExecutionContext {
  void* stream = nullptr;
  void* state = nullptr;
};

namespace jax_moe::cuda::fake {

inline const XLA_FFI_Api* Api() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api made = {};
    made.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    made.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    made.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
      return new XLA_FFI_Error{args->errc, args->message};
    };
    made.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
      args->message = args->error->message.c_str();
    };
    made.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
    made.XLA_FFI_Stream_Get = [](XLA_FFI_Stream_Get_Args* args) -> XLA_FFI_Error* {
      args->stream = args->ctx->stream;
      return nullptr;
    };
    made.XLA_FFI_State_Set = [](XLA_FFI_State_Set_Args* args) -> XLA_FFI_Error* {
      args->ctx->state = args->state;
      return nullptr;
    };
    made.XLA_FFI_State_Get = [](XLA_FFI_State_Get_Args* args) -> XLA_FFI_Error* {
      args->state = args->ctx->state;
      return nullptr;
    };
    return made;
  }();
  return &api;
}

// Calls a handler; the error is empty on success, else "CODE: message".
inline std::string Call(XLA_FFI_Handler* handler, XLA_FFI_ExecutionStage stage, XLA_FFI_ExecutionContext* context,
                        const std::vector<Buffer>& operands, const std::vector<Buffer>& results,
                        Attributes* attributes) {
  auto make = [](const std::vector<Buffer>& buffers, std::vector<XLA_FFI_Buffer>* made, std::vector<void*>* pointers) {
    for (const Buffer& buffer : buffers) {
      made->push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, buffer.dtype, reinterpret_cast<void*>(buffer.address),
                       static_cast<int64_t>(buffer.dims.size()), const_cast<int64_t*>(buffer.dims.data())});
    }
    for (XLA_FFI_Buffer& buffer : *made) pointers->push_back(&buffer);
  };
  std::vector<XLA_FFI_Buffer> made_operands, made_results;
  std::vector<void*> operand_pointers, result_pointers;
  make(operands, &made_operands, &operand_pointers);
  make(results, &made_results, &result_pointers);
  std::vector<XLA_FFI_ArgType> operand_types(operands.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> result_types(results.size(), XLA_FFI_RetType_BUFFER);

  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = Api();
  frame.ctx = context;
  frame.stage = stage;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(operands.size()), operand_types.data(),
                operand_pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(results.size()), result_types.data(),
                result_pointers.data()};
  if (attributes != nullptr) {
    frame.attrs = attributes->Frame();
  } else {
    frame.attrs.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
  }
  std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
  return error == nullptr ? "" : std::to_string(error->code) + ": " + error->message;
}

// The traits that XLA would read from a handler, and whether it declares a state.
inline XLA_FFI_Metadata Metadata(XLA_FFI_Handler* handler) {
  XLA_FFI_Metadata metadata = {};
  metadata.struct_size = XLA_FFI_Metadata_STRUCT_SIZE;
  metadata.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  XLA_FFI_Metadata_Extension extension = {{XLA_FFI_Metadata_Extension_STRUCT_SIZE, XLA_FFI_Extension_Metadata, nullptr},
                                          &metadata};
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.extension_start = &extension.extension_base;
  frame.api = Api();
  delete handler(&frame);
  return metadata;
}

}  // namespace jax_moe::cuda::fake

#endif  // JAX_MOE_TESTS_CUDA_FAKE_H_
