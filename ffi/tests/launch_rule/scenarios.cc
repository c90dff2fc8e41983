// Runs `Enqueue` on the driver model: every path alone, then under every interleaving of two threads, then
// under random interleavings of up to four. Prints what it ran and which rules were broken, as JSON.
//
//   scenarios driver             the driver model itself against what an H200 answered
//   scenarios paths              each list of launches, eager and captured, with an error at every step
//   scenarios exhaustive         every schedule of two calls on two threads, switching at every driver call
//   scenarios random SEED COUNT  seeded schedules of two to four threads with several calls each
//   scenarios traces             one call site traced again and again at new addresses; prints the topologies
//
// The flag --no-errors leaves the injected errors out.

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "calls.h"
#include "driver_model.h"
#include "fibers.h"

namespace launch_rule {

struct ThreadSpec {
  std::vector<CallSpec> calls;
};

struct Totals {
  long schedules = 0, calls = 0, captured = 0, errors = 0;
  std::array<std::set<std::string>, kNumLists> topologies;
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
  for (int list = 0; list < kNumLists; ++list) {
    totals->topologies[list].insert(process.topologies[list].begin(), process.topologies[list].end());
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
  int graph, node, entry;
  bool capturing;

  m.BeginCapture(s);
  expect("IsCapturing", m.IsCapturing(call, s, &capturing, &entry), kSuccess);
  expect("AddNode", m.AddNode(entry, zero, &node), kSuccess);
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
  for (int list = 0; list < kNumLists; ++list) {
    for (bool captured : {false, true}) {
      for (int fail_at = 0; fail_at <= kDriverCalls; ++fail_at) {
        for (bool keep_failing : {false, true}) {
          CallSpec spec;
          spec.list = list;
          spec.captured = captured;
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
  const std::vector<std::pair<ListName, ListName>> lists = {
      {kAtomic, kAtomic}, {kAddsAtOnce, kAddsAtOnce}, {kAddsAtOnce, kAtomic}};
  for (const auto& [list, other_list] : lists) {
    for (const Placement& place : all) {
      for (int modes = 0; modes < 4; ++modes) {
        CallSpec a, b;
        a.list = list;
        b.list = other_list;
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
}

static void Random(unsigned seed, long count, bool errors, Totals* totals) {
  constexpr ListName kOften[] = {kAtomic,       kAtomic,    kAtomic,     kAtomicXRows, kAtomicXRows, kAtomicXRows,
                                 kAddsTwice,    kAddsTwice, kAddsTwice,  kAddsFirst,   kAddsFirst,   kOrdered,
                                 kOrderedXRows, kOne,       kAddsAtOnce, kEmptyList,   kProduct};
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
        spec.list = kOften[below(std::size(kOften))];
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
  for (int list = 0; list < kNumLists; ++list) {
    ThreadSpec thread;
    for (int i = 0; i < 20; ++i) {
      CallSpec spec;
      spec.captured = true;
      spec.list = list;
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
  for (const std::set<std::string>& topologies : totals.topologies) {
    if (topologies.size() > 1) {
      totals.violations.Add(
          "topology", "one list was captured as '" + *topologies.begin() + "' and as '" + *topologies.rbegin() + "'");
    }
  }
  std::printf("{\"schedules\": %ld, \"calls\": %ld, \"captured\": %ld, \"errors\": %ld,\n \"topologies\": {",
              totals.schedules, totals.calls, totals.captured, totals.errors);
  const char* comma = "";
  for (int list = 0; list < kNumLists; ++list) {
    if (totals.topologies[list].empty()) continue;
    std::printf("%s\"%s\": %s", comma, kLists[list].name, Quoted(*totals.topologies[list].begin()).c_str());
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
