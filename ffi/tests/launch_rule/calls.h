// One simulated process, and a call of the op in it as XLA makes it, eager or captured.

#ifndef JAX_MOE_FFI_TESTS_LAUNCH_RULE_CALLS_H_
#define JAX_MOE_FFI_TESTS_LAUNCH_RULE_CALLS_H_

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "driver_model.h"
#include "recording_api.h"

namespace launch_rule {

constexpr int kNever = 1 << 20;
constexpr int kDevices = 2;
constexpr int kPlans = 8;

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

struct CallSpec {
  int site = 0, device = 0;
  bool captured = false, atomic = true, prepare = false, empty = false;
  int fail_at = kNever;       // the driver call of this op call that fails
  bool keep_failing = false;  // and every later one too
  int replays = 1;

  int Plan() const { return atomic | prepare << 1 | empty << 2; }
};

// Both leave on record what was broken: in the process's model.
void EagerCall(Process& process, int thread, const CallSpec& spec, int main_stream);
void CapturedCall(Process& process, int thread, const CallSpec& spec, int main_stream);

}  // namespace launch_rule

#endif  // JAX_MOE_FFI_TESTS_LAUNCH_RULE_CALLS_H_
