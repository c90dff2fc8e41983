// Tensor memory for whoever works on it asynchronously.

#ifndef JAX_MOE_EMULATOR_TENSOR_H_
#define JAX_MOE_EMULATOR_TENSOR_H_

#include "accesses.h"

namespace emulator {

// A place in tensor memory: bits 16 and up are the lane, the rest is the column.
struct TensorAddress {
  explicit TensorAddress(uint32_t bits) : lane(static_cast<int>(bits >> 16)), column(static_cast<int>(bits & 0xFFFF)) {}
  int lane, column;
};

// A component of the warp for the checker; made when it is first needed.
int TensorComponent(Step& step, int* component, const char* what);

// Operations of tensor memory: cells with their owner and the checker.
//
// One with .cta_group::2 works on the memories of two CTAs; `at` is the one that the methods below are about.
class TensorOperation : public AsyncOperation {
 public:
  explicit TensorOperation(const Step& step) : AsyncOperation(step), ctas{warp->cta}, at(warp->cta) {}

 protected:
  // Makes it one for both CTAs of the pair if the instruction says so.
  void Span(Step& step);
  template <typename F>
  void ForCtas(F&& f) {
    for (Cta* cta : ctas) {
      at = cta;
      f();
    }
    at = warp->cta;
  }
  int group() const { return static_cast<int>(ctas.size()); }

  std::vector<Cta*> ctas;  // the even one first
  Cta* at;

  // Throws for columns that are not the CTA's.
  void Check(int lane, int column, int columns) const;
  void TouchCell(Machine& machine, int lane, int column, bool writes) const;
  uint32_t Read(Machine& machine, int lane, int column, bool* poison) const;
  void Write(Machine& machine, int lane, int column, uint32_t value, bool poison) const;
};

// The columns that an allocation or a release is for.
int Columns(Step& step, const Operand& operand);
Outcome Free(Step& step);
Outcome GiveUpPermit(Step& step);
// Where an allocation writes its address, and that it does.
Place AllocationTarget(Step& step);
void WriteAllocation(Step& step, const Place& place, int column);

// The other CTA of the pair, whose rank in the cluster differs in its last bit.
Cta& PeerOf(const Cta& cta);

// Throws unless one lane alone executes the step; gives its number.
int OneThread(const Step& step);

// Whether the operation goes into the pipeline of its thread: products and copies, which commits track.
void JoinPipeline(Step& step, std::shared_ptr<AsyncOperation> operation, const Operations& before);

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_TENSOR_H_
