#include "machine.h"

#include <algorithm>

namespace emulator {
namespace {

constexpr int kMostThreads = 2048, kMostCtas = 32;  // of a multiprocessor
constexpr int64_t kSharedOfMultiprocessor = 228 * 1024, kSharedOfSystem = 1024;

bool Ready(const Group& group) { return !group.wait.ready || group.wait.ready(); }

bool Runnable(const Warp& warp) { return std::any_of(warp.groups.begin(), warp.groups.end(), Ready); }

std::string Name(const Warp& warp) {
  return warp.cta->grid->program->name + ": CTA " + std::to_string(warp.cta->index) + ", warp " +
         std::to_string(warp.index);
}

std::string Where(const Warp& warp, const Instruction& instruction) {
  return Name(warp) + ", line " + std::to_string(instruction.line) + ": " + instruction.text;
}

}  // namespace

AsyncOperation::AsyncOperation(const Step& step) : warp(&step.warp), instruction(&step.instruction), lanes(step.mask) {
  if (step.machine.checker()) {
    view = step.warp.view;
    actor.own = step.warp.component;
    actor.own_lanes = step.warp.lanes_component;
    actor.instruction = instruction;
  }
}

uint32_t Warp::Poison(Machine& machine, int reg) {
  uint32_t& mask = poison[static_cast<size_t>(reg)];
  if (mask != 0 && !loads.empty()) {
    for (const auto& load : loads) {
      if (!load->done && load->WritesRegister(reg)) machine.Force(load.get());
    }
  }
  return mask;
}

Machine::Machine(GlobalMemory* memory, const Options& options)
    : memory_(memory), options_(options), random_(options.seed * 3 + static_cast<uint64_t>(options.order)) {
  elected_lane_ = options.seed == 0 ? 0 : static_cast<int>(random_.Below(kLanes));
  for (int i = 0; i < options.multiprocessors; ++i) {
    multiprocessors_.push_back(std::make_unique<Multiprocessor>());
    multiprocessors_.back()->index = i;
  }
}

// --- For handlers -------------------------------------------------------------------------------------------------

Outcome Machine::Block(Step& step, std::function<bool()> ready, std::function<std::string()> what, bool committed) {
  step.group.wait = {std::move(ready), committed, std::move(what)};
  return Outcome::kBlocked;
}

Outcome Machine::Block(Step& step, std::function<bool()> ready, const char* what) {
  return Block(step, std::move(ready), [what] { return std::string(what); });
}

bool Machine::Converged(Step& step, uint32_t members) {
  Warp* warp = &step.warp;
  const uint32_t here = step.group.mask;
  const auto missing = [warp, members, here] { return members & warp->live & ~here; };
  if (missing() == 0) return true;
  Block(step, [missing] { return missing() == 0; }, "the other lanes of its warp");
  return false;
}

void Machine::Issue(std::shared_ptr<AsyncOperation> operation, const Operations& before) {
  operation->warp->cta->grid->operations++;
  operation->warp->cta->operations++;
  for (const auto& other : before) {
    if (!other->done) {
      other->before.push_back(operation.get());
      operation->waits_for++;
    }
  }
  if (options_.order == Order::kRandom && random_.OneIn(8)) operation->late = true;
  if (options_.order == Order::kStarved && operation->global_only) operation->late = true;
  pending_.push_back(operation);
  if (options_.order == Order::kEager && operation->waits_for == 0) Force(operation.get());
}

void Machine::Force(AsyncOperation* operation) {
  const auto found =
      std::find_if(pending_.begin(), pending_.end(), [operation](const auto& each) { return each.get() == operation; });
  if (found == pending_.end() || operation->waits_for != 0) throw Error("an operation cannot be performed now");
  const std::shared_ptr<AsyncOperation> kept = *found;
  *found = pending_.back();
  pending_.pop_back();
  Perform(operation);
}

Cta& Machine::Peer(Cta& cta, uint64_t address) {
  const uint64_t rank = address >> 24;  // 0: the CTA itself; ReadMapa has the rest
  if (rank == 0) return cta;
  if (rank > cta.cluster->ctas.size()) throw Error("shared address " + Hex(address) + " is of no CTA of the cluster");
  Cta& peer = *cta.cluster->ctas[rank - 1];
  if (peer.live_warps == 0) throw Error("CTA " + std::to_string(peer.index) + " of the cluster has ended");
  return peer;
}

// --- Asynchronous operations --------------------------------------------------------------------------------------

void Machine::Perform(AsyncOperation* operation) {
  Cta* cta = operation->warp->cta;
  try {
    operation->Perform(*this);
  } catch (const Error& error) {
    if (error.says_where) throw;
    throw Error(Where(*operation->warp, *operation->instruction) + ": " + error.what(), true);
  }
  operation->done = true;
  for (AsyncOperation* other : operation->before) other->waits_for--;
  cta->operations--;
  if (--cta->grid->operations == 0 && cta->grid->exited == cta->grid->ctas) cta->grid->complete = true;
}

bool Machine::PerformOne(bool also_late) {
  if (pending_.empty()) return false;
  const size_t first = random_.Below(pending_.size());
  for (size_t i = 0; i < pending_.size(); ++i) {
    const size_t at = (first + i) % pending_.size();
    if (pending_[at]->waits_for != 0 || (pending_[at]->late && !also_late)) continue;
    const std::shared_ptr<AsyncOperation> operation = pending_[at];
    pending_[at] = pending_.back();
    pending_.pop_back();
    Perform(operation.get());
    return true;
  }
  return false;
}

// --- Starts and ends ----------------------------------------------------------------------------------------------

bool Machine::StartOne() {
  for (size_t i = 0; i < grids_->size(); ++i) {
    Grid& grid = (*grids_)[i];
    if (i > 0) {
      const Grid& front = (*grids_)[i - 1];
      if (!front.complete && !(grid.overlap && front.released == front.ctas)) return false;
    }
    if (grid.started == grid.start_order.size()) continue;
    std::vector<Multiprocessor*> homes;
    const size_t offset = random_.Below(multiprocessors_.size());
    const int64_t shared = grid.shared_bytes + kSharedOfSystem;
    std::vector<std::array<int64_t, 3>> taken(multiprocessors_.size(), {0, 0, 0});  // by this cluster so far
    const auto has_room = [&](size_t at) {
      const auto& [threads, bytes, ctas] = taken[at];
      const Multiprocessor& home = *multiprocessors_[at];
      const int most = grid.ctas_per_multiprocessor > 0 ? grid.ctas_per_multiprocessor : kMostCtas;
      return home.threads + threads + grid.threads <= kMostThreads && home.ctas + ctas + 1 <= most &&
             home.shared_bytes + bytes + shared <= kSharedOfMultiprocessor;
    };
    // The CTAs of a pair are on neighbours, the even one on the even one.
    const size_t group = grid.program->cta_group == 2 ? 2 : 1;
    const size_t places = multiprocessors_.size() / group;
    for (size_t rank = 0; rank < static_cast<size_t>(grid.cluster); rank += group) {
      for (size_t j = 0; j < places; ++j) {
        const size_t at = (offset + j + rank) % places * group;
        if (!has_room(at) || !has_room(at + group - 1)) continue;
        for (size_t i = at; i < at + group; ++i) {
          taken[i][0] += grid.threads, taken[i][1] += shared, taken[i][2] += 1;
          homes.push_back(multiprocessors_[i].get());
        }
        break;
      }
    }
    if (static_cast<int>(homes.size()) < grid.cluster) return false;  // grids start in order
    StartCluster(&grid, homes);
    return true;
  }
  return false;
}

void Machine::StartCluster(Grid* grid, const std::vector<Multiprocessor*>& homes) {
  const int first = grid->start_order[grid->started++] * grid->cluster;
  if (grid->number > 0) {
    const Grid& front = (*grids_)[static_cast<size_t>(grid->number) - 1];
    // Where it may start early, what it knows is what it would know then.
    grid->launched.launches = grid->overlap ? front.dependents_know : grid->number - 1;
    grid->launched.visible = grid->overlap ? front.launched.visible : grid->number - 1;
  }
  auto cluster = std::make_shared<Cluster>();
  for (int rank = 0; rank < grid->cluster; ++rank) {
    const int64_t shared_end = std::max<int64_t>(kSharedBase, grid->program->static_shared_end) + grid->shared_bytes;
    auto cta = std::make_unique<Cta>(ctas_++, shared_end);
    cta->index = first + rank;
    cta->rank = rank;
    cta->grid = grid;
    cta->cluster = cluster;
    cta->home = homes[static_cast<size_t>(rank)];
    cta->home->threads += grid->threads;
    cta->home->shared_bytes += grid->shared_bytes + kSharedOfSystem;
    cta->home->ctas++;
    cluster->ctas.push_back(cta.get());
    for (int i = 0; i < (grid->threads + kLanes - 1) / kLanes; ++i) StartWarp(cta.get(), i);
    grid->resident.push_back(std::move(cta));
  }
}

void Machine::StartWarp(Cta* cta, int index) {
  const Program& program = *cta->grid->program;
  auto warp = std::make_unique<Warp>();
  warp->cta = cta;
  warp->index = index;
  const int rest = cta->grid->threads - index * kLanes;
  if (rest < kLanes) warp->live = (1u << rest) - 1;
  warp->groups.push_back({0, warp->live, {}});
  warp->rows.resize(static_cast<size_t>(program.row_bytes) / 8);
  warp->predicates.resize(program.register_bytes.size());
  warp->poison.resize(program.register_bytes.size(), kAllLanes);
  warp->in_flight.resize(program.register_bytes.size());
  warp->poison_in_products.resize(program.register_bytes.size());
  warp->priority = random_.Bits();
  warp->view.knowledge = cta->grid->launched;
  if (checker()) {
    const int launch = cta->grid->number;
    warp->component = checker_.NewComponent(launch, false, Name(*warp));
    warp->lanes_component = checker_.NewComponent(launch, false, Name(*warp));
    auto& seen = warp->view.knowledge.seen;
    seen.resize(static_cast<size_t>(warp->lanes_component) + 1);
    seen[static_cast<size_t>(warp->component)] = seen[static_cast<size_t>(warp->lanes_component)] = 1;
  }
  cta->live_warps++;
  warps_.push_back(warp.get());
  cta->warps.push_back(std::move(warp));
}

void Machine::Exit(Warp* warp, uint32_t lanes) {
  warp->live &= ~lanes;
  if (warp->live != 0) return;
  warps_.erase(std::find(warps_.begin(), warps_.end(), warp));
  if (--warp->cta->live_warps == 0) LeaveCta(warp->cta);
}

void Machine::LeaveCta(Cta* cta) {
  Grid* grid = cta->grid;
  if (cta->home->tensor.Owns(cta->number))
    throw Error("the CTA ends with columns of tensor memory that it never freed");
  for (const auto& operation : pending_) {
    if ((operation->warp->cta == cta && !operation->global_only) || operation->peer == cta) {
      throw Error("the CTA ends, and its shared memory with it, before this is complete: line " +
                  std::to_string(operation->instruction->line) + ": " + operation->instruction->text);
    }
  }
  for (const auto& [address, barrier] : cta->mbarriers) {
    if (barrier.pending != barrier.expected || barrier.bytes != 0) {
      throw Error("the CTA ends in a phase of mbarrier " + Hex(static_cast<uint64_t>(address)) + " with " +
                  std::to_string(barrier.pending) + " of " + std::to_string(barrier.expected) + " arrivals and " +
                  std::to_string(barrier.bytes) + " bytes to come");
    }
  }
  int known = -1;
  for (const auto& warp : cta->warps) known = std::max(known, warp->view.knowledge.launches);
  if (grid->overlap && known < grid->number - 1) {  // then its end would say nothing of those in front
    throw Error("the CTA ends without having waited for the grid in front (griddepcontrol.wait)");
  }
  if (!cta->released_dependents) {
    grid->released++;
    grid->dependents_know = std::min(grid->dependents_know, known);
  }
  cta->released_dependents = true;
  cta->home->threads -= grid->threads;
  cta->home->shared_bytes -= grid->shared_bytes + kSharedOfSystem;
  cta->home->ctas--;
  for (auto& warp : cta->warps) warp->rows = {};
  cta->shared.Free();
  checker_.ForgetShared(cta->number);
  grid->exited++;
  if (grid->operations == 0 && grid->exited == grid->ctas) grid->complete = true;
}

// --- Warps --------------------------------------------------------------------------------------------------------

void Machine::Execute(Warp* warp, Group* group) {
  const Grid& grid = *warp->cta->grid;
  const Program& program = *grid.program;
  if (group->pc >= static_cast<int>(program.code.size())) throw Error(Name(*warp) + " runs past its end");
  const Instruction& instruction = program.code[static_cast<size_t>(group->pc)];
  group->wait.ready = nullptr;
  try {
    uint32_t mask = group->mask;
    if (instruction.guard >= 0) {
      if (warp->Poison(*this, instruction.guard) & mask) throw Error("the predicate of the instruction is poison");
      const uint32_t guard = warp->predicates[static_cast<size_t>(instruction.guard)];
      mask &= instruction.guard_negated ? ~guard : guard;
    }
    const auto warps = static_cast<size_t>((grid.threads + kLanes - 1) / kLanes);
    int64_t& count = warp->cta->grid->counts[static_cast<size_t>(group->pc) * warps + static_cast<size_t>(warp->index)];
    if (mask == 0) {
      group->pc++;
      ++count;  // it takes its turn all the same
      return;
    }
    Step step{*this, *warp, program, instruction, *group, mask};
    if (instruction.operation->aligned) {
      if (mask != group->mask) throw Error("lanes of one warp differ in whether they execute this");
      if (!Converged(step, kAllLanes)) return;
    }
    const Outcome outcome = instruction.operation->handler(step);  // a jump may move the groups
    if (outcome == Outcome::kBlocked) return;
    if (outcome == Outcome::kNext) group->pc++;
    ++count;
    if (outcome == Outcome::kJumped) {
      uint32_t left = 0;
      for (const Group& each : warp->groups) left |= each.mask;
      if (left != warp->live) Exit(warp, warp->live & ~left);
    }
  } catch (const Error& error) {
    if (error.says_where) throw;
    throw Error(Where(*warp, instruction) + ": " + error.what(), true);
  }
}

void Machine::RunWarp(Warp* warp, int64_t instructions) {
  for (int64_t i = 0; i < instructions && !warp->groups.empty(); ++i) {
    Group* next = nullptr;
    if (warp->groups.size() == 1) {
      if (Ready(warp->groups[0])) next = &warp->groups[0];
    } else {
      for (Group& group : warp->groups) {  // the lowest first, so that lanes meet again
        if ((next == nullptr || group.pc < next->pc) && Ready(group)) next = &group;
      }
    }
    if (next == nullptr) return;
    if (++executed_ > options_.most_instructions) throw Error("more instructions than the run may have: does it end?");
    Execute(warp, next);
    for (size_t a = 0; a + 1 < warp->groups.size(); ++a) {
      for (size_t b = a + 1; b < warp->groups.size(); ++b) {
        Group &one = warp->groups[a], &other = warp->groups[b];
        if (one.pc != other.pc || (one.wait.ready && one.wait.committed) ||
            (other.wait.ready && other.wait.committed)) {
          continue;
        }
        one.mask |= other.mask;
        one.wait = {};
        warp->groups.erase(warp->groups.begin() + static_cast<int64_t>(b--));
      }
    }
  }
}

Warp* Machine::PickWarp() {
  const bool by_priority =
      options_.order == Order::kStarved || (options_.order == Order::kRandom && options_.seed % 3 == 0);
  if (!by_priority) {
    const size_t first = options_.order == Order::kEager ? next_warp_++ : random_.Below(warps_.size() + 1);
    for (size_t i = 0; i < warps_.size(); ++i) {
      Warp* warp = warps_[(first + i) % warps_.size()];
      if (Runnable(*warp)) return warp;
    }
    return nullptr;
  }
  Warp* best = nullptr;
  for (Warp* warp : warps_) {
    if (random_.OneIn(64)) warp->priority = random_.Bits();
    if ((best == nullptr || warp->priority > best->priority) && Runnable(*warp)) best = warp;
  }
  return best;
}

void Machine::Run(std::vector<Grid>* grids) {
  grids_ = grids;
  for (Grid& grid : *grids) {
    for (int i = 0; i < grid.ctas / grid.cluster; ++i) grid.start_order.push_back(i);
    if (options_.order == Order::kRandom) {
      for (size_t i = grid.start_order.size(); i > 1; --i) {
        std::swap(grid.start_order[i - 1], grid.start_order[random_.Below(i)]);
      }
    }
    if (grid.ctas == 0) grid.complete = true;
  }
  while (!std::all_of(grids->begin(), grids->end(), [](const Grid& grid) { return grid.complete; })) {
    if ((options_.order != Order::kRandom || random_.OneIn(8)) && StartOne()) continue;
    if (options_.order == Order::kEager && PerformOne(true)) continue;
    if (options_.order == Order::kRandom && random_.OneIn(3) && PerformOne(false)) continue;
    if (Warp* warp = PickWarp()) {
      const int64_t quantum = options_.order == Order::kRandom ? int64_t{1} << random_.Below(8) : 64;
      RunWarp(warp, quantum);
      continue;
    }
    if (StartOne() || PerformOne(false) || PerformOne(true)) continue;
    Deadlock();
  }
}

void Machine::Deadlock() {
  std::string message = "deadlock: nothing can go on";
  int told = 0;
  for (const Warp* warp : warps_) {
    for (const Group& group : warp->groups) {
      if (++told > 24) continue;
      const Instruction& instruction = warp->cta->grid->program->code[static_cast<size_t>(group.pc)];
      message += "\n  " + Name(*warp) + ", lanes " + Hex(group.mask) + " wait for " + group.wait.what() + " in line " +
                 std::to_string(instruction.line) + ": " + instruction.text;
    }
  }
  if (told > 24) message += "\n  and " + std::to_string(told - 24) + " more";
  for (const Grid& grid : *grids_) {
    if (!grid.complete) {
      message += "\n  " + grid.program->name + ": " + std::to_string(grid.exited) + " of " + std::to_string(grid.ctas) +
                 " CTAs have ended";
    }
  }
  throw Error(message);
}

}  // namespace emulator
