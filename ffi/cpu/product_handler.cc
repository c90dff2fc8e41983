// The CPU handler of jax_moe_ragged_dot_v1: validate, find the rows of each group, multiply. What it needs beyond its
// operands are workspaces, as for fused_moe (handler.cc).

#include <algorithm>
#include <cstdint>

#include "buffers.h"
#include "cpu/choose_kernels.h"
#include "cpu/kernels.h"
#include "cpu/parallel_for.h"
#include "decode_product.h"

namespace jax_moe {
namespace {

ffi::Error DecodeWorkspaces(const Results& results, ProductCall* call) {
  const Product& p = call->problem;
  JAX_MOE_TRY(GetData("workspace group_starts", *results[1], ffi::S32, {p.local_groups + 1}, &call->group_starts));
  JAX_MOE_TRY(GetData("workspace active_groups", *results[2], ffi::S32, {p.local_groups}, &call->active_groups));
  JAX_MOE_TRY(GetData("workspace x_rows", *results[3], ffi::F32, {p.num_rows, p.in_features}, &call->x_rows));
  if (p.precision != Precision::kW4A4Dynamic) return ffi::Error::Success();
  return GetData("workspace x_row_scales", *results[4], ffi::F32, {p.num_rows}, &call->x_row_scales);
}

// First row of each local group, and which of them have rows. Sizes that no rows are there for, and negative ones, are
// a caller's bug: they are cut off.
void FindGroups(ProductCall* call) {
  const Product& p = call->problem;
  int64_t row = 0;
  auto size = [&](int64_t group) {
    const int64_t given = group >= 0 && group < p.num_groups ? p.group_sizes[group] : 0;
    return std::clamp<int64_t>(given, 0, p.num_rows - row);
  };
  const int64_t first = *p.group_offset;
  for (int64_t group = 0; group < std::min(first, p.num_groups); ++group) row += size(group);
  call->num_active = 0;
  for (int64_t local = 0; local < p.local_groups; ++local) {
    call->group_starts[local] = static_cast<int32_t>(row);
    const int64_t rows = size(first + local);
    if (rows != 0) call->active_groups[call->num_active++] = static_cast<int32_t>(local);
    row += rows;
  }
  call->group_starts[p.local_groups] = static_cast<int32_t>(row);
}

ffi::Error RaggedDot(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                     ffi::Dictionary attributes) {
  Operands operands(kProductOperandNames);
  Results results;
  Precision precision;
  ProductCall call = {};
  JAX_MOE_TRY(operands.Take(args));
  JAX_MOE_TRY(DecodeProductPrecision({attributes, ""}, &precision));
  const size_t num_results = precision == Precision::kW4A4Dynamic ? 5 : 4;
  JAX_MOE_TRY(GetResults(rets, num_results, " (out and the workspaces of cpu_workspaces)", &results));
  JAX_MOE_TRY(DecodeProduct(operands, results, precision, &call.problem));
  JAX_MOE_TRY(DecodeCanonicalWeights(operands, &call.problem));
  JAX_MOE_TRY(DecodeWorkspaces(results, &call));
  if (call.problem.num_rows == 0) return ffi::Error::Success();

  FindGroups(&call);
  const Kernels& kernels = ChooseKernels();
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  call.unit_columns = UnitColumns(call.num_active * call.problem.out_features, threads);  // each group has its own
  ParallelFor(pool, threads, call.problem.num_rows, [&](int64_t unit) { kernels.product_row(call, unit); });
  ParallelFor(pool, threads, call.num_units(), [&](int64_t unit) { kernels.product_unit(call, unit); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_moe

// Everything else in the library is hidden.
extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* JaxMoeRaggedDotCpu(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxMoeRaggedDotCpu, jax_moe::RaggedDot,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
