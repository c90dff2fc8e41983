#include "driver_model.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace launch_rule {

const char* Name(Kind kind) {
  static const char* const kNames[] = {"zero",    "sort",   "x_rows", "gemm1",     "gemm2",
                                       "combine", "finish", "empty",  "xla-write", "xla-read"};
  return kNames[static_cast<int>(kind)];
}

std::string Names(const std::vector<Kind>& kinds) {
  std::string names;
  for (Kind kind : kinds) names += std::string(names.empty() ? "" : " ") + Name(kind);
  return names;
}

void Violations::Add(const std::string& rule, const std::string& text) {
  auto& entry = by_rule[rule];
  if (entry.first++ == 0) entry.second = text;
}

int Model::NewStream(int device) {
  Stream stream;
  stream.device = device;
  streams_.push_back(stream);
  return static_cast<int>(streams_.size()) - 1;
}

int Model::NewEvent(int device) {
  Event event;
  event.device = device;
  events_.push_back(event);
  return static_cast<int>(events_.size()) - 1;
}

int Model::NewBuffer(int device, std::size_t bytes) {
  buffers_.push_back({device, bytes, {}});
  return static_cast<int>(buffers_.size()) - 1;
}

int Model::OpenCall(int thread, int site, int device, int stream, bool capture) {
  calls_.push_back({thread, site, device, stream, capture});
  return static_cast<int>(calls_.size()) - 1;
}

std::string Model::Who(int call) const {
  if (call < 0) return "XLA";
  const Call& c = calls_[call];
  return "call " + std::to_string(call) + " (thread " + std::to_string(c.thread) + ", site " + std::to_string(c.site) +
         ", device " + std::to_string(c.device) + (c.capture ? ", captured)" : ", eager)");
}

// Rule 2, and the half of rule 5 that can be seen before anything goes wrong: a stream in use by two calls at once.
void Model::UseStream(int call, int stream) {
  if (call < 0) return;
  const Call& c = calls_[call];
  if (stream == c.stream) return;
  if (!c.capture) Violation("one-stream", Who(call) + " uses stream " + std::to_string(stream) + " beside its own");
  int& user = streams_[stream].user;
  if (user >= 0 && user != call && calls_[user].open) {
    Violation("shared", "stream " + std::to_string(stream) + " is used by " + Who(call) + " and by " + Who(user));
  }
  user = call;
}

void Model::UseEvent(int call, int event) {
  if (call < 0) return;
  if (!calls_[call].capture) Violation("one-stream", Who(call) + " uses an event");
  int& user = events_[event].user;
  if (user >= 0 && user != call && calls_[user].open) {
    Violation("shared", "event " + std::to_string(event) + " is used by " + Who(call) + " and by " + Who(user));
  }
  user = call;
}

void Model::CheckAccess(int op, int buffer, Access access, int device) {
  Buffer& b = buffers_[buffer];
  const Work& work = ops_[op].work;
  const OpSet& ancestors = ops_[op].ancestors;
  if (b.device != device) {
    Violation("device", std::string(Name(work.kind)) + " of " + Who(work.call) + " runs on device " +
                            std::to_string(device) + " and touches memory of device " + std::to_string(b.device));
  }
  int writer = -1;
  for (const Touch& touch : b.touches) {
    const bool ordered = ancestors[touch.op];
    const bool conflict = touch.access != Access::kRead || access != Access::kRead;
    if (conflict && !ordered) {
      const Work& other = ops_[touch.op].work;
      Violation("race", std::string(Name(work.kind)) + " of " + Who(work.call) + " is not ordered after " +
                            Name(other.kind) + " of " + Who(other.call));
    }
    // Operations are issued in an order that extends happens-before, so the last ancestor that wrote is the newest.
    if (ordered && touch.access != Access::kRead) writer = touch.op;
  }
  if (access == Access::kAccumulate || access == Access::kAddMore) {
    const bool own = writer >= 0 && ops_[writer].work.call == work.call;
    const bool zeroed = own && ops_[writer].work.kind == Kind::kZero && ops_[writer].work.bytes == b.bytes;
    const bool added_to = own && ops_[writer].work.kind == Kind::kGemm2;
    if (access == Access::kAccumulate ? !zeroed : !added_to) {
      Violation("zeroed", std::string(Name(work.kind)) + " of " + Who(work.call) + " adds to an output that " +
                              (writer < 0 ? "nothing wrote"
                                          : std::string(Name(ops_[writer].work.kind)) + " of " +
                                                Who(ops_[writer].work.call) + " wrote last"));
    }
  }
  if (work.kind == Kind::kXlaRead) {
    const bool computed = writer >= 0 && ops_[writer].work.call == work.call && ops_[writer].work.kind != Kind::kZero;
    if (!computed) {
      Violation("zeroed", "the output of " + Who(work.call) + " was last written by " +
                              (writer < 0 ? std::string("nothing") : Name(ops_[writer].work.kind)));
    }
  }
  b.touches.push_back({op, access});
}

int Model::Execute(const Work& work, int device, const OpSet& after) {
  const int op = static_cast<int>(ops_.size());
  if (op >= kMaxOps) {
    std::fprintf(stderr, "a schedule issued more than %d operations\n", kMaxOps);
    std::abort();
  }
  ops_.push_back({work, after});
  for (const auto& [buffer, access] : work.buffers) CheckAccess(op, buffer, access, device);
  return op;
}

int Model::IsCapturing(int call, int stream, bool* capturing, int* entry) {
  UseStream(call, stream);
  const Stream& s = streams_[stream];
  const int capture = s.capture;
  entries_.push_back({capture, s.device, s.deps});
  *entry = static_cast<int>(entries_.size()) - 1;
  *capturing = capture >= 0 && !captures_[capture].invalidated;
  return capture >= 0 && captures_[capture].invalidated ? kCaptureInvalidated : kSuccess;
}

OpSet Model::Closure(const Capture& capture, const std::vector<int>& deps) const {
  OpSet closure;
  for (int dep : deps) {
    closure |= capture.nodes[dep].ancestors;
    closure.set(dep);
  }
  return closure;
}

int Model::AddToGraph(Capture& capture, const Work& work, int device, const std::vector<int>& deps, bool by_hand) {
  capture.nodes.push_back({work, device, by_hand, deps, Closure(capture, deps)});
  return static_cast<int>(capture.nodes.size()) - 1;
}

int Model::Enqueue(int stream, const Work& work) {
  Stream& s = streams_[stream];
  const bool by_call = work.kind != Kind::kXlaRead && work.kind != Kind::kXlaWrite;
  if (by_call) {
    UseStream(work.call, stream);
    // A kernel belongs to a context; a memset takes the stream's.
    if (work.kind != Kind::kZero && s.device != calls_[work.call].device) return kInvalidHandle;
  }
  if (s.capture >= 0) {
    Capture& capture = captures_[s.capture];
    if (capture.invalidated) return kCaptureInvalidated;
    s.deps = {AddToGraph(capture, work, s.device, s.deps, false)};
    return kSuccess;
  }
  if (by_call) {
    if (calls_[work.call].capture) Violation("captured", std::string(Name(work.kind)) + " escaped the capture");
    eager_kinds_[work.call].push_back(work.kind);
  }
  s.eager.set(Execute(work, s.device, s.eager));
  return kSuccess;
}

int Model::RecordEvent(int call, int event, int stream) {
  UseStream(call, stream);
  UseEvent(call, event);
  Event& e = events_[event];
  const Stream& s = streams_[stream];
  if (e.device != s.device) return kInvalidHandle;
  if (s.capture >= 0 && captures_[s.capture].invalidated) return kCaptureInvalidated;
  e.recorded = true;
  e.capture = s.capture;
  e.deps = s.deps;
  e.eager = s.eager;
  return kSuccess;
}

int Model::WaitEvent(int call, int stream, int event) {
  UseStream(call, stream);
  UseEvent(call, event);
  const Event& e = events_[event];
  Stream& s = streams_[stream];
  if (!e.recorded) return kSuccess;
  if (e.capture < 0) {
    if (s.capture >= 0) {  // captured work cannot wait for work outside the capture
      captures_[s.capture].invalidated = true;
      return kCaptureIsolation;
    }
    s.eager |= e.eager;
    return kSuccess;
  }
  Capture& capture = captures_[e.capture];
  if (capture.ended) return kInvalidValue;
  if (s.capture >= 0 && s.capture != e.capture) {  // two captures cannot become one
    captures_[s.capture].invalidated = capture.invalidated = true;
    return kCaptureMerge;
  }
  if (capture.invalidated) return kCaptureInvalidated;
  if (s.capture < 0) {  // this is how a second stream enters a capture
    s.capture = e.capture;
    s.deps.clear();
    capture.streams.push_back(stream);
  }
  for (int dep : e.deps) {
    if (std::find(s.deps.begin(), s.deps.end(), dep) == s.deps.end()) s.deps.push_back(dep);
  }
  return kSuccess;
}

int Model::AddNode(int entry, const Work& work, int* node) {
  const Entry& e = entries_[entry];
  if (e.capture < 0 || captures_[e.capture].ended) return kInvalidValue;
  *node = AddToGraph(captures_[e.capture], work, e.device, e.deps, true);
  return kSuccess;
}

int Model::AddDependency(int stream, int node) {
  Stream& s = streams_[stream];
  if (s.capture < 0) return kIllegalState;
  const Capture& capture = captures_[s.capture];
  if (capture.invalidated) return kCaptureInvalidated;
  if (node < 0 || node >= static_cast<int>(capture.nodes.size())) return kInvalidValue;
  if (std::find(s.deps.begin(), s.deps.end(), node) == s.deps.end()) s.deps.push_back(node);
  return kSuccess;
}

int Model::BeginCapture(int stream) {
  Stream& s = streams_[stream];
  if (s.capture >= 0) return kIllegalState;
  Capture capture;
  capture.origin = stream;
  capture.streams = {stream};
  s.capture = static_cast<int>(captures_.size());
  s.deps.clear();
  captures_.push_back(capture);
  return kSuccess;
}

int Model::EndCapture(int stream, int* graph) {
  const int id = streams_[stream].capture;
  if (id < 0) return kIllegalState;
  Capture& capture = captures_[id];
  if (capture.origin != stream) return kIllegalState;
  const OpSet joined = Closure(capture, streams_[stream].deps);
  int code = capture.invalidated ? kCaptureInvalidated : kSuccess;
  for (int member : capture.streams) {
    Stream& s = streams_[member];
    // A branch whose last node was added by hand is not looked at; one that came through a stream has to be joined.
    for (int dep : s.deps) {
      if (code == kSuccess && !joined[dep] && !capture.nodes[dep].by_hand) code = kCaptureUnjoined;
    }
    s.capture = -1;
    s.deps.clear();
  }
  capture.ended = true;
  *graph = id;
  return code;
}

int Model::LaunchGraph(int graph, int stream) {
  Capture& capture = captures_[graph];
  Stream& s = streams_[stream];
  const OpSet before = s.eager | capture.last_launch;
  OpSet all = before;
  std::vector<int> op_of(capture.nodes.size());
  for (std::size_t i = 0; i < capture.nodes.size(); ++i) {
    const GraphNode& node = capture.nodes[i];
    OpSet after = before;
    for (int dep : node.deps) {
      after |= ops_[op_of[dep]].ancestors;
      after.set(op_of[dep]);
    }
    op_of[i] = Execute(node.work, node.device, after);
    all.set(op_of[i]);
  }
  s.eager = capture.last_launch = all;
  return kSuccess;
}

void Model::CheckJoined(int stream, int call) {
  const Stream& s = streams_[stream];
  if (s.capture < 0) return;
  const Capture& capture = captures_[s.capture];
  const OpSet joined = Closure(capture, s.deps);
  for (std::size_t i = 0; i < capture.nodes.size(); ++i) {
    const Work& work = capture.nodes[i].work;
    if (work.call == call && work.kind == Kind::kZero && !joined[i]) {
      Violation("joined", Who(call) + " returned while its zeroing was not joined");
    }
  }
}

void Model::CheckGraph(int graph, int call, const std::vector<Kind>& launches,
                       std::optional<std::size_t> first_that_adds) {
  const Capture& capture = captures_[graph];
  std::vector<Kind> kinds;
  std::vector<int> nodes;  // of the launches
  int zero = -1, zeroes = 0, mine = 0;
  for (std::size_t i = 0; i < capture.nodes.size(); ++i) {
    const Work& work = capture.nodes[i].work;
    if (work.call != call) continue;
    ++mine;
    if (work.kind == Kind::kZero) {
      zero = static_cast<int>(i), ++zeroes;
    } else {
      kinds.push_back(work.kind), nodes.push_back(static_cast<int>(i));
    }
  }
  if (launches.empty()) {
    if (mine != 1 || zeroes != 0) Violation("empty", Who(call) + " launches nothing and should capture one empty node");
    return;
  }
  if (kinds != launches) {
    Violation("order", Who(call) + " captured '" + Names(kinds) + "' instead of '" + Names(launches) + "'");
    return;
  }
  const auto before = [&](int a, int b) { return bool(capture.nodes[b].ancestors[a]); };
  for (std::size_t i = 1; i < nodes.size(); ++i) {
    if (!before(nodes[i - 1], nodes[i])) {
      Violation("joined", std::string(Name(kinds[i])) + " of " + Who(call) + " does not wait for the launch before it");
    }
  }
  if (!first_that_adds) {
    if (zeroes != 0) Violation("ordered-free", Who(call) + " adds nothing and zeroes its output");
    return;
  }
  if (zeroes != 1) {
    Violation("zeroed", Who(call) + " captured " + std::to_string(zeroes) + " zeroings");
    return;
  }
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (i >= *first_that_adds) {
      if (!before(zero, nodes[i])) {
        Violation("joined", std::string(Name(kinds[i])) + " of " + Who(call) + " does not wait for the zeroing");
      }
    } else if (before(zero, nodes[i]) || before(nodes[i], zero)) {
      Violation("overlap", "the zeroing of " + Who(call) + " is ordered with " + Name(kinds[i]));
    }
  }
}

std::string Model::Topology(int graph) const {
  std::string text;
  const Capture& capture = captures_[graph];
  for (std::size_t i = 0; i < capture.nodes.size(); ++i) {
    std::vector<int> deps = capture.nodes[i].deps;
    std::sort(deps.begin(), deps.end());
    text += (i ? " " : "") + std::string(Name(capture.nodes[i].work.kind)) + "(";
    for (std::size_t k = 0; k < deps.size(); ++k) text += (k ? "," : "") + std::to_string(deps[k]);
    text += ")";
  }
  return text;
}

}  // namespace launch_rule
