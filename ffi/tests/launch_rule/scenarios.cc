// Runs `EnqueueFusedMoe` on the driver model: every path alone, then under every interleaving of two threads, then
// under random interleavings of up to four. Prints what it ran and which rules were broken, as JSON.
//
//   scenarios driver             the driver model itself against what an H200 answered
//   scenarios paths              each plan, eager and captured, with an error at every step
//   scenarios exhaustive         every schedule of two calls on two threads, switching at every driver call
//   scenarios random SEED COUNT  seeded schedules of two to four threads with several calls each
//   scenarios traces             one call site traced again and again at new addresses; prints the topologies
//
// The flag --no-errors leaves the injected errors out.

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "driver_model.h"
#include "recording_api.h"

namespace launch_rule {

using jax_moe::LaunchPlan;
using jax_moe::LaunchResult;
using jax_moe::LaunchStep;

constexpr int kInjected = 700;  // an injected error's code, plus the number of the driver call that returned it
constexpr int kNever = 1 << 20;
constexpr int kDevices = 2;
constexpr int kPlans = 8;
constexpr std::size_t kOutputBytes = 4096;

// --- One simulated process: the model, its threads and the schedule ---------------------------------------------

// Where to switch threads: first along a given list of choices, then always to the first thread that can run. The
// choices that were open are noted, so that the caller can walk through all schedules or draw them at random.
struct Schedule {
  std::vector<int> choices;
  std::vector<int> open;
  std::mt19937* random = nullptr;
};

struct Process {
  explicit Process(Violations* violations) : model(violations) {
    for (int device = 0; device < kDevices; ++device) main_stream.push_back(model.NewStream(device));
  }

  Model model;
  std::vector<int> main_stream;  // XLA's compute stream of each device, where threads share it
  std::unique_ptr<RecordingApi::Side> module_side;
  std::map<int, RecordingApi::Side> site_sides;
  std::map<std::pair<int, int>, RecordingApi::Side> site_device_sides;
  std::set<std::string> topologies[kPlans];
  long errors = 0;  // calls that met an injected error
};

class Fibers {
 public:
  explicit Fibers(Schedule* schedule) : schedule_(schedule) {}

  void Add(std::function<void()> body) { bodies_.push_back(std::move(body)); }

  void Run() {
    // Stacks outlive the schedule: hundreds of thousands of schedules use the same few.
    static std::vector<std::unique_ptr<char[]>> stacks;
    current_ = this;
    const int n = static_cast<int>(bodies_.size());
    contexts_.resize(n);
    done_.assign(n, false);
    while (static_cast<int>(stacks.size()) < n) stacks.emplace_back(new char[kStackBytes]);
    for (int i = 0; i < n; ++i) {
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks[i].get();
      contexts_[i].uc_stack.ss_size = kStackBytes;
      contexts_[i].uc_link = &scheduler_;
      makecontext(&contexts_[i], &Fibers::Entry, 0);
      Resume(i);  // up to its first driver call, before which nothing is shared
    }
    for (std::size_t step = 0;; ++step) {
      std::vector<int> runnable;
      for (int i = 0; i < n; ++i) {
        if (!done_[i]) runnable.push_back(i);
      }
      if (runnable.empty()) break;
      const int open = static_cast<int>(runnable.size());
      int choice = 0;
      if (schedule_->random) {
        choice = static_cast<int>((*schedule_->random)() % open);
      } else if (step < schedule_->choices.size()) {
        choice = schedule_->choices[step];
      } else {
        schedule_->choices.push_back(0);
      }
      if (!schedule_->random) schedule_->open.push_back(open);
      Resume(runnable[choice]);
    }
    current_ = nullptr;
  }

  // Called by a simulated thread in front of each driver call.
  static void Yield() {
    if (current_) swapcontext(&current_->contexts_[current_->running_], &current_->scheduler_);
  }

 private:
  static constexpr std::size_t kStackBytes = 128 * 1024;
  static Fibers* current_;

  static void Entry() {
    Fibers* self = current_;
    const int me = self->running_;
    self->bodies_[me]();
    self->done_[me] = true;
  }
  void Resume(int i) {
    running_ = i;
    swapcontext(&scheduler_, &contexts_[i]);
  }

  Schedule* schedule_;
  std::vector<std::function<void()>> bodies_;
  std::vector<ucontext_t> contexts_;
  std::vector<bool> done_;
  ucontext_t scheduler_;
  int running_ = -1;
};

Fibers* Fibers::current_ = nullptr;

// --- One call, as XLA makes it ----------------------------------------------------------------------------------

struct CallSpec {
  int site = 0, device = 0;
  bool captured = false, atomic = true, prepare = false, empty = false;
  int fail_at = kNever;       // the driver call of this op call that fails
  bool keep_failing = false;  // and every later one too
  int replays = 1;

  int Plan() const { return atomic | prepare << 1 | empty << 2; }
};

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

static void EagerCall(Process& process, int thread, const CallSpec& spec, int main_stream) {
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
static void CapturedCall(Process& process, int thread, const CallSpec& spec, int main_stream) {
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

struct ThreadSpec {
  std::vector<CallSpec> calls;
};

struct Totals {
  long schedules = 0, calls = 0, captured = 0, errors = 0;
  std::set<std::string> topologies[kPlans];
  Violations violations;
};

// One schedule: a new process in which every thread makes its calls.
static void RunThreads(const std::vector<ThreadSpec>& threads, bool shared_streams, Schedule* schedule,
                       Totals* totals) {
  Process process(&totals->violations);
  Fibers fibers(schedule);
  for (std::size_t t = 0; t < threads.size(); ++t) {
    fibers.Add([&process, &threads, shared_streams, t] {
      int own[kDevices];
      for (int d = 0; d < kDevices; ++d) own[d] = shared_streams ? process.main_stream[d] : process.model.NewStream(d);
      for (const CallSpec& spec : threads[t].calls) {
        (spec.captured ? CapturedCall : EagerCall)(process, static_cast<int>(t), spec, own[spec.device]);
      }
    });
  }
  fibers.Run();
  ++totals->schedules;
  for (const ThreadSpec& thread : threads) {
    for (const CallSpec& spec : thread.calls) {
      ++totals->calls;
      totals->captured += spec.captured;
    }
  }
  totals->errors += process.errors;
  for (int plan = 0; plan < kPlans; ++plan) {
    totals->topologies[plan].insert(process.topologies[plan].begin(), process.topologies[plan].end());
  }
}

// --- The scenarios -----------------------------------------------------------------------------------------------

// The model has to err where the driver errs. These are the sequences that were run on an H200 (driver 580.159, CUDA
// 13.0, captures begun with cuStreamBeginCaptureToGraph), with the codes that it returned.
static void Driver(Totals* totals) {
  Model m(&totals->violations);
  const auto expect = [&](const char* what, int got, int want) {
    if (got != want) {
      m.Violation("driver", std::string(what) + " returned " + std::to_string(got) + ", not " + std::to_string(want));
    }
  };
  const int s = m.NewStream(0), s2 = m.NewStream(0), aux = m.NewStream(0), aux2 = m.NewStream(0);
  const int e0 = m.NewEvent(0), e1 = m.NewEvent(0), e2 = m.NewEvent(0);
  const int call = m.OpenCall(0, 0, 0, s, true);
  const Work zero = {Kind::kZero, call, 1, {}}, kernel = {Kind::kSort, call, 0, {}};
  int graph, node;

  m.BeginCapture(s);
  expect("AddNode", m.AddNode(s, zero, &node), kSuccess);
  m.Enqueue(s, kernel);
  expect("EndCapture with a node that nothing joins", m.EndCapture(s, &graph), kSuccess);
  expect("AddDependency outside a capture", m.AddDependency(s, node), kIllegalState);

  m.BeginCapture(s);
  m.RecordEvent(call, e0, s);
  m.WaitEvent(call, aux, e0);
  m.Enqueue(aux, zero);
  m.Enqueue(s, kernel);
  expect("EndCapture with a stream that nothing joins", m.EndCapture(s, &graph), kCaptureUnjoined);

  m.BeginCapture(s);
  m.BeginCapture(s2);
  m.RecordEvent(call, e0, s);
  expect("waiting on a captured event", m.WaitEvent(call, aux, e0), kSuccess);
  m.Enqueue(aux, zero);
  m.RecordEvent(call, e1, aux);
  m.WaitEvent(call, s, e1);
  m.Enqueue(s, kernel);
  m.RecordEvent(call, e2, s2);
  expect("a second capture's wait on the same stream", m.WaitEvent(call, aux, e2), kCaptureMerge);
  expect("EndCapture of the first", m.EndCapture(s, &graph), kCaptureInvalidated);
  expect("EndCapture of the second", m.EndCapture(s2, &graph), kCaptureInvalidated);

  m.BeginCapture(s);
  m.BeginCapture(s2);
  m.RecordEvent(call, e0, s);
  m.RecordEvent(call, e0, s2);
  expect("waiting on an event that another capture recorded again", m.WaitEvent(call, aux, e0), kSuccess);
  expect("zeroing in the other capture", m.Enqueue(aux, zero), kSuccess);
  m.RecordEvent(call, e1, aux);
  expect("joining it", m.WaitEvent(call, s, e1), kCaptureMerge);
  expect("a kernel after that", m.Enqueue(s, kernel), kCaptureInvalidated);
  expect("EndCapture of the first", m.EndCapture(s, &graph), kCaptureInvalidated);
  expect("EndCapture of the second", m.EndCapture(s2, &graph), kCaptureInvalidated);

  m.BeginCapture(s);
  m.Enqueue(s, kernel);
  m.RecordEvent(call, e2, s);
  expect("a stream entering the capture", m.WaitEvent(call, aux2, e2), kSuccess);
  expect("EndCapture with a stream that entered and did nothing", m.EndCapture(s, &graph), kSuccess);

  m.RecordEvent(call, e2, s2);
  m.BeginCapture(s);
  m.Enqueue(s, kernel);
  expect("a captured wait on an eager event", m.WaitEvent(call, s, e2), kCaptureIsolation);
  expect("EndCapture after it", m.EndCapture(s, &graph), kCaptureInvalidated);

  m.BeginCapture(s);
  m.Enqueue(s, kernel);
  m.RecordEvent(call, e2, s);
  m.EndCapture(s, &graph);
  expect("waiting on an event of a capture that ended", m.WaitEvent(call, s2, e2), kInvalidValue);
  ++totals->schedules;
}

// No call of the op makes more driver calls than this; failing at a later one is failing nowhere.
constexpr int kDriverCalls = 12;

static void Paths(bool errors, Totals* totals) {
  for (int plan = 0; plan < kPlans; ++plan) {
    for (bool captured : {false, true}) {
      for (int fail_at = 0; fail_at <= kDriverCalls; ++fail_at) {
        for (bool keep_failing : {false, true}) {
          CallSpec spec;
          spec.captured = captured;
          spec.atomic = plan & 1;
          spec.prepare = plan & 2;
          spec.empty = plan & 4;
          if (errors) spec.fail_at = fail_at;
          spec.keep_failing = keep_failing;
          spec.replays = 3;
          Schedule schedule;
          // Twice on one thread, and a good call after each: an error must not poison what comes next.
          CallSpec good = spec;
          good.fail_at = kNever;
          RunThreads({{{spec, good, spec, good}}}, true, &schedule, totals);
        }
      }
    }
  }
}

// Returns false, having run one schedule, if `a` should have failed at a driver call that it does not make.
static bool EverySchedule(const CallSpec& a, const CallSpec& b, bool shared_streams, Totals* totals) {
  Schedule schedule;
  const long errors = totals->errors;
  while (true) {
    schedule.open.clear();
    RunThreads({{{a}}, {{b}}}, shared_streams, &schedule, totals);
    if (a.fail_at != kNever && totals->errors == errors) return false;
    // The next schedule in lexicographic order: advance the last choice that can still be advanced.
    schedule.choices.resize(schedule.open.size());
    while (!schedule.choices.empty() && schedule.choices.back() + 1 >= schedule.open[schedule.choices.size() - 1]) {
      schedule.choices.pop_back();
    }
    if (schedule.choices.empty()) return true;
    ++schedule.choices.back();
  }
}

static void Exhaustive(bool errors, Totals* totals) {
  // Where the second call is placed in relation to the first.
  struct Placement {
    int site, device;
    bool shared_streams;
  };
  const std::vector<Placement> all = {{0, 0, false}, {0, 0, true}, {0, 1, false}, {1, 0, false}, {1, 1, false}};
  for (const Placement& place : all) {
    for (int modes = 0; modes < 4; ++modes) {
      CallSpec a, b;
      a.captured = modes & 1;
      b.captured = modes & 2;
      b.site = place.site;
      b.device = place.device;
      EverySchedule(a, b, place.shared_streams, totals);
      if (!errors) continue;
      CallSpec bad = a;
      for (bad.fail_at = 0; EverySchedule(bad, b, place.shared_streams, totals);) ++bad.fail_at;
    }
  }
}

static void Random(unsigned seed, long count, bool errors, Totals* totals) {
  std::mt19937 random(seed);
  const auto below = [&random](unsigned n) { return static_cast<int>(random() % n); };
  for (long i = 0; i < count; ++i) {
    std::vector<ThreadSpec> threads(2 + below(3));
    for (ThreadSpec& thread : threads) {
      const int calls = 1 + below(3);
      for (int k = 0; k < calls; ++k) {
        CallSpec spec;
        spec.site = below(3);
        spec.device = below(kDevices);
        spec.captured = below(2);
        spec.atomic = below(4) != 0;
        spec.prepare = below(2);
        spec.empty = below(16) == 0;
        if (errors && below(3) == 0) spec.fail_at = below(9);
        spec.keep_failing = below(4) == 0;
        spec.replays = 1 + below(2);
        thread.calls.push_back(spec);
      }
    }
    Schedule schedule;
    schedule.random = &random;
    RunThreads(threads, below(2), &schedule, totals);
  }
}

static void Traces(Totals* totals) {
  for (int plan = 0; plan < kPlans; ++plan) {
    ThreadSpec thread;
    for (int i = 0; i < 20; ++i) {
      CallSpec spec;
      spec.captured = true;
      spec.atomic = plan & 1;
      spec.prepare = plan & 2;
      spec.empty = plan & 4;
      thread.calls.push_back(spec);
    }
    Schedule schedule;
    RunThreads({thread}, true, &schedule, totals);
  }
}

static std::string Quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) out += (c == '"' || c == '\\') ? std::string("\\") + c : std::string(1, c);
  return out + "\"";
}

static void Print(Totals& totals) {
  for (int plan = 0; plan < kPlans; ++plan) {
    if (totals.topologies[plan].size() > 1) {
      totals.violations.Add("topology", "one plan was captured as '" + *totals.topologies[plan].begin() + "' and as '" +
                                            *totals.topologies[plan].rbegin() + "'");
    }
  }
  std::printf("{\"schedules\": %ld, \"calls\": %ld, \"captured\": %ld, \"errors\": %ld,\n \"topologies\": {",
              totals.schedules, totals.calls, totals.captured, totals.errors);
  const char* comma = "";
  for (int plan = 0; plan < kPlans; ++plan) {
    if (totals.topologies[plan].empty()) continue;
    std::printf("%s\"%s%s%s\": %s", comma, plan & 1 ? "atomic" : "ordered", plan & 2 ? "+prepare" : "",
                plan & 4 ? "+empty" : "", Quoted(*totals.topologies[plan].begin()).c_str());
    comma = ", ";
  }
  std::printf("},\n \"violations\": {");
  comma = "";
  for (const auto& [rule, entry] : totals.violations.by_rule) {
    std::printf("%s%s: [%ld, %s]", comma, Quoted(rule).c_str(), entry.first, Quoted(entry.second).c_str());
    comma = ",\n  ";
  }
  std::printf("}}\n");
}

}  // namespace launch_rule

int main(int argc, char** argv) {
  using namespace launch_rule;
  bool errors = true;
  std::vector<std::string> args;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--no-errors") == 0) {
      errors = false;
    } else {
      args.push_back(argv[i]);
    }
  }
  Totals totals;
  const std::string what = args.empty() ? "" : args[0];
  if (what == "driver") {
    Driver(&totals);
  } else if (what == "paths") {
    Paths(errors, &totals);
  } else if (what == "exhaustive") {
    Exhaustive(errors, &totals);
  } else if (what == "random" && args.size() == 3) {
    Random(static_cast<unsigned>(std::atol(args[1].c_str())), std::atol(args[2].c_str()), errors, &totals);
  } else if (what == "traces") {
    Traces(&totals);
  } else {
    std::fprintf(stderr, "usage: scenarios driver|paths|exhaustive|random SEED COUNT|traces [--no-errors]\n");
    return 2;
  }
  Print(totals);
  return 0;
}
