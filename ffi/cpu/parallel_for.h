// A parallel loop over XLA's thread pool that cannot deadlock.
//
// The caller works too, and waits only for iterations that a running thread has already claimed, never for a task to
// start: the handler may itself be running on the pool, with every other thread of it in the same position. A task
// that the pool starts after the loop has ended finds nothing to claim, and touches only the counters, which it owns a
// share of.

#ifndef JAX_MOE_CPU_PARALLEL_FOR_H_
#define JAX_MOE_CPU_PARALLEL_FOR_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "cpu/float_environment.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe {

namespace internal {

template <typename Body>
struct Loop {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> finished{0};
  const int64_t count;
  const Body* const body;  // on the caller's stack; valid while finished < count

  Loop(int64_t count, const Body* body) : count(count), body(body) {}

  void Work() {
    const IeeeScope ieee;
    int64_t done = 0;
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      (*body)(i);
      ++done;
    }
    if (done != 0 && finished.fetch_add(done, std::memory_order_acq_rel) + done == count) finished.notify_one();
  }

  void Wait() {
    // The last iterations usually end within microseconds of each other, sooner than a sleeper would wake.
    constexpr int kSpins = 4096;
    for (int spin = 0; spin < kSpins; ++spin) {
      if (finished.load(std::memory_order_acquire) == count) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    for (int64_t seen = finished.load(std::memory_order_acquire); seen != count;
         seen = finished.load(std::memory_order_acquire)) {
      finished.wait(seen, std::memory_order_acquire);
    }
  }
};

}  // namespace internal

// Calls body(i) for every i in [0, count), each once, on at most `max_threads` threads, this one among them.
template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t max_threads, int64_t count, const Body& body) {
  using Loop = internal::Loop<Body>;
  if (count <= 0) return;
  const auto loop = std::make_shared<Loop>(count, &body);
  const int64_t helpers = std::min(max_threads, count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([loop] { loop->Work(); });
  loop->Work();
  loop->Wait();
}

// Columns of a unit, a multiple of 16, where threads share out so many. Many a unit read each row of the input once for
// all of them; few keep all threads busy to the end.
inline int64_t UnitColumns(int64_t columns, int64_t threads) {
  constexpr int64_t kMostColumns = 128, kUnitsPerThread = 4;
  return std::clamp<int64_t>(columns / (threads * kUnitsPerThread) / 16 * 16, 16, kMostColumns);
}

}  // namespace jax_moe

#endif  // JAX_MOE_CPU_PARALLEL_FOR_H_
