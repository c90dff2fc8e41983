#include "calls.h"

#include <cstdint>
#include <cstring>

#include "fibers.h"

namespace launch_rule {

using jax_moe::LaunchPlan;
using jax_moe::LaunchResult;
using jax_moe::LaunchStep;

constexpr int kInjected = 700;  // an injected error's code, plus the number of the driver call that returned it
constexpr std::size_t kOutputBytes = 4096;

struct CallContext {
  Process* process;
  CallSpec spec;
  int call;
  int x, routing, out, sorted, prepared, hidden, rows;  // buffers
  int driver_calls = 0;
  const char* failed = nullptr;  // the first driver call that failed, and its code
  int failed_code = 0;
  bool join_failed = false;

  // One driver call: a scheduling point, perhaps an injected error, else `body`, whose errors are reported.
  template <class Body>
  int Do(const char* what, Body body) {
    Fibers::Yield();
    const bool join = std::strcmp(what, "AddDependency") == 0 || std::strcmp(what, "WaitEvent") == 0;
    if (failed && !join) process->model.Violation("error-path", std::string(what) + " follows a failed " + failed);
    const int index = driver_calls++;
    const bool inject = index == spec.fail_at || (index > spec.fail_at && spec.keep_failing);
    const int code = inject ? kInjected + index : body();
    if (code != 0) {
      if (!failed) {
        process->errors += inject;
        failed = what;
        failed_code = code;
      }
      join_failed |= join;
      if (!inject) {
        process->model.Violation("driver-error", std::string(what) + " returned " + std::to_string(code) + " to " +
                                                     process->model.Who(call));
      }
    }
    return code;
  }

  int Kernel(const char* what, int stream, Kind kind, std::vector<std::pair<int, Access>> buffers) {
    return Do(what, [&] { return process->model.Enqueue(stream, {kind, call, 0, std::move(buffers)}); });
  }

  RecordingApi::Side NewSide() {
    Model& m = process->model;
    return {m.NewStream(spec.device), m.NewEvent(spec.device), m.NewEvent(spec.device)};
  }
  RecordingApi::Side own_side{-1, -1, -1};
};

int RecordingApi::IsCapturing(int stream, bool* capturing) {
  return context->Do("IsCapturing",
                     [&] { return context->process->model.IsCapturing(context->call, stream, capturing); });
}

// An address is its buffer's number in multiples of 4096, so that a pointer into the middle would be noticed.
static int BufferOf(const void* address) { return static_cast<int>(reinterpret_cast<std::uintptr_t>(address) / 4096); }
static void* AddressOf(int buffer) { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(buffer) * 4096); }

static Work ZeroWork(const CallContext& context, void* dst, std::size_t bytes) {
  return {Kind::kZero, context.call, bytes, {{BufferOf(dst), Access::kWrite}}};
}

int RecordingApi::Zero(int stream, void* dst, std::size_t bytes) {
  return context->Do("Zero", [&] {
    return bytes == 0 ? kInvalidValue : context->process->model.Enqueue(stream, ZeroWork(*context, dst, bytes));
  });
}

int RecordingApi::AddZeroNode(int stream, void* dst, std::size_t bytes, int* node) {
  return context->Do("AddZeroNode", [&] {
    return bytes == 0 ? kInvalidValue : context->process->model.AddNode(stream, ZeroWork(*context, dst, bytes), node);
  });
}

int RecordingApi::AddDependency(int stream, int node) {
  return context->Do("AddDependency", [&] { return context->process->model.AddDependency(stream, node); });
}

int RecordingApi::AddEmptyNode(int stream) {
  return context->Do("AddEmptyNode",
                     [&] { return context->process->model.Enqueue(stream, {Kind::kEmpty, context->call, 0, {}}); });
}

RecordingApi::Side& RecordingApi::ModuleSide() {
  auto& side = context->process->module_side;
  if (!side) side.reset(new Side(context->NewSide()));
  return *side;
}

RecordingApi::Side& RecordingApi::SiteSide() {
  return context->process->site_sides.try_emplace(context->spec.site, context->NewSide()).first->second;
}

RecordingApi::Side& RecordingApi::SiteOnDeviceSide() {
  const auto key = std::make_pair(context->spec.site, context->spec.device);
  return context->process->site_device_sides.try_emplace(key, context->NewSide()).first->second;
}

RecordingApi::Side& RecordingApi::OwnSide() {
  if (context->own_side.aux < 0) context->own_side = context->NewSide();
  return context->own_side;
}

int RecordingApi::RecordEvent(int event, int stream) {
  return context->Do("RecordEvent", [&] { return context->process->model.RecordEvent(context->call, event, stream); });
}

int RecordingApi::WaitEvent(int stream, int event) {
  return context->Do("WaitEvent", [&] { return context->process->model.WaitEvent(context->call, stream, event); });
}

int RecordingKernels::Sort(int stream) {
  return context->Kernel("Sort", stream, Kind::kSort,
                         {{context->routing, Access::kRead}, {context->sorted, Access::kWrite}});
}

int RecordingKernels::Prepare(int stream) {
  return context->Kernel("Prepare", stream, Kind::kPrepare,
                         {{context->x, Access::kRead}, {context->prepared, Access::kWrite}});
}

int RecordingKernels::Gemm1(int stream) {
  return context->Kernel("Gemm1", stream, Kind::kGemm1,
                         {{context->spec.prepare ? context->prepared : context->x, Access::kRead},
                          {context->sorted, Access::kRead},
                          {context->hidden, Access::kWrite}});
}

int RecordingKernels::Gemm2(int stream) {
  return context->Kernel("Gemm2", stream, Kind::kGemm2,
                         {{context->hidden, Access::kRead},
                          {context->sorted, Access::kRead},
                          context->spec.atomic ? std::make_pair(context->out, Access::kAccumulate)
                                               : std::make_pair(context->rows, Access::kWrite)});
}

int RecordingKernels::Combine(int stream) {
  return context->Kernel("Combine", stream, Kind::kCombine,
                         {{context->rows, Access::kRead}, {context->out, Access::kWrite}});
}

// The step that the result should name when this driver call fails.
static bool StepFits(const char* what, LaunchStep step) {
  static const std::map<std::string, std::set<LaunchStep>> kSteps = {
      {"IsCapturing", {LaunchStep::kIsCapturing}},
      {"Zero", {LaunchStep::kZero}},
      {"AddZeroNode", {LaunchStep::kZero}},
      {"AddDependency", {LaunchStep::kJoin}},
      {"AddEmptyNode", {LaunchStep::kEmpty}},
      {"Sort", {LaunchStep::kSort}},
      {"Prepare", {LaunchStep::kPrepare}},
      {"Gemm1", {LaunchStep::kGemm1}},
      {"Gemm2", {LaunchStep::kGemm2}},
      {"Combine", {LaunchStep::kCombine}},
      {"RecordEvent", {LaunchStep::kZero}},
      {"WaitEvent", {LaunchStep::kZero, LaunchStep::kJoin}}};
  return kSteps.at(what).count(step) != 0;
}

static void CheckResult(const CallContext& c, const LaunchResult& result) {
  Model& model = c.process->model;
  if (result.ok() != (c.failed == nullptr) || (c.failed && result.code != c.failed_code) ||
      (c.failed && !StepFits(c.failed, result.step)) || (!c.failed && result.step != LaunchStep::kNone)) {
    model.Violation("error-report", model.Who(c.call) + " met code " + std::to_string(c.failed_code) + " from " +
                                        (c.failed ? c.failed : "nothing") + " and reported code " +
                                        std::to_string(result.code) + " while " + LaunchStepName(result.step));
  }
  const bool join_reported = result.step == LaunchStep::kJoin || result.join_code != 0;
  if (result.forked && c.join_failed != join_reported) {
    model.Violation("error-report", model.Who(c.call) + (c.join_failed ? " hid" : " invented") + " a failed join");
  }
  if (result.captured != c.spec.captured && !c.failed) {
    model.Violation("error-report", model.Who(c.call) + " does not say whether it was captured");
  }
}

static CallContext NewCall(Process& process, int thread, const CallSpec& spec, int stream) {
  Model& model = process.model;
  CallContext c;
  c.process = &process;
  c.spec = spec;
  c.call = model.OpenCall(thread, spec.site, spec.device, stream, spec.captured);
  for (int* buffer : {&c.x, &c.routing, &c.out, &c.sorted, &c.prepared, &c.hidden, &c.rows}) {
    *buffer = model.NewBuffer(spec.device, kOutputBytes);
  }
  return c;
}

static LaunchResult Enter(CallContext& c, int stream) {
  RecordingApi api{&c};
  RecordingKernels kernels{&c};
  LaunchPlan plan;
  plan.atomic = c.spec.atomic;
  plan.prepare = c.spec.prepare;
  plan.output_bytes = c.spec.empty ? 0 : kOutputBytes;
  const LaunchResult result = RunSequence(api, stream, plan, AddressOf(c.out), kernels);
  CheckResult(c, result);
  return result;
}

// What XLA did with these buffers before, or does with them after the call: the op may rely on nothing.
static void XlaReuses(CallContext& c, int stream) {
  c.process->model.Enqueue(stream, {Kind::kXlaWrite,
                                    -1,
                                    0,
                                    {{c.out, Access::kWrite},
                                     {c.sorted, Access::kWrite},
                                     {c.prepared, Access::kWrite},
                                     {c.hidden, Access::kWrite},
                                     {c.rows, Access::kWrite}}});
}

static void XlaReads(CallContext& c, int stream) {
  if (!c.spec.empty) c.process->model.Enqueue(stream, {Kind::kXlaRead, c.call, 0, {{c.out, Access::kRead}}});
}

static std::string Expected(const CallSpec& spec) {
  if (spec.empty) return "";
  return std::string(spec.atomic ? "zero " : "") + "sort " + (spec.prepare ? "prepare " : "") + "gemm1 gemm2 " +
         (spec.atomic ? "" : "combine ");
}

void EagerCall(Process& process, int thread, const CallSpec& spec, int main_stream) {
  Model& model = process.model;
  CallContext c = NewCall(process, thread, spec, main_stream);
  XlaReuses(c, main_stream);
  const LaunchResult result = Enter(c, main_stream);
  model.CloseCall(c.call);
  if (result.ok()) {
    XlaReads(c, main_stream);
    std::string kinds;
    for (Kind kind : model.eager_kinds(c.call)) kinds += std::string(Name(kind)) + " ";
    if (kinds != Expected(spec)) {
      model.Violation("order", "an eager call enqueued '" + kinds + "' instead of '" + Expected(spec) + "'");
    }
  }
  XlaReuses(c, main_stream);
}

// A trace into a command buffer and its replays: XLA captures on a stream that it borrows for this, ends the capture
// whatever the handler returned, and launches the graph on the compute stream.
void CapturedCall(Process& process, int thread, const CallSpec& spec, int main_stream) {
  Model& model = process.model;
  const int trace = model.NewStream(spec.device);
  CallContext c = NewCall(process, thread, spec, trace);
  Fibers::Yield();
  model.BeginCapture(trace);
  const LaunchResult result = Enter(c, trace);
  if (!c.join_failed) model.CheckJoined(trace, c.call);
  Fibers::Yield();
  int graph = -1;
  const int code = model.EndCapture(trace, &graph);
  if (code == kCaptureUnjoined) {
    model.Violation("joined", "EndCapture of " + model.Who(c.call) + " returned 904: a forked stream is not joined");
  } else if (code != 0) {
    model.Violation("driver-error", "EndCapture of " + model.Who(c.call) + " returned " + std::to_string(code));
  }
  model.CloseCall(c.call);
  if (!result.ok() || code != 0) return;
  model.CheckGraph(graph, c.call, spec.atomic, spec.empty);
  process.topologies[spec.Plan()].insert(model.Topology(graph));
  for (int i = 0; i < spec.replays; ++i) {
    Fibers::Yield();
    XlaReuses(c, main_stream);
    const int launched = model.LaunchGraph(graph, main_stream);
    if (launched != 0) model.Violation("driver-error", "LaunchGraph returned " + std::to_string(launched));
    XlaReads(c, main_stream);
  }
}

}  // namespace launch_rule
