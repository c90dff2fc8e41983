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
class TensorOperation : public AsyncOperation {
 public:
  explicit TensorOperation(const Step& step) : AsyncOperation(step) {}

 protected:
  // Throws for columns that are not the CTA's.
  void Check(int lane, int column, int columns) const;
  void TouchCell(Machine& machine, int lane, int column, bool writes) const;
  uint32_t Read(Machine& machine, int lane, int column, bool* poison) const;
  void Write(Machine& machine, int lane, int column, uint32_t value, bool poison) const;
};

// Throws unless one lane alone executes the step; gives its number.
int OneThread(const Step& step);

// Whether the operation goes into the pipeline of its thread: products and copies, which commits track.
void JoinPipeline(Step& step, std::shared_ptr<AsyncOperation> operation, const Operations& before);

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_TENSOR_H_
