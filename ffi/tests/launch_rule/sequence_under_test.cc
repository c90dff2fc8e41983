#include "recording_api.h"

namespace launch_rule {

jax_moe::LaunchResult RunSequence(RecordingApi& api, int stream, const jax_moe::Sequence& sequence, void* output,
                                  RecordingLaunches& launches) {
  return jax_moe::Enqueue(api, stream, sequence, output, launches);
}

}  // namespace launch_rule
