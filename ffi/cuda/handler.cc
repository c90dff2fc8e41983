// The CUDA handler: fused_moe as XLA calls it.
//
//   instantiate  once for each call site: decode the attributes and check all that does not depend on buffers
//   initialize   before every run, never while capturing (XLA initialises what a command buffer holds before it records
//                it): load them into the current context, once
//   execute      check the buffers, then enqueue by the launch rule (launch_sequence.h), eager or captured
//
// A call that succeeds allocates nothing, synchronises nothing, and owns no stream and no event; the only state that
// calls share is the loaded kernels and three counters.

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "cuda/driver.h"
#include "cuda/program.h"
#include "decode.h"
#include "launch_sequence.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe::cuda {
namespace {

// Calls enqueued since the library was loaded; a replay of a graph is none, because nobody calls the handler.
std::atomic<int64_t> eager_calls{0};
std::atomic<int64_t> captured_calls{0};
std::atomic<int64_t> forked_calls{0};

ffi::ErrorOr<const Driver*> RequireDriver() {
  const char* reason = nullptr;
  if (const Driver* driver = GetDriver(&reason)) return driver;
  return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kFailedPrecondition, std::string("fused_moe: ") + reason));
}

// The stream API that launch_sequence.h asks for, and a note of the driver call that failed first.
class StreamApi {
 public:
  using Stream = cuda::Stream;
  using Node = cuda::GraphNode;

  explicit StreamApi(const Driver& driver) : driver_(driver) {}

  const char* failed_call() const { return failed_call_; }

  Result IsCapturing(Stream stream, bool* capturing) {
    int status = kCaptureNone;
    const Result result = Check("cuStreamIsCapturing", driver_.cuStreamIsCapturing(stream, &status));
    *capturing = status == kCaptureActive;
    if (result != kSuccess || status == kCaptureNone || status == kCaptureActive) return result;
    return Check("cuStreamIsCapturing", kErrorStreamCaptureInvalidated);
  }

  Result Zero(Stream stream, void* destination, size_t bytes) {
    return Check("cuMemsetD8Async", driver_.cuMemsetD8Async(Address(destination), 0, bytes, stream));
  }

  Result AddZeroNode(Stream stream, void* destination, size_t bytes, Node* node) {
    Capture capture;
    if (Result result = GetCapture(stream, &capture)) return result;
    Context context = nullptr;
    if (Result result = Check("cuCtxGetCurrent", driver_.cuCtxGetCurrent(&context))) return result;
    // One row, the only shape of memset that can be updated in an instantiated graph; of words, as H is a multiple
    // of 16.
    constexpr unsigned kWord = 4;
    const MemsetNodeParams params = {Address(destination), 0, 0, kWord, bytes / kWord, 1};
    return Check("cuGraphAddMemsetNode", driver_.cuGraphAddMemsetNode(node, capture.graph, capture.dependencies,
                                                                      capture.num_dependencies, &params, context));
  }

  Result AddDependency(Stream stream, Node node) {
    return Check("cuStreamUpdateCaptureDependencies",
                 driver_.cuStreamUpdateCaptureDependencies(stream, &node, 1, kAddCaptureDependencies));
  }

  Result AddEmptyNode(Stream stream) {
    Capture capture;
    if (Result result = GetCapture(stream, &capture)) return result;
    Node node = nullptr;
    const Result result =
        Check("cuGraphAddEmptyNode",
              driver_.cuGraphAddEmptyNode(&node, capture.graph, capture.dependencies, capture.num_dependencies));
    if (result != kSuccess) return result;
    return Check("cuStreamUpdateCaptureDependencies",
                 driver_.cuStreamUpdateCaptureDependencies(stream, &node, 1, kSetCaptureDependencies));
  }

  Result Launch(Stream stream, Function function, const Kernel& kernel, void** parameters) {
    LaunchAttribute attributes[2] = {};
    unsigned num_attributes = 0;
    if (kernel.cluster > 1) {
      LaunchAttribute& attribute = attributes[num_attributes++];
      attribute.id = kLaunchClusterDimension;
      attribute.value.cluster = {kernel.cluster, 1, 1};
    }
    if (kernel.overlap) {
      LaunchAttribute& attribute = attributes[num_attributes++];
      attribute.id = kLaunchProgrammaticStreamSerialization;
      attribute.value.programmatic_stream_serialization = 1;
    }
    const LaunchConfig config = {kernel.grid,         1,      1,          kernel.block,  1, 1,
                                 kernel.shared_bytes, stream, attributes, num_attributes};
    return Check("cuLaunchKernelEx", driver_.cuLaunchKernelEx(&config, function, parameters, nullptr));
  }

  // Writes the graph being captured, as `dot` reads it, to the folder JAX_MOE_GRAPH_DUMP, one file a captured call.
  void DumpGraph(Stream stream, int64_t number) {
    static const char* const folder = std::getenv("JAX_MOE_GRAPH_DUMP");
    Capture capture;
    if (folder == nullptr || GetCapture(stream, &capture) != kSuccess) return;
    const std::string path = std::string(folder) + "/fused_moe." + std::to_string(number) + ".dot";
    constexpr unsigned kVerbose = 1;
    Check("cuGraphDebugDotPrint", driver_.cuGraphDebugDotPrint(capture.graph, path.c_str(), kVerbose));
  }

 private:
  struct Capture {
    Graph graph = nullptr;
    const GraphNode* dependencies = nullptr;
    size_t num_dependencies = 0;
  };

  static DevicePointer Address(void* pointer) { return reinterpret_cast<DevicePointer>(pointer); }

  Result Check(const char* call, Result result) {
    if (result != kSuccess && *failed_call_ == '\0') failed_call_ = call;
    return result;
  }

  Result GetCapture(Stream stream, Capture* capture) {
    int status = kCaptureNone;
    uint64_t id = 0;
    return Check("cuStreamGetCaptureInfo",
                 driver_.cuStreamGetCaptureInfo(stream, &status, &id, &capture->graph, &capture->dependencies,
                                                &capture->num_dependencies));
  }

  const Driver& driver_;
  const char* failed_call_ = "";
};

// The kernels of one call with its buffers, as launch_sequence.h asks for them.
class CallKernels {
 public:
  CallKernels(StreamApi& api, const Program& program, const Functions& functions, const Operands& operands,
              const Results& results)
      : api_(api), program_(program), functions_(functions), operands_(operands), results_(results) {}

  Result Sort(Stream stream) { return Launch(stream, kSort); }
  Result Prepare(Stream stream) { return Launch(stream, kPrepare); }
  Result Gemm1(Stream stream) { return Launch(stream, kGemm1); }
  Result Gemm2(Stream stream) { return Launch(stream, kGemm2); }
  Result Combine(Stream stream) { return Launch(stream, kCombine); }

 private:
  Result Launch(Stream stream, Step step) {
    const Kernel& kernel = program_.kernel(step);
    uint64_t values[kMostArguments];
    void* parameters[kMostArguments];
    for (size_t i = 0; i < kernel.arguments.size(); ++i) {
      values[i] = Value(kernel.arguments[i]);
      parameters[i] = &values[i];
    }
    return api_.Launch(stream, functions_[step], kernel, parameters);
  }

  // Program::Decode has seen that the buffers are there.
  uint64_t Value(const Argument& argument) const {
    switch (argument.kind) {
      case Argument::Kind::kOperand:
        return reinterpret_cast<uint64_t>(operands_[argument.value]->untyped_data());
      case Argument::Kind::kResult:
        return reinterpret_cast<uint64_t>(results_[argument.value]->untyped_data());
      case Argument::Kind::kScalar:
        break;
    }
    return argument.value;  // of a scalar the driver reads the low four bytes, of a null pointer all eight
  }

  StreamApi& api_;
  const Program& program_;
  const Functions& functions_;
  const Operands& operands_;
  const Results& results_;
};

bool HasBytes(const ffi::AnyBuffer& buffer, int64_t bytes) {
  return static_cast<int64_t>(buffer.size_bytes()) == bytes;
}

[[gnu::cold]] ffi::Error RefuseBytes(const std::string& name, const ffi::AnyBuffer& buffer, int64_t bytes) {
  return Refuse(name + ": got " + Describe(buffer) + ", " + std::to_string(buffer.size_bytes()) +
                " bytes; the call's kernels were planned for " + std::to_string(bytes));
}

// Kernels load 16 bytes at a time. XLA aligns what it allocates to 256 bytes, and today refuses imported (DLPack)
// buffers that are not aligned to 16.
bool IsAligned(const ffi::AnyBuffer& buffer) {
  constexpr uintptr_t kAlignment = 16;
  return reinterpret_cast<uintptr_t>(buffer.untyped_data()) % kAlignment == 0 || buffer.element_count() == 0;
}

[[gnu::cold]] ffi::Error RefuseAlignment(const std::string& name) {
  return Refuse(name + ": its data starts at an address that is not a multiple of 16, which the GPU kernels need. " +
                "If it was imported (DLPack), import an aligned copy");
}

[[gnu::cold]] ffi::Error RefuseShape(const std::array<int64_t, 7>& shape, const std::array<int64_t, 7>& planned_shape) {
  std::string got, planned;
  for (int64_t size : shape) got.append(" ").append(std::to_string(size));
  for (int64_t size : planned_shape) planned.append(" ").append(std::to_string(size));
  return Refuse("attribute kernels.shape (T, K, L, P, H, I, bytes of an output element): the buffers have" + got +
                ", the kernels were planned for" + planned);
}

// All of a call that Program::Decode could not know: what DecodeProblem checks, that the kernels were planned for just
// these sizes, and the sizes and alignment of the buffers that only the kernels' own plan knows.
ffi::Error CheckBuffers(const Program& program, const Operands& operands, const Results& results, Problem* problem) {
  constexpr size_t kIntermediate = 5;
  JAX_MOE_TRY(DecodeProblem(operands, results, program.options(), program.shape()[kIntermediate], problem));
  const Problem& p = *problem;
  const std::array<int64_t, 7> shape = {
      p.num_tokens, p.top_k, p.num_experts, p.num_parts, p.hidden_size, p.intermediate_size, p.out_is_bf16 ? 2 : 4};
  if (shape != program.shape()) return RefuseShape(shape, program.shape());

  constexpr Operand kWeights[4] = {kGateUpPayload, kGateUpBlockScale, kDownPayload, kDownBlockScale};
  for (size_t i = 0; i < 4; ++i) {
    const ffi::AnyBuffer& buffer = *operands[kWeights[i]];
    const int64_t bytes = program.weight_bytes()[i];
    if (!HasBytes(buffer, bytes)) return RefuseBytes(std::string(kOperandNames[kWeights[i]]), buffer, bytes);
  }
  const size_t num_workspaces = program.workspace_bytes().size();
  for (size_t i = 0; i < num_workspaces; ++i) {
    const ffi::AnyBuffer& buffer = *results[i + 1];
    const int64_t bytes = program.workspace_bytes()[i];
    if (!HasBytes(buffer, bytes)) return RefuseBytes("workspace " + std::to_string(i), buffer, bytes);
  }
  for (size_t i = 0; i < kNumOperands; ++i) {
    if (!IsAligned(*operands[i])) return RefuseAlignment(std::string(kOperandNames[i]));
  }
  for (size_t i = 0; i <= num_workspaces; ++i) {
    if (!IsAligned(*results[i])) return RefuseAlignment("result " + std::to_string(i));
  }
  return ffi::Error::Success();
}

ffi::ErrorOr<std::unique_ptr<Program>> Instantiate(ffi::Dictionary attributes) { return Program::Decode(attributes); }

ffi::Error Initialize(Program* program) {
  ffi::ErrorOr<const Driver*> driver = RequireDriver();
  if (driver.has_error()) return driver.error();
  return program->Load(**driver);
}

// No attributes: instantiate has taken from them all there is.
ffi::Error Execute(Stream stream, Program* program, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  ffi::ErrorOr<const Driver*> driver = RequireDriver();
  if (driver.has_error()) return driver.error();
  Operands operands;
  Results results;
  Problem problem;
  Functions functions;
  JAX_MOE_TRY(GetOperands(args, &operands));
  JAX_MOE_TRY(GetResults(rets, 1 + program->workspace_bytes().size(), "", &results));
  JAX_MOE_TRY(CheckBuffers(*program, operands, results, &problem));
  JAX_MOE_TRY(program->Loaded(**driver, &functions));

  LaunchPlan plan;
  plan.atomic = problem.combine == Combine::kAtomic;
  plan.prepare = program->kernel(kPrepare).present;
  plan.output_bytes =
      static_cast<size_t>(problem.num_tokens) * problem.hidden_size * (problem.out_is_bf16 ? 2 : sizeof(float));
  StreamApi api(**driver);
  CallKernels kernels(api, *program, functions, operands, results);
  const LaunchResult launched = EnqueueFusedMoe(api, stream, plan, problem.out, kernels);
  if (!launched.ok()) {
    std::string what = std::string("fused_moe: ") + LaunchStepName(launched.step) + ": " + api.failed_call() + ": " +
                       ErrorText(**driver, launched.code);
    if (launched.join_code != 0)
      what += "; joining the zeroing then failed: " + ErrorText(**driver, launched.join_code);
    return ffi::Error::Internal(what);
  }

  const int64_t before = (launched.captured ? captured_calls : eager_calls).fetch_add(1, std::memory_order_relaxed);
  if (launched.forked) forked_calls.fetch_add(1, std::memory_order_relaxed);
  if (launched.captured) api.DumpGraph(stream, before);
  return ffi::Error::Success();
}

auto BindExecute() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>().Ctx<ffi::State<Program>>().RemainingArgs().RemainingRets();
}

}  // namespace
}  // namespace jax_moe::cuda

// What the library shows: everything else in it is hidden.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFusedMoeCudaInstantiate, jax_moe::cuda::Instantiate,
                              xla::ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFusedMoeCudaInitialize, jax_moe::cuda::Initialize,
                              xla::ffi::Ffi::BindInitialize().Ctx<xla::ffi::State<jax_moe::cuda::Program>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFusedMoeCuda, jax_moe::cuda::Execute, jax_moe::cuda::BindExecute(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
// The same without the trait: XLA never captures it. For callers who opt out of command buffers.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFusedMoeCudaNoCapture, jax_moe::cuda::Execute, jax_moe::cuda::BindExecute());

extern "C" {

// XLA_FFI_TypeId and XLA_FFI_TypeInfo of the call's state, for jax.ffi.register_ffi_type.
void* JaxMoeCudaTypeId() { return &jax_moe::cuda::Program::id; }

const void* JaxMoeCudaTypeInfo() {
  static constexpr XLA_FFI_TypeInfo info = xla::ffi::MakeTypeInfo<jax_moe::cuda::Program>();
  return &info;
}

// Calls since the library was loaded: eager, captured, and captured with the zeroing on a branch of its own.
void JaxMoeCudaCounters(int64_t counters[3]) {
  counters[0] = jax_moe::cuda::eager_calls.load(std::memory_order_relaxed);
  counters[1] = jax_moe::cuda::captured_calls.load(std::memory_order_relaxed);
  counters[2] = jax_moe::cuda::forked_calls.load(std::memory_order_relaxed);
}

}  // extern "C"

#pragma GCC visibility pop
