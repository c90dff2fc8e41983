// What `Enqueue` is instantiated with in these tests: every call becomes an operation of the driver model, can
// be told to fail, and is a point at which the scheduler may switch to another thread.

#ifndef JAX_MOE_FFI_TESTS_LAUNCH_RULE_RECORDING_API_H_
#define JAX_MOE_FFI_TESTS_LAUNCH_RULE_RECORDING_API_H_

#include <cstddef>

#include "launch_sequence.h"

namespace launch_rule {

struct CallContext;  // calls.cc

struct RecordingApi {
  using Stream = int;
  using Node = int;
  using Entry = int;
  CallContext* context;

  int IsCapturing(Stream stream, bool* capturing, Entry* entry);
  int Zero(Stream stream, void* dst, std::size_t bytes);
  int AddZeroNode(const Entry& entry, void* dst, std::size_t bytes, Node* node);
  int AddDependency(Stream stream, Node node);
  int AddEmptyNode(Stream stream, const Entry& entry);

  // Not for the header, which has no use for them: what its mutants fork with. A `Side` stands for static variables of
  // one scope or another; they live in the simulated process, so that every schedule starts with a new one.
  using Event = int;
  struct Side {
    Stream aux;
    Event fork, zeroed;
  };
  Side& ModuleSide();        // one for the whole process, made on the device that asks first
  Side& SiteSide();          // one for each call site
  Side& SiteOnDeviceSide();  // one for each call site and device
  Side& OwnSide();           // this call's own
  int RecordEvent(Event event, Stream stream);
  int WaitEvent(Stream stream, Event event);
};

struct RecordingLaunches {
  CallContext* context;

  int Launch(int stream, std::size_t index);
};

// Defined in sequence_under_test.cc, the one file that a mutant recompiles.
jax_moe::LaunchResult RunSequence(RecordingApi& api, int stream, const jax_moe::Sequence& sequence, void* output,
                                  RecordingLaunches& launches);

}  // namespace launch_rule

#endif  // JAX_MOE_FFI_TESTS_LAUNCH_RULE_RECORDING_API_H_
