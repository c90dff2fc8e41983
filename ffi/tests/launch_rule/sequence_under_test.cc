#include "recording_api.h"

namespace launch_rule {

jax_moe::LaunchResult RunSequence(RecordingApi& api, int stream, const jax_moe::LaunchPlan& plan, void* output,
                                  RecordingKernels& kernels) {
  return jax_moe::EnqueueFusedMoe(api, stream, plan, output, kernels);
}

}  // namespace launch_rule
