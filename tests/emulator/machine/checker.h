// The happens-before checker: of two accesses to the same memory, one of them a write, one must be ordered after the
// other by what PTX promises, not by the order in which this run had them.
//
// Every source of accesses is a component with a count: a warp's own instructions, its cp.async copies, its tcgen05
// loads, its products, the bulk copies that an mbarrier counts. Who knows of another component's count up to n is
// ordered after its accesses up to n. Knowledge is handed on by barriers, mbarriers, waits for asynchronous work and
// the ends of grids, and by nothing else. It is kept three times, because two fences decide what an edge is worth:
//
//   seen      ordered for instructions that access memory themselves (the generic proxy)
//   fenced    a fence.proxy.async came after: ordered for bulk copies and products (the async proxy) too
//   released  for accesses to tensor memory: a tcgen05.fence::before_thread_sync (or a commit) came after; others as
//   seen
//
// and a fourth time of a warp alone: `tensor`, what tcgen05 instructions may count on since the last
// tcgen05.fence::after_thread_sync.

#ifndef JAX_MOE_EMULATOR_CHECKER_H_
#define JAX_MOE_EMULATOR_CHECKER_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "memory.h"
#include "program.h"

namespace emulator {

using Counts = std::vector<uint32_t>;  // by component; what is not there is 0

struct Knowledge {
  Counts seen, fenced, released;
  int launches = -1;  // this grid and all before it are complete
  int visible = -1;   // what they wrote is visible: a griddepcontrol.wait, or an ordinary start, came after their end
};

// What a warp knows.
struct View {
  Knowledge knowledge;
  Counts acquired;  // of others' `released`, since the last tcgen05.fence::after_thread_sync
  Counts tensor;
};

enum class Access : uint8_t {
  kGeneric,        // by the instruction itself, or by a cp.async
  kAtomic,         // one of a kind that is never in conflict with its like
  kRelaxed,        // a relaxed load at GPU scope: also of what a grid wrote that is complete but was not waited for
  kAsync,          // by a bulk copy or a wgmma
  kTensorProduct,  // by a tcgen05.mma
  kTensorCopy,     // by a tcgen05.cp
  kTensorRow,      // by a tcgen05.ld or .st
  kTensorFree,     // by a tcgen05.alloc or .dealloc, which are no asynchronous operations
};

// Who accesses.
struct Actor {
  int component = -1;
  uint32_t count = 0;
  Access access = Access::kGeneric;
  int own = -1, own_lanes = -1;  // the components of the warp's own instructions
  const Instruction* instruction = nullptr;
};

class Checker {
 public:
  // A component of grid number `launch`. `tensor`: of tcgen05 operations. `who`: for messages.
  int NewComponent(int launch, bool tensor, std::string who);

  // --- What is handed on ---
  void Release(const View& from, Knowledge* into) const;
  void Acquire(const Knowledge& from, View* into) const;
  // Accesses of a component up to a count are complete, as a thread or an mbarrier learns.
  static void Complete(int component, uint32_t count, Knowledge* into);
  // All that tcgen05 operations of a thread that knows `from` come after.
  static void CompletePipeline(const View& from, Knowledge* into);
  static void CompleteForSelf(int component, uint32_t count, View* into);
  static void ProxyFence(View* view);
  static void TensorFenceBefore(View* view);
  static void TensorFenceAfter(View* view);

  // --- Accesses ---
  // Throws if another access to some of the bytes is not ordered before this one.
  void Touch(const Place& place, int64_t bytes, bool writes, const Actor& actor, const View& view);
  void TouchTensor(int multiprocessor, int lane, int column, bool writes, const Actor& actor, const View& view);
  // A CTA's shared memory, or columns of tensor memory, are gone.
  void ForgetShared(int cta);
  void ForgetTensor(int multiprocessor, int column, int columns);

 private:
  struct Component {
    int launch;
    bool tensor;
    std::string who;
  };
  struct Record {
    int component;
    uint32_t count;
    const Instruction* instruction;
    Access access;
    bool writes;
    uint8_t bytes;  // of the cell, a bit each
  };
  using Cell = std::vector<Record>;

  // Whether what a record says happened before the actor's access; if not, `why` may say what is missing.
  bool Ordered(const Record& record, bool tensor_memory, const Actor& actor, const View& view, std::string* why) const;
  void TouchCell(Cell* cell, uint8_t bytes, bool writes, bool tensor_memory, const Actor& actor, const View& view,
                 const std::string& (*where)(const void*), const void* context);

  std::vector<Component> components_;
  std::map<std::pair<int, int>, std::vector<Cell>> cells_;  // by space and owner; four bytes a cell
};

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_CHECKER_H_
