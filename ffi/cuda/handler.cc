// The CUDA handler: fused_moe, ragged_dot and parcels as XLA calls them. The kinds of call differ where they are
// instantiated (kinds.h), and nowhere else.
//
//   instantiate  once for each call site: decode the attributes and check all that does not depend on buffers
//   initialize   before every run, never while capturing (XLA initialises what a command buffer holds before it records
//                it): load them into the current context, once
//   execute      check the buffers, then enqueue by the launch rule (launch_sequence.h), eager or captured
//
// A call that succeeds allocates nothing, but for a list of the nodes that a captured call comes behind, synchronises
// nothing, and owns no stream and no event; the only state that calls share is the loaded kernels and three counters.

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "buffers.h"
#include "checks.h"
#include "cuda/driver.h"
#include "cuda/kinds.h"
#include "cuda/program.h"
#include "cuda/stream_api.h"
#include "launch_sequence.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe::cuda {
namespace {

// Calls enqueued since the library was loaded; a replay of a graph is none, because nobody calls the handler.
std::atomic<int64_t> eager_calls{0};
std::atomic<int64_t> captured_calls{0};
std::atomic<int64_t> forked_calls{0};

ffi::ErrorOr<const Driver*> RequireDriver(const Program& program) {
  const char* reason = nullptr;
  if (const Driver* driver = GetDriver(&reason)) return driver;
  const std::string what = std::string(program.kind().name()) + ": " + reason;
  return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kFailedPrecondition, what));
}

[[gnu::cold]] ffi::Error RefuseBytes(const std::string& name, const ffi::AnyBuffer& buffer, size_t bytes) {
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

[[gnu::cold]] ffi::Error RefuseSizes(const Kind& kind, const CallSizes& got, const CallSizes& planned) {
  std::string differing;
  for (size_t i = 0; i < kind.size_names().size(); ++i) {
    if (got[i] == planned[i]) continue;
    differing.append(differing.empty() ? "" : ", ").append(kind.size_names()[i]).append(" = ");
    differing.append(std::to_string(got[i]));
    differing.append(" (planned for ").append(std::to_string(planned[i])).append(")");
  }
  return Refuse("attribute kernels.sizes: the buffers have " + differing);
}

// All of a call that Program::Decode could not know: what its kind checks, that the kernels were planned for just
// these sizes, and the sizes and alignment of the buffers that only the call's program knows.
ffi::Error CheckBuffers(const Program& program, const Operands& operands, const Results& results) {
  const Kind& kind = program.kind();
  CallSizes sizes;
  JAX_MOE_TRY(kind.GetSizes(operands, results, program.sizes(), &sizes));
  if (sizes != program.sizes()) return RefuseSizes(kind, sizes, program.sizes());

  const std::span<const size_t> packed = kind.packed_weights();
  for (size_t i = 0; i < packed.size(); ++i) {
    const ffi::AnyBuffer& buffer = operands[packed[i]];
    const size_t bytes = program.weight_bytes(i);
    if (buffer.size_bytes() != bytes) return RefuseBytes(std::string(operands.name(packed[i])), buffer, bytes);
  }
  const size_t num_workspaces = program.workspace_bytes().size();
  for (size_t i = 0; i < num_workspaces; ++i) {
    const ffi::AnyBuffer& buffer = *results[i + 1];
    const size_t bytes = program.workspace_bytes()[i];
    if (buffer.size_bytes() != bytes) return RefuseBytes("workspace " + std::to_string(i), buffer, bytes);
  }
  for (size_t i = 0; i < operands.size(); ++i) {
    if (!IsAligned(operands[i])) return RefuseAlignment(std::string(operands.name(i)));
  }
  for (size_t i = 0; i <= num_workspaces; ++i) {
    if (!IsAligned(*results[i])) return RefuseAlignment("result " + std::to_string(i));
  }
  return ffi::Error::Success();
}

template <class KindOfCall>
ffi::ErrorOr<std::unique_ptr<Program>> Instantiate(ffi::Dictionary attributes) {
  return Program::Decode(std::make_unique<KindOfCall>(), attributes);
}

// Of jax_moe_fused_moe_v1, whose kernels had other attributes.
ffi::ErrorOr<std::unique_ptr<Program>> InstantiateV1(ffi::Dictionary) {
  return ffi::Unexpected(
      Refuse("custom call jax_moe_fused_moe_v1: the program was exported by an earlier jax_moe: export it again"));
}

ffi::Error Initialize(Program* program) {
  ffi::ErrorOr<const Driver*> driver = RequireDriver(*program);
  if (driver.has_error()) return driver.error();
  return program->Load(**driver);
}

// No attributes: instantiate has taken from them all there is.
ffi::Error Execute(Stream stream, Program* program, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  ffi::ErrorOr<const Driver*> driver = RequireDriver(*program);
  if (driver.has_error()) return driver.error();
  Operands operands(program->kind().operand_names());
  Results results;
  const Function* functions = nullptr;
  JAX_MOE_TRY(operands.Take(args));
  JAX_MOE_TRY(GetResults(rets, 1 + program->workspace_bytes().size(), "", &results));
  JAX_MOE_TRY(CheckBuffers(*program, operands, results));
  JAX_MOE_TRY(program->Loaded(**driver, &functions));

  const Sequence sequence = {results[0]->size_bytes(), program->launches().size(), program->first_that_adds()};
  StreamApi api(**driver, functions[program->launches().size()]);
  CallLaunches launches{api, *program, functions, operands, results};
  const LaunchResult launched = Enqueue(api, stream, sequence, results[0]->untyped_data(), launches);
  if (!launched.ok()) {
    std::string what = std::string(program->kind().name()) + ": " + LaunchStepName(launched.step);
    if (launched.step == LaunchStep::kLaunch) what += " " + program->launches()[launched.launch].name;
    what += std::string(": ") + api.failed_call() + ": " + ErrorText(**driver, launched.code);
    if (launched.join_code != 0)
      what += "; joining the zeroing then failed: " + ErrorText(**driver, launched.join_code);
    return ffi::Error::Internal(what);
  }

  const int64_t before = (launched.captured ? captured_calls : eager_calls).fetch_add(1, std::memory_order_relaxed);
  if (launched.forked) forked_calls.fetch_add(1, std::memory_order_relaxed);
  if (launched.captured) api.DumpGraph(stream, program->kind().name(), before);
  return ffi::Error::Success();
}

auto BindExecute() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>().Ctx<ffi::State<Program>>().RemainingArgs().RemainingRets();
}

}  // namespace
}  // namespace jax_moe::cuda

// What the library shows: everything else in it is hidden.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFusedMoeCudaInstantiate, jax_moe::cuda::Instantiate<jax_moe::cuda::FusedMoe>,
                              xla::ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeRaggedDotCudaInstantiate, jax_moe::cuda::Instantiate<jax_moe::cuda::RaggedDot>,
                              xla::ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeParcelsCudaInstantiate, jax_moe::cuda::Instantiate<jax_moe::cuda::Parcels>,
                              xla::ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeFusedMoeCudaV1Instantiate, jax_moe::cuda::InstantiateV1,
                              xla::ffi::Ffi::BindInstantiate().Attrs());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeCudaInitialize, jax_moe::cuda::Initialize,
                              xla::ffi::Ffi::BindInitialize().Ctx<xla::ffi::State<jax_moe::cuda::Program>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeCuda, jax_moe::cuda::Execute, jax_moe::cuda::BindExecute(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
// The same without the trait: XLA never captures it. For callers who opt out of command buffers.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeCudaNoCapture, jax_moe::cuda::Execute, jax_moe::cuda::BindExecute());

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
