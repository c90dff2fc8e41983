#include "checker.h"

#include <algorithm>

namespace emulator {
namespace {

uint32_t At(const Counts& counts, int component) {
  const auto at = static_cast<size_t>(component);
  return at < counts.size() ? counts[at] : 0;
}

void Raise(Counts* counts, int component, uint32_t count) {
  const auto at = static_cast<size_t>(component);
  if (counts->size() <= at) counts->resize(at + 1);
  (*counts)[at] = std::max((*counts)[at], count);
}

void Join(Counts* into, const Counts& from) {
  if (into->size() < from.size()) into->resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) (*into)[i] = std::max((*into)[i], from[i]);
}

bool IsCoherent(Access access) { return access == Access::kAtomic || access == Access::kRelaxed; }
bool IsGeneric(Access access) { return access == Access::kGeneric || IsCoherent(access); }

}  // namespace

int Checker::NewComponent(int launch, bool tensor, std::string who) {
  components_.push_back({launch, tensor, std::move(who)});
  return static_cast<int>(components_.size()) - 1;
}

void Checker::Release(const View& from, Knowledge* into) const {
  const Knowledge& knowledge = from.knowledge;
  Join(&into->seen, knowledge.seen);
  Join(&into->fenced, knowledge.fenced);
  Join(&into->released, knowledge.released);
  for (size_t i = 0; i < knowledge.seen.size(); ++i) {
    if (!components_[i].tensor) Raise(&into->released, static_cast<int>(i), knowledge.seen[i]);
  }
  into->launches = std::max(into->launches, knowledge.launches);
  into->visible = std::max(into->visible, knowledge.visible);
}

void Checker::Acquire(const Knowledge& from, View* into) const {
  Join(&into->knowledge.seen, from.seen);
  Join(&into->knowledge.fenced, from.fenced);
  Join(&into->acquired, from.released);
  into->knowledge.launches = std::max(into->knowledge.launches, from.launches);
  into->knowledge.visible = std::max(into->knowledge.visible, from.visible);
}

void Checker::Complete(int component, uint32_t count, Knowledge* into) {
  Raise(&into->seen, component, count);
  Raise(&into->released, component, count);
}

void Checker::CompletePipeline(const View& from, Knowledge* into) {
  Join(&into->seen, from.tensor);
  Join(&into->released, from.tensor);
}

void Checker::CompleteForSelf(int component, uint32_t count, View* into) {
  Raise(&into->knowledge.seen, component, count);
  Raise(&into->tensor, component, count);
}

void Checker::ProxyFence(View* view) { Join(&view->knowledge.fenced, view->knowledge.seen); }
void Checker::TensorFenceBefore(View* view) { Join(&view->knowledge.released, view->knowledge.seen); }
void Checker::TensorFenceAfter(View* view) { Join(&view->tensor, view->acquired); }

bool Checker::Ordered(const Record& record, bool tensor_memory, const Actor& actor, const View& view,
                      std::string* why) const {
  const Component& component = components_[static_cast<size_t>(record.component)];
  if (component.launch <= view.knowledge.launches) {
    if (!record.writes || component.launch <= view.knowledge.visible || IsCoherent(actor.access)) return true;
    *why =
        "; that grid is complete, but its end was not waited for: what it wrote needs a load past L1 "
        "(ld.relaxed.gpu) or griddepcontrol.wait";
    return false;
  }
  if (record.access == Access::kAtomic && actor.access == Access::kAtomic) return true;
  const bool is_own = record.component == actor.own || record.component == actor.own_lanes;
  const bool seen = is_own || record.count <= At(view.knowledge.seen, record.component);
  if (!seen && !(tensor_memory && record.component == actor.component)) return false;
  if (IsGeneric(actor.access)) return seen;
  if (tensor_memory && actor.access == Access::kTensorProduct && record.component == actor.component) {
    return true;  // a thread's products, and copies before products, are a pipeline
  }
  const bool tensor = is_own || record.count <= At(view.tensor, record.component) ||
                      (actor.access == Access::kTensorFree && record.count <= At(view.acquired, record.component));
  if (actor.access != Access::kAsync && !tensor) {
    if (seen)
      *why = component.tensor ? "; a tcgen05.fence or a wait is missing"
                              : "; a tcgen05.fence::after_thread_sync is missing";
    return false;
  }
  if (!tensor_memory && record.writes && IsGeneric(record.access) &&
      record.count > At(view.knowledge.fenced, record.component)) {
    *why = "; a fence.proxy.async is missing";
    return false;
  }
  return true;
}

void Checker::TouchCell(Cell* cell, uint8_t bytes, bool writes, bool tensor_memory, const Actor& actor,
                        const View& view, const std::string& (*where)(const void*), const void* context) {
  size_t kept = 0;
  for (size_t i = 0; i < cell->size(); ++i) {
    Record& record = (*cell)[i];
    if (record.bytes & bytes) {
      std::string why;
      const bool conflict = writes || record.writes;
      const bool ordered = !conflict || Ordered(record, tensor_memory, actor, view, &why);
      if (!ordered) {
        throw Error("not ordered with an earlier access to " + where(context) + why + "\n  it " +
                    (writes ? "writes" : "reads") + ", and this " + (record.writes ? "wrote" : "read") + ": " +
                    components_[static_cast<size_t>(record.component)].who + ", line " +
                    std::to_string(record.instruction->line) + ": " + record.instruction->text);
      }
      // A write that is ordered after a record stands for it; so does a reader's later read. An atomic access does not:
      // others like it need not be ordered after what it is ordered after.
      const bool same = record.component == actor.component;
      const bool stands_for_it = actor.access == Access::kAtomic ? same && record.access == Access::kAtomic
                                                                 : writes || (same && !record.writes);
      if (stands_for_it) record.bytes &= static_cast<uint8_t>(~bytes);
    }
    if (record.bytes != 0) (*cell)[kept++] = record;
  }
  cell->resize(kept);
  cell->push_back({actor.component, actor.count, actor.instruction, actor.access, writes, bytes});
}

namespace {

struct Spot {
  Space space;
  int owner;
  int64_t offset;
};

const std::string& DescribeSpot(const void* context) {
  static thread_local std::string text;
  const Spot& spot = *static_cast<const Spot*>(context);
  if (spot.space == Space::kTensor) {
    text = "tensor memory, lane " + std::to_string(spot.offset / TensorMemory::kColumns) + ", column " +
           std::to_string(spot.offset % TensorMemory::kColumns);
  } else if (spot.space == Space::kShared) {
    text = "shared memory at " + Hex(static_cast<uint64_t>(spot.offset));
  } else {
    text = "buffer " + std::to_string(spot.owner) + " at byte " + std::to_string(spot.offset);
  }
  return text;
}

}  // namespace

void Checker::Touch(const Place& place, int64_t bytes, bool writes, const Actor& actor, const View& view) {
  auto& cells = cells_[{static_cast<int>(place.space), place.owner}];
  const int64_t end = place.offset + bytes;
  if (static_cast<int64_t>(cells.size()) * 4 < end) cells.resize(static_cast<size_t>(end + 3) / 4);
  for (int64_t at = place.offset; at < end;) {
    const int64_t next = std::min((at / 4 + 1) * 4, end);
    const auto mask = static_cast<uint8_t>(((1 << (next - at)) - 1) << (at % 4));
    const Spot spot{place.space, place.owner, at};
    TouchCell(&cells[static_cast<size_t>(at / 4)], mask, writes, false, actor, view, DescribeSpot, &spot);
    at = next;
  }
}

void Checker::TouchTensor(int multiprocessor, int lane, int column, bool writes, const Actor& actor, const View& view) {
  auto& cells = cells_[{static_cast<int>(Space::kTensor), multiprocessor}];
  if (cells.empty()) cells.resize(static_cast<size_t>(TensorMemory::kTensorLanes) * TensorMemory::kColumns);
  const int64_t at = int64_t{lane} * TensorMemory::kColumns + column;
  const Spot spot{Space::kTensor, multiprocessor, at};
  TouchCell(&cells[static_cast<size_t>(at)], 15, writes, true, actor, view, DescribeSpot, &spot);
}

void Checker::ForgetShared(int cta) { cells_.erase({static_cast<int>(Space::kShared), cta}); }

void Checker::ForgetTensor(int multiprocessor, int column, int columns) {
  const auto found = cells_.find({static_cast<int>(Space::kTensor), multiprocessor});
  if (found == cells_.end()) return;
  for (int lane = 0; lane < TensorMemory::kTensorLanes; ++lane) {
    for (int i = column; i < column + columns; ++i) {
      found->second[static_cast<size_t>(lane * TensorMemory::kColumns + i)].clear();
    }
  }
}

}  // namespace emulator
