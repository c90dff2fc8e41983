// The machine: multiprocessors with resident CTAs, their warps, asynchronous operations, and who of them is next.

#ifndef JAX_MOE_EMULATOR_MACHINE_H_
#define JAX_MOE_EMULATOR_MACHINE_H_

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "checker.h"
#include "memory.h"
#include "program.h"
#include "random.h"

namespace emulator {

class Machine;
struct Warp;
struct Cta;
struct Grid;

// What lanes wait for.
struct Wait {
  std::function<bool()> ready;  // empty: for nothing
  bool committed = false;       // lanes that come later may not join
  std::function<std::string()> what;
};

// Lanes of a warp that execute together.
struct Group {
  int pc = 0;
  uint32_t mask = 0;
  Wait wait;
};

// Work that goes on beside the warp that issued it, and takes effect in Perform.
class AsyncOperation {
 public:
  explicit AsyncOperation(const Step& step);
  virtual ~AsyncOperation() = default;
  virtual void Perform(Machine& machine) = 0;
  virtual bool WritesRegister(int) const { return false; }

  Warp* warp;
  const Instruction* instruction;
  uint32_t lanes;
  bool done = false;
  bool global_only = false;  // needs nothing of its CTA, which may end before
  bool late = false;         // in this run only when nothing else can go on
  int waits_for = 0;         // operations that must be performed before
  Cta* peer = nullptr;       // another CTA of the cluster whose memory or mbarriers it uses
  std::vector<AsyncOperation*> before;
  View view;  // of the warp as it issued this
  Actor actor;
};
using Operations = std::vector<std::shared_ptr<AsyncOperation>>;

struct Warp {
  Cta* cta = nullptr;
  int index = 0;  // in the CTA
  uint32_t live = kAllLanes;
  std::vector<Group> groups;
  std::vector<uint64_t> rows;                // of registers wider than a bit
  std::vector<uint32_t> predicates, poison;  // by register, a bit for each lane

  Operations copies;                                                          // cp.async, that nobody has waited for
  uint32_t copy_count = 0;                                                    // of all
  std::map<const AsyncOperation*, std::array<uint32_t, kLanes>> copy_groups;  // of each lane
  std::array<uint32_t, kLanes> open_group{};                                  // the one that it fills
  Operations products;                                                        // wgmma, in order
  std::map<const AsyncOperation*, uint32_t> product_groups;
  uint32_t open_products = 0, product_count = 0;
  std::vector<uint16_t> in_flight;           // by register: products that nobody has waited for and that use it
  std::vector<uint32_t> poison_in_products;  // of accumulators in flight, whose `poison` has all lanes
  Operations loads, stores;                  // tcgen05.ld and .st
  Operations remote;                         // arrivals at mbarriers of other CTAs
  uint32_t load_count = 0, store_count = 0, tensor_count = 0;
  std::array<Operations, kLanes> tensor;  // tcgen05.mma and .cp of each thread

  uint64_t barrier_generation = 0;  // of the barrier that it is at, plus one
  uint64_t cluster_generation = 0;  // likewise
  int together = 0;                 // which of the operations that a pair of CTAs performs together it is at; 0: none
  View view;
  int component = -1, copy_component = -1, product_component = -1, tensor_component = -1, load_component = -1,
      store_component = -1, reduction_component = -1;
  int lanes_component = -1;  // of instructions that some lanes execute and others do not
  Knowledge synchronised;    // what it knew when its lanes last waited for each other

  uint64_t priority = 0;
  uint8_t* row(const Program& program, int reg) {
    return reinterpret_cast<uint8_t*>(rows.data()) + program.register_offset[static_cast<size_t>(reg)];
  }
  // Which lanes' value of a register is poison; a load that is in flight to it is performed first.
  uint32_t Poison(Machine& machine, int reg);
};

struct Mbarrier {
  int64_t expected = 0, pending = 0, bytes = 0;
  std::map<std::pair<int, int>, int64_t> arrived, first;  // in this phase, in the first: by CTA, warp
  uint64_t phase = 0;
  int component = -1;  // of the bulk copies that it counts
  uint32_t copies = 0;
  Knowledge arriving, complete;                // of its CTA's threads
  Knowledge arriving_others, complete_others;  // of other CTAs, for who waits at the scope of the cluster
};

struct NamedBarrier {
  int arrived = 0, threads = 0;  // 0 threads: nobody is here
  uint64_t generation = 0;
  Knowledge arriving, complete;
};

// CTAs that start together; one of them where there are no clusters.
struct Cluster {
  std::vector<Cta*> ctas;
  int arrived = 0;  // warps
  uint64_t generation = 0;
  Knowledge arriving, complete;
};

struct Multiprocessor {
  int index = 0;
  TensorMemory tensor;
  int threads = 0, ctas = 0;
  int64_t shared_bytes = 0;
};

struct Cta {
  Cta(int number, int64_t shared_end) : number(number), shared(number, shared_end) {}

  int number;  // in the run
  int index = 0;
  int rank = 0;  // in its cluster
  Grid* grid = nullptr;
  std::shared_ptr<Cluster> cluster;
  Multiprocessor* home = nullptr;
  SharedMemory shared;
  std::vector<std::unique_ptr<Warp>> warps;
  std::map<int64_t, Mbarrier> mbarriers;
  std::array<NamedBarrier, 16> barriers;
  int live_warps = 0;
  bool released_dependents = false, may_allocate = true;
  int operations = 0;  // asynchronous ones that use its shared or tensor memory
  // What it performs together with the other CTA of its pair (pairs.cc).
  std::array<int, 3> together{};  // how often its warps have come to each kind of operation
  int wanted_columns = 0, granted_column = -1;
};

struct Grid {
  const Program* program = nullptr;
  int number = 0;
  int ctas = 0, threads = 0, cluster = 1;
  int64_t shared_bytes = 0;
  bool overlap = false;
  int ctas_per_multiprocessor = 0;  // 0: as many as fit
  std::vector<uint8_t> parameters;
  std::vector<int> start_order;  // of clusters
  size_t started = 0;
  int released = 0, exited = 0;  // CTAs
  int operations = 0;            // asynchronous ones
  bool complete = false;
  int dependents_know = 1 << 30;  // up to which grid all CTAs had waited when they released the next
  std::vector<int64_t> counts;    // executed, by instruction and warp
  Knowledge launched;             // of its CTAs as they start
  std::vector<std::unique_ptr<Cta>> resident;
};

enum class Order { kEager, kRandom, kStarved };

struct Options {
  uint64_t seed = 0;
  Order order = Order::kRandom;
  int multiprocessors = 2;
  int64_t most_instructions = 0;
  bool check = false, check_lanes = false;
  bool check_written = false;  // to read a global byte that nobody has written is an error, whatever comes of it
};

struct Step {
  Machine& machine;
  Warp& warp;
  const Program& program;
  const Instruction& instruction;
  Group& group;
  uint32_t mask;  // lanes whose guard is true
};

class Machine {
 public:
  Machine(GlobalMemory* memory, const Options& options);
  void Run(std::vector<Grid>* grids);

  // --- For handlers ---
  // Waits until `ready`; `what` is for the report of a deadlock.
  static Outcome Block(Step& step, std::function<bool()> ready, std::function<std::string()> what,
                       bool committed = false);
  static Outcome Block(Step& step, std::function<bool()> ready, const char* what);
  // Whether all live lanes of `members` are here; if not, `step` waits for them.
  static bool Converged(Step& step, uint32_t members);
  // Takes an operation over; it may be performed from now on, but not before those in `before`.
  void Issue(std::shared_ptr<AsyncOperation> operation, const Operations& before = {});
  // Performs an operation, and all that it must come after, now.
  void Force(AsyncOperation* operation);
  Cta& Peer(Cta& cta, uint64_t address);  // whose shared memory an address in the cluster's window is in

  Random& random() { return random_; }
  GlobalMemory& memory() { return *memory_; }
  Checker* checker() { return options_.check ? &checker_ : nullptr; }
  const Options& options() const { return options_; }
  int elected_lane() const { return elected_lane_; }
  const std::vector<Grid>& grids() const { return *grids_; }

 private:
  bool StartOne();
  void StartCluster(Grid* grid, const std::vector<Multiprocessor*>& homes);
  void StartWarp(Cta* cta, int index);
  Warp* PickWarp();
  bool PerformOne(bool also_late);
  void Perform(AsyncOperation* operation);
  void RunWarp(Warp* warp, int64_t instructions);
  void Execute(Warp* warp, Group* group);
  void Exit(Warp* warp, uint32_t lanes);
  void LeaveCta(Cta* cta);
  [[noreturn]] void Deadlock();

  GlobalMemory* memory_;
  Options options_;
  Random random_;
  Checker checker_;
  int elected_lane_;
  std::vector<Grid>* grids_ = nullptr;
  std::vector<std::unique_ptr<Multiprocessor>> multiprocessors_;
  std::vector<Warp*> warps_;  // that have not exited
  std::vector<std::shared_ptr<AsyncOperation>> pending_;
  size_t next_warp_ = 0;
  int ctas_ = 0;
  int64_t executed_ = 0;
};

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_MACHINE_H_
