// The launch rule: the order in which one fused_moe call puts its work on a stream, eager or captured.
//
// GEMM2 adds every expert's contribution into the output, so the output must be zero before GEMM2 starts. XLA hands
// the call uninitialised, reused buffers, and a CUDA graph replays the call without calling the handler again: the
// zeroing has to be part of what is enqueued here, on every call. docs/launch-rule.md states the rule and says why.
//
//   eager     one stream, in order:  zero, sort, [prepare], GEMM1, GEMM2            (combine = atomic)
//                                    sort, [prepare], GEMM1, GEMM2, combine         (combine = ordered: no zeroing)
//   captured  the same nodes; the zeroing becomes a branch of its own, joined before GEMM2:
//
//                 +-> zero -----------------------------+
//       entry ----+                                     +-> GEMM2
//                 +-> sort -> [prepare] -> GEMM1 -------+
//
// The branch needs no second stream and no event. While a stream is being captured, CUDA lets the caller add a node to
// the graph under construction and make the stream's next work depend on it. So there is nothing that two threads, two
// devices or two captures of one call site could share: the only state is the arguments of one call.
//
// Header-only C++17: no CUDA headers, no allocation, no exceptions, no globals. `EnqueueFusedMoe` is the whole
// interface; it is a template over two types, so that a test can record what it does (ffi/tests/launch_rule/).
//
//   struct Api {                    // every function returns 0 for success, else an error code that is passed on
//     using Stream = ...;           // CUstream
//     using Node = ...;             // CUgraphNode
//     // *capturing = whether `stream` is in an active capture. An invalidated capture is an error, not "false":
//     // taken for eager, its work would be refused one call later with a less telling code. [cuStreamIsCapturing]
//     int IsCapturing(Stream stream, bool* capturing);
//     // Enqueue a memset of `bytes` > 0 zero bytes. [cuMemsetD8Async]
//     int Zero(Stream stream, void* dst, std::size_t bytes);
//     // Only while capturing: add that memset as a node to the graph that `stream` captures into, depending on what
//     // the stream's next work would depend on, and leave the stream's own dependencies as they are.
//     // [cuStreamGetCaptureInfo, cuGraphAddMemsetNode: one row, so that XLA can update the node in place]
//     int AddZeroNode(Stream stream, void* dst, std::size_t bytes, Node* node);
//     // Only while capturing: the stream's next work depends on `node` too.
//     // [cuStreamUpdateCaptureDependencies, CU_STREAM_ADD_CAPTURE_DEPENDENCIES]
//     int AddDependency(Stream stream, Node node);
//     // Only while capturing: make an empty node the stream's newest work. [cuGraphAddEmptyNode + the call above]
//     int AddEmptyNode(Stream stream);
//   };
//   // Each enqueues its launches on `stream`, nothing anywhere else, and returns 0 for success. The rule counts on a
//   // kernel to run after the one before it. A kernel launched with programmatic dependent launch must, in every
//   // block, wait for its predecessor to finish before it reads anything that one writes, before it writes anything,
//   // and before it exits. Only after that wait may it release its own successor, for which everything earlier is
//   // then complete.
//   struct Kernels {
//     int Sort(Stream stream);      // routes -> permuted rows and tile map
//     int Prepare(Stream stream);   // the pass over x (quantise, or multiply by the routing weight)
//     int Gemm1(Stream stream);     // neither reads nor writes the output
//     int Gemm2(Stream stream);     // atomic: adds into the output; ordered: writes a workspace
//     int Combine(Stream stream);   // ordered only: writes every element of the output
//   };

#ifndef JAX_MOE_FFI_LAUNCH_SEQUENCE_H_
#define JAX_MOE_FFI_LAUNCH_SEQUENCE_H_

#include <cstddef>

namespace jax_moe {

// What the sequence depends on, besides capture: static attributes and static shapes. No address may ever be added
// here. XLA traces the call again when an address changes and updates the instantiated graph in place, which only works
// if the new trace has the same nodes, in the same order, with the same edges.
struct LaunchPlan {
  bool atomic = true;            // combine="atomic"; false is "ordered"
  bool prepare = false;          // whether a pass over x comes before GEMM1
  std::size_t output_bytes = 0;  // T*H*sizeof(out)
};

enum class LaunchStep { kNone, kIsCapturing, kEmpty, kZero, kSort, kPrepare, kGemm1, kJoin, kGemm2, kCombine };

inline const char* LaunchStepName(LaunchStep step) {
  switch (step) {
    case LaunchStep::kNone:
      return "none";
    case LaunchStep::kIsCapturing:
      return "asking whether the stream is capturing";
    case LaunchStep::kEmpty:
      return "capturing a call without tokens";
    case LaunchStep::kZero:
      return "zeroing the output";
    case LaunchStep::kSort:
      return "sorting the routes";
    case LaunchStep::kPrepare:
      return "preparing the activations";
    case LaunchStep::kGemm1:
      return "GEMM1";
    case LaunchStep::kJoin:
      return "joining the zeroing before GEMM2";
    case LaunchStep::kGemm2:
      return "GEMM2";
    case LaunchStep::kCombine:
      return "combining in slot order";
  }
  return "unknown";
}

struct LaunchResult {
  int code = 0;                         // 0, or what the failing step returned
  LaunchStep step = LaunchStep::kNone;  // the step that failed first
  int join_code = 0;                    // after such a failure: what the join that cleans up returned
  bool captured = false;                // the stream was being captured
  bool forked = false;                  // the zeroing was put on a branch of its own

  bool ok() const { return code == 0; }
};

// Enqueues one call on `stream`. Returns at the first failing step, after joining the zeroing if it had been forked.
template <class Api, class Kernels>
LaunchResult EnqueueFusedMoe(Api& api, typename Api::Stream stream, const LaunchPlan& plan, void* output,
                             Kernels& kernels) {
  LaunchResult result;
  auto run = [&result](LaunchStep step, int code) {
    if (code != 0) {
      result.code = code;
      result.step = step;
    }
    return code == 0;
  };

  if (!run(LaunchStep::kIsCapturing, api.IsCapturing(stream, &result.captured))) return result;

  // No tokens: nothing to compute, and neither a memset nor a launch may be empty. XLA refuses a trace without nodes.
  if (plan.output_bytes == 0) {
    if (result.captured) run(LaunchStep::kEmpty, api.AddEmptyNode(stream));
    return result;
  }

  // The branch starts at the entry, not beside GEMM1, so that the sort, which leaves the memory idle, hides it as well.
  typename Api::Node zeroed{};
  if (plan.atomic && result.captured) {
    if (!run(LaunchStep::kZero, api.AddZeroNode(stream, output, plan.output_bytes, &zeroed))) return result;
    result.forked = true;
  } else if (plan.atomic) {
    if (!run(LaunchStep::kZero, api.Zero(stream, output, plan.output_bytes))) return result;
  }

  const bool gemm1_enqueued = run(LaunchStep::kSort, kernels.Sort(stream)) &&
                              (!plan.prepare || run(LaunchStep::kPrepare, kernels.Prepare(stream))) &&
                              run(LaunchStep::kGemm1, kernels.Gemm1(stream));

  // Joined on success and on error alike: whatever the caller does next with this stream comes after the zeroing.
  if (result.forked) {
    const int code = api.AddDependency(stream, zeroed);
    if (gemm1_enqueued) {
      run(LaunchStep::kJoin, code);
    } else {
      result.join_code = code;
    }
  }
  if (!result.ok()) return result;

  if (!run(LaunchStep::kGemm2, kernels.Gemm2(stream))) return result;
  if (!plan.atomic) run(LaunchStep::kCombine, kernels.Combine(stream));
  return result;
}

}  // namespace jax_moe

#endif  // JAX_MOE_FFI_LAUNCH_SEQUENCE_H_
