// Simulated threads: real stacks, switched only where `Yield` is called, in an order that the caller decides. That
// makes every interleaving of two threads a list of choices that can be walked through, and any failure repeatable.

#ifndef JAX_MOE_FFI_TESTS_LAUNCH_RULE_FIBERS_H_
#define JAX_MOE_FFI_TESTS_LAUNCH_RULE_FIBERS_H_

#include <ucontext.h>

#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

namespace launch_rule {

// Where to switch threads: first along a given list of choices, then always to the first thread that can run. The
// choices that were open are noted, so that the caller can walk through all schedules or draw them at random.
struct Schedule {
  std::vector<int> choices;
  std::vector<int> open;
  std::mt19937* random = nullptr;
};

class Fibers {
 public:
  explicit Fibers(Schedule* schedule) : schedule_(schedule) {}

  void Add(std::function<void()> body) { bodies_.push_back(std::move(body)); }

  void Run() {
    // Stacks outlive the schedule: hundreds of thousands of schedules use the same few.
    static std::vector<std::unique_ptr<char[]>> stacks;
    current_ = this;
    const int n = static_cast<int>(bodies_.size());
    contexts_.resize(n);
    done_.assign(n, false);
    while (static_cast<int>(stacks.size()) < n) stacks.emplace_back(new char[kStackBytes]);
    for (int i = 0; i < n; ++i) {
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks[i].get();
      contexts_[i].uc_stack.ss_size = kStackBytes;
      contexts_[i].uc_link = &scheduler_;
      makecontext(&contexts_[i], &Fibers::Entry, 0);
      Resume(i);  // up to its first driver call, before which nothing is shared
    }
    for (std::size_t step = 0;; ++step) {
      std::vector<int> runnable;
      for (int i = 0; i < n; ++i) {
        if (!done_[i]) runnable.push_back(i);
      }
      if (runnable.empty()) break;
      const int open = static_cast<int>(runnable.size());
      int choice = 0;
      if (schedule_->random) {
        choice = static_cast<int>((*schedule_->random)() % open);
      } else if (step < schedule_->choices.size()) {
        choice = schedule_->choices[step];
      } else {
        schedule_->choices.push_back(0);
      }
      if (!schedule_->random) schedule_->open.push_back(open);
      Resume(runnable[choice]);
    }
    current_ = nullptr;
  }

  // Called by a simulated thread in front of each driver call.
  static void Yield() {
    if (current_) swapcontext(&current_->contexts_[current_->running_], &current_->scheduler_);
  }

 private:
  static constexpr std::size_t kStackBytes = 128 * 1024;
  static inline Fibers* current_ = nullptr;

  static void Entry() {
    Fibers* self = current_;
    const int me = self->running_;
    self->bodies_[me]();
    self->done_[me] = true;
  }
  void Resume(int i) {
    running_ = i;
    swapcontext(&scheduler_, &contexts_[i]);
  }

  Schedule* schedule_;
  std::vector<std::function<void()>> bodies_;
  std::vector<ucontext_t> contexts_;
  std::vector<bool> done_;
  ucontext_t scheduler_;
  int running_ = -1;
};

}  // namespace launch_rule

#endif  // JAX_MOE_FFI_TESTS_LAUNCH_RULE_FIBERS_H_
