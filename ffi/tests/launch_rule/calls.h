// One simulated process, and a call of the op in it as XLA makes it, eager or captured.

#ifndef JAX_MOE_FFI_TESTS_LAUNCH_RULE_CALLS_H_
#define JAX_MOE_FFI_TESTS_LAUNCH_RULE_CALLS_H_

#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "driver_model.h"
#include "recording_api.h"

namespace launch_rule {

constexpr int kNever = 1 << 20;
constexpr int kDevices = 2;

// The buffers of one call.
enum BufferName { kX, kRouting, kOut, kSorted, kXRows, kHidden, kRows, kNumBuffers };

// What a call launches, in order, and what each launch does to which buffer.
struct LaunchSpec {
  Kind kind;
  std::vector<std::pair<BufferName, Access>> buffers;
};

struct LaunchList {
  const char* name;
  std::vector<LaunchSpec> launches;
  std::optional<std::size_t> first_that_adds;
};

enum ListName {
  kAtomic,
  kAtomicXRows,
  kOrdered,
  kOrderedXRows,
  kEmptyList,
  kAddsAtOnce,
  kAddsFirst,
  kAddsTwice,
  kOne,
  kProduct,
  kFewRoutes,
  kNumLists,
};

extern const std::array<LaunchList, kNumLists> kLists;

struct Process {
  explicit Process(Violations* violations) : model(violations) {
    for (int device = 0; device < kDevices; ++device) main_stream.push_back(model.NewStream(device));
  }

  Model model;
  std::vector<int> main_stream;  // XLA's compute stream of each device, where threads share it
  std::unique_ptr<RecordingApi::Side> module_side;
  std::map<int, RecordingApi::Side> site_sides;
  std::map<std::pair<int, int>, RecordingApi::Side> site_device_sides;
  std::array<std::set<std::string>, kNumLists> topologies;
  long errors = 0;  // calls that met an injected error
};

struct CallSpec {
  int site = 0, device = 0;
  int list = kAtomic;
  bool captured = false;
  int fail_at = kNever;       // the driver call of this op call that fails
  bool keep_failing = false;  // and every later one too
  int replays = 1;
};

// Both leave on record what was broken: in the process's model.
void EagerCall(Process& process, int thread, const CallSpec& spec, int main_stream);
void CapturedCall(Process& process, int thread, const CallSpec& spec, int main_stream);

}  // namespace launch_rule

#endif  // JAX_MOE_FFI_TESTS_LAUNCH_RULE_CALLS_H_
