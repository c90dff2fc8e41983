// A model of the part of the CUDA driver that the launch rule rests on, and the checker that watches it.
//
// Streams, events, stream capture and graph replay behave as the driver's documentation says and, where it is silent,
// as an H200 with driver 580 was seen to (the error codes below). Nothing runs: each piece of work becomes an operation
// in one happens-before graph, and two operations that touch a buffer without being ordered in it are a race, whatever
// the order in which a schedule happened to issue them.

#ifndef JAX_MOE_FFI_TESTS_LAUNCH_RULE_DRIVER_MODEL_H_
#define JAX_MOE_FFI_TESTS_LAUNCH_RULE_DRIVER_MODEL_H_

#include <bitset>
#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace launch_rule {

enum Code {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidHandle = 400,
  kIllegalState = 401,
  kCaptureInvalidated = 901,
  kCaptureMerge = 902,
  kCaptureUnjoined = 904,
  kCaptureIsolation = 905,
};

enum class Kind { kZero, kSort, kXRows, kGemm1, kGemm2, kCombine, kFinish, kEmpty, kXlaWrite, kXlaRead };
const char* Name(Kind kind);
std::string Names(const std::vector<Kind>& kinds);

// kAccumulate: adds to what its own call has zeroed; kAddMore: to what its own call has added to before.
enum class Access { kRead, kWrite, kAccumulate, kAddMore };

constexpr int kMaxOps = 768;
using OpSet = std::bitset<kMaxOps>;

struct Work {
  Kind kind;
  int call;  // which call of the op this belongs to
  std::size_t bytes;
  std::vector<std::pair<int, Access>> buffers;
};

struct GraphNode {
  Work work;
  int device;
  bool by_hand;  // added to the graph directly, not through a stream
  std::vector<int> deps;
  OpSet ancestors;
};

struct Capture {
  int origin;
  bool invalidated = false;
  bool ended = false;
  std::vector<int> streams;
  std::vector<GraphNode> nodes;
  OpSet last_launch;  // one executable graph never overlaps itself
};

struct Call {
  int thread, site, device;
  int stream;    // the stream that XLA handed to the call
  bool capture;  // whether XLA captures it
  bool open = true;
};

// How often each rule was broken, and the first instance of each in words.
struct Violations {
  std::map<std::string, std::pair<long, std::string>> by_rule;
  void Add(const std::string& rule, const std::string& text);
};

class Model {
 public:
  explicit Model(Violations* violations) : violations_(violations) {}

  int NewStream(int device);
  int NewEvent(int device);
  int NewBuffer(int device, std::size_t bytes);
  int OpenCall(int thread, int site, int device, int stream, bool capture);
  void CloseCall(int call) { calls_[call].open = false; }
  const Call& call(int id) const { return calls_[id]; }

  // The driver. `call` is the call on whose behalf it is used, -1 for XLA itself; the current device is the call's.
  int IsCapturing(int call, int stream, bool* capturing, int* entry);
  int Enqueue(int stream, const Work& work);  // a kernel or a memset
  int RecordEvent(int call, int event, int stream);
  int WaitEvent(int call, int stream, int event);
  int AddNode(int entry, const Work& work, int* node);
  int AddDependency(int stream, int node);
  int BeginCapture(int stream);
  int EndCapture(int stream, int* graph);
  int LaunchGraph(int graph, int stream);

  // The rules that can be read off a capture: one branch for the zeroing, or none.
  void CheckJoined(int stream, int call);
  void CheckGraph(int graph, int call, const std::vector<Kind>& launches, std::optional<std::size_t> first_that_adds);
  std::string Topology(int graph) const;
  const std::vector<Kind>& eager_kinds(int call) { return eager_kinds_[call]; }
  void Violation(const std::string& rule, const std::string& text) { violations_->Add(rule, text); }
  std::string Who(int call) const;

 private:
  struct Stream {
    int device;
    int capture = -1;
    OpSet eager;            // what the stream's next eager work comes after, ancestors included
    std::vector<int> deps;  // the graph nodes that its next captured work depends on
    int user = -1;
  };
  struct Entry {  // where a stream's next captured work would have gone
    int capture, device;
    std::vector<int> deps;
  };
  struct Event {
    int device;
    bool recorded = false;
    int capture = -1;
    OpSet eager;
    std::vector<int> deps;
    int user = -1;
  };
  struct Touch {
    int op;
    Access access;
  };
  struct Buffer {
    int device;
    std::size_t bytes;
    std::vector<Touch> touches;
  };
  struct Op {
    Work work;
    OpSet ancestors;
  };

  int Execute(const Work& work, int device, const OpSet& after);
  int AddToGraph(Capture& capture, const Work& work, int device, const std::vector<int>& deps, bool by_hand);
  void UseStream(int call, int stream);
  void UseEvent(int call, int event);
  void CheckAccess(int op, int buffer, Access access, int device);
  OpSet Closure(const Capture& capture, const std::vector<int>& deps) const;

  Violations* violations_;
  std::vector<Stream> streams_;
  std::vector<Entry> entries_;
  std::vector<Event> events_;
  std::vector<Buffer> buffers_;
  std::vector<Capture> captures_;
  std::vector<Call> calls_;
  std::vector<Op> ops_;
  std::map<int, std::vector<Kind>> eager_kinds_;
};

}  // namespace launch_rule

#endif  // JAX_MOE_FFI_TESTS_LAUNCH_RULE_DRIVER_MODEL_H_
