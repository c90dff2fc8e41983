// `EnqueueFusedMoe` on real threads at once, for the thread sanitizer: each thread has an API object of its own, as
// each call of the handler has, so whatever two threads could race on would have to be inside the header.

#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "launch_sequence.h"

namespace {

constexpr int kCalls = 3000;

struct PrivateApi {
  using Stream = int;
  using Node = int;
  bool capturing = false;
  std::string log;

  int IsCapturing(Stream, bool* active) { return *active = capturing, 0; }
  int Zero(Stream, void*, std::size_t) { return log += 'z', 0; }
  int AddZeroNode(Stream, void*, std::size_t, Node* node) { return log += 'Z', *node = 7, 0; }
  int AddDependency(Stream, Node node) { return log += node == 7 ? 'J' : '?', 0; }
  int AddEmptyNode(Stream) { return log += 'E', 0; }
};

struct PrivateKernels {
  std::string* log;
  int Sort(int) { return *log += 's', 0; }
  int Prepare(int) { return *log += 'p', 0; }
  int Gemm1(int) { return *log += '1', 0; }
  int Gemm2(int) { return *log += '2', 0; }
  int Combine(int) { return *log += 'c', 0; }
};

long RunThread(int thread) {
  long wrong = 0;
  for (int i = 0; i < kCalls; ++i) {
    PrivateApi api;
    api.capturing = (i + thread) & 1;
    jax_moe::LaunchPlan plan;
    plan.atomic = i & 2;
    plan.prepare = i & 4;
    plan.output_bytes = 64;
    PrivateKernels kernels{&api.log};
    const jax_moe::LaunchResult result = jax_moe::EnqueueFusedMoe(api, thread, plan, &api, kernels);
    const bool fork = plan.atomic && api.capturing;
    const std::string want = std::string(fork          ? "Z"
                                         : plan.atomic ? "z"
                                                       : "") +
                             "s" + (plan.prepare ? "p" : "") + "1" + (fork ? "J" : "") + "2" + (plan.atomic ? "" : "c");
    wrong += !result.ok() || result.forked != fork || api.log != want;
  }
  return wrong;
}

}  // namespace

int main() {
  std::vector<std::thread> threads;
  std::vector<long> wrong(4);
  for (int t = 0; t < 4; ++t) threads.emplace_back([t, &wrong] { wrong[t] = RunThread(t); });
  long sum = 0;
  for (int t = 0; t < 4; ++t) {
    threads[t].join();
    sum += wrong[t];
  }
  std::printf("{\"calls\": %d, \"wrong\": %ld}\n", 4 * kCalls, sum);
  return sum != 0;
}
