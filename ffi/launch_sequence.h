// The launch rule: the order in which one call puts its work on a stream, eager or captured.
//
// A call is a list of kernel launches, and some of them may add into the output (fused_moe's GEMM2 adds every expert's
// contribution): the output must be zero before the first of those starts. XLA hands the call uninitialised, reused
// buffers, and a CUDA graph replays the call without calling the handler again: the zeroing has to be part of what is
// enqueued here, on every call. docs/launch-rule.md states the rule and says why.
//
//   eager     one stream, in order:  zero, launch 0, launch 1, ... launch n-1       (no zeroing where none adds)
//   captured  the same nodes; the zeroing becomes a branch of its own, joined before launch f, the first that adds:
//
//                 +-> zero -----------------------------+
//       entry ----+                                     +-> launch f -> ... -> launch n-1
//                 +-> launch 0 -> ... -> launch f-1 ----+
//
// The branch needs no second stream and no event. While a stream is being captured, CUDA lets the caller add a node to
// the graph under construction and make the stream's next work depend on it. So there is nothing that two threads, two
// devices or two captures of one call site could share: the only state is the arguments of one call.
//
// Header-only C++17: no CUDA headers, no allocation, no exceptions, no globals. `Enqueue` is the whole interface;
// it is a template over two types, so that a test can record what it does (ffi/tests/launch_rule/).
//
//   struct Api {                    // every function returns 0 for success, else an error code that is passed on
//     using Stream = ...;           // CUstream
//     using Node = ...;             // CUgraphNode
//     using Entry = ...;            // what the next work of a stream depends on, in the graph that it captures into
//     // *capturing = whether `stream` is in an active capture, and where: *entry. An invalidated capture is an error,
//     // not "false": taken for eager, its work would be refused one call later with a less telling code.
//     // [cuStreamGetCaptureInfo]
//     int IsCapturing(Stream stream, bool* capturing, Entry* entry);
//     // Enqueue a memset of `bytes` > 0 zero bytes. [cuMemsetD8Async]
//     int Zero(Stream stream, void* dst, std::size_t bytes);
//     // Add that memset to the graph as a node behind `entry`; the stream's own dependencies stay as they are.
//     // [cuGraphAddMemsetNode: one row, so that XLA can update the node in place; or cuGraphAddKernelNode]
//     int AddZeroNode(const Entry& entry, void* dst, std::size_t bytes, Node* node);
//     // Only while capturing: the stream's next work depends on `node` too.
//     // [cuStreamUpdateCaptureDependencies, CU_STREAM_ADD_CAPTURE_DEPENDENCIES]
//     int AddDependency(Stream stream, Node node);
//     // Make an empty node behind `entry` the stream's newest work. [cuGraphAddEmptyNode + the call above]
//     int AddEmptyNode(Stream stream, const Entry& entry);
//   };
//   struct Launches {
//     // Enqueue kernel launch `index` of the call on `stream`, nothing anywhere else. Those before the first that adds
//     // neither read nor write the output. The rule counts on a kernel to run after the one before it. A kernel
//     // launched with programmatic dependent launch must, in every CTA, wait for its predecessor to finish before it
//     // reads anything that one writes, before it writes anything, and before it exits. Only after that wait may it
//     // release its own successor, for which everything earlier is then complete.
//     int Launch(Stream stream, std::size_t index);
//   };

#ifndef JAX_MOE_FFI_LAUNCH_SEQUENCE_H_
#define JAX_MOE_FFI_LAUNCH_SEQUENCE_H_

#include <cstddef>
#include <optional>

namespace jax_moe {

// What the sequence depends on, besides capture: static attributes and static shapes. No address may ever be added
// here. XLA traces the call again when an address changes and updates the instantiated graph in place, which only works
// if the new trace has the same nodes, in the same order, with the same edges.
struct Sequence {
  std::size_t output_bytes = 0;                // at least 1 where a launch adds
  std::size_t num_launches = 0;                // 0: a call that has nothing to do
  std::optional<std::size_t> first_that_adds;  // < num_launches; none: nothing needs to be zero
};

enum class LaunchStep { kNone, kIsCapturing, kEmpty, kZero, kLaunch, kJoin };

inline const char* LaunchStepName(LaunchStep step) {
  switch (step) {
    case LaunchStep::kNone:
      return "none";
    case LaunchStep::kIsCapturing:
      return "asking whether the stream is capturing";
    case LaunchStep::kEmpty:
      return "capturing a call without launches";
    case LaunchStep::kZero:
      return "zeroing the output";
    case LaunchStep::kLaunch:
      return "launching";
    case LaunchStep::kJoin:
      return "joining the zeroing";
  }
  return "unknown";
}

struct LaunchResult {
  int code = 0;                         // 0, or what the failing step returned
  LaunchStep step = LaunchStep::kNone;  // the step that failed first
  std::size_t launch = 0;               // which launch, if that is kLaunch
  int join_code = 0;                    // after such a failure: what the join that cleans up returned
  bool captured = false;                // the stream was being captured
  bool forked = false;                  // the zeroing was put on a branch of its own

  bool ok() const { return code == 0; }
};

// Enqueues one call on `stream`. Returns at the first failing step, after joining the zeroing if it had been forked.
template <class Api, class Launches>
LaunchResult Enqueue(Api& api, typename Api::Stream stream, const Sequence& sequence, void* output,
                     Launches& launches) {
  LaunchResult result;
  auto run = [&result](LaunchStep step, int code, std::size_t launch = 0) {
    if (code != 0) {
      result.code = code;
      result.step = step;
      result.launch = launch;
    }
    return code == 0;
  };
  auto launch = [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      if (!run(LaunchStep::kLaunch, launches.Launch(stream, i), i)) return false;
    }
    return true;
  };

  typename Api::Entry entry{};
  if (!run(LaunchStep::kIsCapturing, api.IsCapturing(stream, &result.captured, &entry))) return result;

  // XLA refuses a trace without nodes.
  if (sequence.num_launches == 0) {
    if (result.captured) run(LaunchStep::kEmpty, api.AddEmptyNode(stream, entry));
    return result;
  }

  const bool zeroes = sequence.first_that_adds.has_value();
  if (zeroes && !result.captured) {
    if (!run(LaunchStep::kZero, api.Zero(stream, output, sequence.output_bytes))) return result;
  }

  // The branch starts at the entry: every launch before the join hides it, also a sort that leaves the memory idle. Its
  // node is added behind the first launch all the same: of nodes that may start together, CUDA starts the older one
  // first.
  const std::size_t first = sequence.first_that_adds.value_or(sequence.num_launches);
  const std::size_t second = first == 0 ? 0 : 1;
  if (!launch(0, second)) return result;
  typename Api::Node zeroed{};
  if (zeroes && result.captured) {
    if (!run(LaunchStep::kZero, api.AddZeroNode(entry, output, sequence.output_bytes, &zeroed))) return result;
    result.forked = true;
  }
  const bool reached = launch(second, first);

  // Joined on success and on error alike: whatever the caller does next with this stream comes after the zeroing.
  if (result.forked) {
    const int code = api.AddDependency(stream, zeroed);
    if (reached) {
      run(LaunchStep::kJoin, code);
    } else {
      result.join_code = code;
    }
  }
  if (!result.ok()) return result;

  launch(first, sequence.num_launches);
  return result;
}

}  // namespace jax_moe

#endif  // JAX_MOE_FFI_LAUNCH_SEQUENCE_H_
