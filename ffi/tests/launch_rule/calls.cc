#include "calls.h"

#include <cstdint>
#include <cstring>

#include "fibers.h"

namespace launch_rule {

using jax_moe::LaunchResult;
using jax_moe::LaunchStep;
using jax_moe::Sequence;

constexpr int kInjected = 700;  // an injected error's code, plus the number of the driver call that returned it
constexpr std::size_t kOutputBytes = 4096;

// fused_moe's lists; then lists that other kinds of call may have: the first launch adds, two add, a single one does
// not; and ragged_dot's, whose first and last launch write different rows of the output; at the end fused_moe's of few
// routes, whose GEMMs read the routing themselves.
static const LaunchSpec kSort = {Kind::kSort, {{kRouting, Access::kRead}, {kSorted, Access::kWrite}}};
static const LaunchSpec kPassOverX = {Kind::kXRows, {{kX, Access::kRead}, {kXRows, Access::kWrite}}};
static const LaunchSpec kCombine = {Kind::kCombine, {{kRows, Access::kRead}, {kOut, Access::kWrite}}};
static const LaunchSpec kAdd = {Kind::kGemm2, {{kX, Access::kRead}, {kOut, Access::kAccumulate}}};
static const LaunchSpec kFinish = {Kind::kFinish, {{kOut, Access::kWrite}}};  // in place

static LaunchSpec Gemm1(BufferName x) {
  return {Kind::kGemm1, {{x, Access::kRead}, {kSorted, Access::kRead}, {kHidden, Access::kWrite}}};
}

static LaunchSpec Gemm2(BufferName to, Access access) {
  return {Kind::kGemm2, {{kHidden, Access::kRead}, {kSorted, Access::kRead}, {to, access}}};
}

const std::array<LaunchList, kNumLists> kLists = {{
    {"atomic", {kSort, Gemm1(kX), Gemm2(kOut, Access::kAccumulate)}, 2},
    {"atomic+x_rows", {kSort, kPassOverX, Gemm1(kXRows), Gemm2(kOut, Access::kAccumulate)}, 3},
    {"ordered", {kSort, Gemm1(kX), Gemm2(kRows, Access::kWrite), kCombine}, {}},
    {"ordered+x_rows", {kSort, kPassOverX, Gemm1(kXRows), Gemm2(kRows, Access::kWrite), kCombine}, {}},
    {"empty", {}, {}},
    {"adds at once", {kAdd}, 0},
    {"adds first", {kAdd, kFinish, kSort}, 0},
    {"adds twice",
     {kSort,
      Gemm1(kX),
      Gemm2(kOut, Access::kAccumulate),
      {Kind::kGemm2, {{kX, Access::kRead}, {kOut, Access::kAddMore}}},
      kFinish},
     2},
    {"one launch", {{Kind::kGemm2, {{kX, Access::kRead}, {kOut, Access::kWrite}}}}, {}},
    {"product",
     {{Kind::kSort, {{kRouting, Access::kRead}, {kSorted, Access::kWrite}, {kOut, Access::kWrite}}},
      {Kind::kXRows, {{kX, Access::kRead}, {kSorted, Access::kRead}, {kXRows, Access::kWrite}}},
      {Kind::kGemm2, {{kXRows, Access::kRead}, {kSorted, Access::kRead}, {kOut, Access::kWrite}}}},
     {}},
    {"few routes",
     {{Kind::kGemm1, {{kX, Access::kRead}, {kRouting, Access::kRead}, {kHidden, Access::kWrite}}},
      {Kind::kGemm2, {{kHidden, Access::kRead}, {kRouting, Access::kRead}, {kOut, Access::kAccumulate}}}},
     1},
}};

struct CallContext {
  Process* process;
  CallSpec spec;
  int call;
  int buffers[kNumBuffers];
  int driver_calls = 0;
  const char* failed = nullptr;  // the first driver call that failed, and its code
  int failed_code = 0;
  std::size_t failed_launch = 0;  // which, if it was a launch
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

  const LaunchList& list() const { return kLists[spec.list]; }

  RecordingApi::Side NewSide() {
    Model& m = process->model;
    return {m.NewStream(spec.device), m.NewEvent(spec.device), m.NewEvent(spec.device)};
  }
  RecordingApi::Side own_side{-1, -1, -1};
};

int RecordingApi::IsCapturing(int stream, bool* capturing, Entry* entry) {
  return context->Do("IsCapturing",
                     [&] { return context->process->model.IsCapturing(context->call, stream, capturing, entry); });
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

int RecordingApi::AddZeroNode(const Entry& entry, void* dst, std::size_t bytes, int* node) {
  return context->Do("AddZeroNode", [&] {
    return bytes == 0 ? kInvalidValue : context->process->model.AddNode(entry, ZeroWork(*context, dst, bytes), node);
  });
}

int RecordingApi::AddDependency(int stream, int node) {
  return context->Do("AddDependency", [&] { return context->process->model.AddDependency(stream, node); });
}

int RecordingApi::AddEmptyNode(int stream, const Entry&) {
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

int RecordingLaunches::Launch(int stream, std::size_t index) {
  CallContext& c = *context;
  const bool failed_before = c.failed != nullptr;
  if (index >= c.list().launches.size()) {
    c.process->model.Violation("order", c.process->model.Who(c.call) + " launches beyond its list");
    return kInvalidValue;
  }
  const int code = c.Do("Launch", [&] {
    const LaunchSpec& launch = c.list().launches[index];
    Work work = {launch.kind, c.call, 0, {}};
    for (const auto& [name, access] : launch.buffers) work.buffers.emplace_back(c.buffers[name], access);
    return c.process->model.Enqueue(stream, work);
  });
  if (code != 0 && !failed_before) c.failed_launch = index;
  return code;
}

// The step that the result should name when this driver call fails.
static bool StepFits(const char* what, LaunchStep step) {
  static const std::map<std::string, std::set<LaunchStep>> kSteps = {
      {"IsCapturing", {LaunchStep::kIsCapturing}}, {"Zero", {LaunchStep::kZero}},
      {"AddZeroNode", {LaunchStep::kZero}},        {"AddDependency", {LaunchStep::kJoin}},
      {"AddEmptyNode", {LaunchStep::kEmpty}},      {"Launch", {LaunchStep::kLaunch}},
      {"RecordEvent", {LaunchStep::kZero}},        {"WaitEvent", {LaunchStep::kZero, LaunchStep::kJoin}}};
  return kSteps.at(what).count(step) != 0;
}

static void CheckResult(const CallContext& c, const LaunchResult& result) {
  Model& model = c.process->model;
  if (result.ok() != (c.failed == nullptr) || (c.failed && result.code != c.failed_code) ||
      (c.failed && !StepFits(c.failed, result.step)) || result.launch != c.failed_launch ||
      (!c.failed && result.step != LaunchStep::kNone)) {
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
  for (int& buffer : c.buffers) buffer = model.NewBuffer(spec.device, kOutputBytes);
  return c;
}

static LaunchResult Enter(CallContext& c, int stream) {
  RecordingApi api{&c};
  RecordingLaunches launches{&c};
  const Sequence sequence = {kOutputBytes, c.list().launches.size(), c.list().first_that_adds};
  const LaunchResult result = RunSequence(api, stream, sequence, AddressOf(c.buffers[kOut]), launches);
  CheckResult(c, result);
  return result;
}

// What XLA did with these buffers before, or does with them after the call: the op may rely on nothing.
static void XlaReuses(CallContext& c, int stream) {
  Work work = {Kind::kXlaWrite, -1, 0, {}};
  for (BufferName name : {kOut, kSorted, kXRows, kHidden, kRows}) {
    work.buffers.emplace_back(c.buffers[name], Access::kWrite);
  }
  c.process->model.Enqueue(stream, work);
}

static void XlaReads(CallContext& c, int stream) {
  if (c.list().launches.empty()) return;
  c.process->model.Enqueue(stream, {Kind::kXlaRead, c.call, 0, {{c.buffers[kOut], Access::kRead}}});
}

static std::vector<Kind> Kinds(const LaunchList& list) {
  std::vector<Kind> kinds;
  for (const LaunchSpec& launch : list.launches) kinds.push_back(launch.kind);
  return kinds;
}

void EagerCall(Process& process, int thread, const CallSpec& spec, int main_stream) {
  Model& model = process.model;
  CallContext c = NewCall(process, thread, spec, main_stream);
  XlaReuses(c, main_stream);
  const LaunchResult result = Enter(c, main_stream);
  model.CloseCall(c.call);
  if (result.ok()) {
    XlaReads(c, main_stream);
    std::vector<Kind> expected = Kinds(c.list());
    if (c.list().first_that_adds) expected.insert(expected.begin(), Kind::kZero);
    if (model.eager_kinds(c.call) != expected) {
      model.Violation("order", "an eager call enqueued '" + Names(model.eager_kinds(c.call)) + "' instead of '" +
                                   Names(expected) + "'");
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
  model.CheckGraph(graph, c.call, Kinds(c.list()), c.list().first_that_adds);
  process.topologies[spec.list].insert(model.Topology(graph));
  for (int i = 0; i < spec.replays; ++i) {
    Fibers::Yield();
    XlaReuses(c, main_stream);
    const int launched = model.LaunchGraph(graph, main_stream);
    if (launched != 0) model.Violation("driver-error", "LaunchGraph returned " + std::to_string(launched));
    XlaReads(c, main_stream);
  }
}

}  // namespace launch_rule
