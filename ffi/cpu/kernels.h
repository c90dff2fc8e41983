// The arithmetic of the CPU handler, compiled once per instruction set and chosen at run time.

#ifndef JAX_MOE_CPU_KERNELS_H_
#define JAX_MOE_CPU_KERNELS_H_

#include <cstdint>

#include "problem.h"

namespace jax_moe {

// A Problem and its workspaces, which are results 1 to 6, or 8, of the custom call (cpu_workspaces in Python).
struct Call {
  Problem problem;
  int32_t* route_order;     // [T*K]: permuted row -> route
  int32_t* expert_starts;   // [L+1]: first permuted row of each expert
  int32_t* active_experts;  // [L]: the experts that have rows; num_active of them
  float* x_rows;            // what GEMM1 multiplies: [T, H], or one row a permuted row for weight_on="input"
  float* intermediate;      // what GEMM2 multiplies: [T*K, I], by permuted row
  float* sums;              // ordered: contributions [T*K, H], by route; atomic: the fp32 output [T, H]
  // Only w4a4_dynamic has these: the scale of each row of x_rows and of intermediate.
  float* x_row_scales;
  float* intermediate_row_scales;

  int64_t num_active;
  int64_t num_rows;           // permuted rows: the routes whose expert is local
  int64_t down_unit_columns;  // a multiple of 16

  int64_t num_x_rows() const { return problem.weight_on == WeightOn::kInput ? num_rows : problem.num_tokens; }
  int64_t num_gate_up_units() const { return num_active * (problem.intermediate_size / 16); }
  int64_t num_down_units() const { return (problem.hidden_size + down_unit_columns - 1) / down_unit_columns; }
};

// A Product and its workspaces, which are results 1 to 3, or 4, of the custom call (cpu_workspaces in Python).
struct ProductCall {
  Product problem;
  int32_t* group_starts;   // [G+1]: first row of each local group
  int32_t* active_groups;  // [G]: the local groups that have rows; num_active of them
  float* x_rows;           // what is multiplied: [T, C], for the rows of local groups
  float* x_row_scales;     // w4a4_dynamic: the scale of each of these

  int64_t num_active;
  int64_t unit_columns;  // a multiple of 16

  int64_t units_per_group() const { return (problem.out_features + unit_columns - 1) / unit_columns; }
  int64_t num_units() const { return num_active * units_per_group(); }
};

// Units of one kind are independent: any number of threads may run them in any order, with the same result.
struct Kernels {
  // Row `unit` of `x_rows`: widens x; weights and quantises it as the options say.
  void (*x_row)(const Call& call, int64_t unit);
  // 16 columns of `intermediate` for all rows of one expert: GEMM1, activation, rounding.
  void (*gate_up_unit)(const Call& call, int64_t unit);
  // Row `unit` of `intermediate`, quantised with a scale of its own; for w4a4_dynamic.
  void (*intermediate_row)(const Call& call, int64_t unit);
  // Some columns of `sums` (of the output, for atomic) for all rows of all experts: zeroing, GEMM2, weighting.
  void (*down_unit)(const Call& call, int64_t unit);
  // Output row `unit` from the contributions of its routes, in slot order; for ordered.
  void (*combine_row)(const Call& call, int64_t unit);

  // Of a grouped product, row `unit` of `x_rows`, or zeros in that row of the output where no local group has it.
  void (*product_row)(const ProductCall& call, int64_t unit);
  // Some columns of the output for all rows of one local group.
  void (*product_unit)(const ProductCall& call, int64_t unit);
};

extern const Kernels kKernelsBaseline;
extern const Kernels kKernelsAvx2;    // x86-64 only
extern const Kernels kKernelsAvx512;  // x86-64 only

// The index of a route's expert among the local ones, or -1 when another shard (or nobody) has it.
static inline int64_t LocalExpert(const Problem& problem, int64_t route) {
  const int64_t index = int64_t{problem.expert_ids[route]} - *problem.expert_offset;
  return index >= 0 && index < problem.local_experts ? index : -1;
}

}  // namespace jax_moe

#endif  // JAX_MOE_CPU_KERNELS_H_
