// `Enqueue` on real threads at once, for the thread sanitizer: each thread has an API object of its own, as
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
  using Entry = int;
  bool capturing = false;
  std::string log;

  int IsCapturing(Stream, bool* active, Entry* entry) { return *active = capturing, *entry = 5, 0; }
  int Zero(Stream, void*, std::size_t) { return log += 'z', 0; }
  int AddZeroNode(Entry entry, void*, std::size_t, Node* node) { return log += entry == 5 ? 'Z' : '?', *node = 7, 0; }
  int AddDependency(Stream, Node node) { return log += node == 7 ? 'J' : '?', 0; }
  int AddEmptyNode(Stream, Entry) { return log += 'E', 0; }
};

struct PrivateLaunches {
  std::string* log;
  int Launch(int, std::size_t index) { return *log += static_cast<char>('0' + index), 0; }
};

long RunThread(int thread) {
  long wrong = 0;
  for (int i = 0; i < kCalls; ++i) {
    PrivateApi api;
    api.capturing = (i + thread) & 1;
    jax_moe::Sequence sequence;
    sequence.output_bytes = 64;
    sequence.num_launches = 3 + i % 3;
    if (i & 2) sequence.first_that_adds = i % sequence.num_launches;
    PrivateLaunches launches{&api.log};
    const jax_moe::LaunchResult result = jax_moe::Enqueue(api, thread, sequence, &api, launches);
    const bool adds = sequence.first_that_adds.has_value(), fork = adds && api.capturing;
    std::string want = adds && !fork ? "z" : "";
    for (std::size_t k = 0; k < sequence.num_launches; ++k) {
      if (fork && k == (*sequence.first_that_adds == 0 ? 0 : 1)) want += 'Z';
      if (fork && k == *sequence.first_that_adds) want += 'J';
      want += static_cast<char>('0' + k);
    }
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
