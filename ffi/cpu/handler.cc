// The CPU handler of jax_moe_fused_moe_v2 (and v1, the same call): validate, sort routes by expert, GEMM1, GEMM2,
// combine.
//
// It has no state and allocates nothing that grows with the model: what it needs beyond its operands are workspaces,
// which are results of the custom call.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/choose_kernels.h"
#include "cpu/kernels.h"
#include "cpu/parallel_for.h"
#include "decode.h"

namespace jax_moe {
namespace {

ffi::Error DecodeWorkspaces(const Results& results, Call* call) {
  const Problem& p = call->problem;
  const int64_t routes = p.num_routes();
  const bool ordered = p.combine == Combine::kOrdered;
  const int64_t x_rows = p.weight_on == WeightOn::kInput ? routes : p.num_tokens;
  const int64_t sum_rows = ordered ? routes : p.out_is_bf16() ? p.num_tokens : 0;
  JAX_MOE_TRY(GetData("workspace route_order", *results[1], ffi::S32, {routes}, &call->route_order));
  JAX_MOE_TRY(GetData("workspace expert_starts", *results[2], ffi::S32, {p.local_experts + 1}, &call->expert_starts));
  JAX_MOE_TRY(GetData("workspace active_experts", *results[3], ffi::S32, {p.local_experts}, &call->active_experts));
  JAX_MOE_TRY(GetData("workspace x_rows", *results[4], ffi::F32, {x_rows, p.hidden_size}, &call->x_rows));
  JAX_MOE_TRY(
      GetData("workspace intermediate", *results[5], ffi::F32, {routes, p.intermediate_size}, &call->intermediate));
  JAX_MOE_TRY(GetData("workspace sums", *results[6], ffi::F32, {sum_rows, p.hidden_size}, &call->sums));
  if (!ordered && !p.out_is_bf16()) call->sums = static_cast<float*>(p.out);
  if (p.precision == Precision::kW4A4Dynamic) {
    JAX_MOE_TRY(GetData("workspace x_row_scales", *results[7], ffi::F32, {x_rows}, &call->x_row_scales));
    JAX_MOE_TRY(
        GetData("workspace intermediate_row_scales", *results[8], ffi::F32, {routes}, &call->intermediate_row_scales));
  }
  return ffi::Error::Success();
}

// A counting sort: permuted rows by expert, then by route. Routes of experts that are not local are left out.
void SortRoutes(Call* call) {
  const Problem& p = call->problem;
  int32_t* starts = call->expert_starts;
  std::memset(starts, 0, (p.local_experts + 1) * sizeof(*starts));
  for (int64_t route = 0; route < p.num_routes(); ++route) {
    const int64_t expert = LocalExpert(p, route);
    if (expert >= 0) ++starts[expert + 1];
  }
  call->num_active = 0;
  for (int64_t expert = 0; expert < p.local_experts; ++expert) {
    if (starts[expert + 1] != 0) call->active_experts[call->num_active++] = static_cast<int32_t>(expert);
    starts[expert + 1] += starts[expert];
  }
  call->num_rows = starts[p.local_experts];
  // Filling advances each start to its expert's end, which is the next one's start; moving them up restores them.
  for (int64_t route = 0; route < p.num_routes(); ++route) {
    const int64_t expert = LocalExpert(p, route);
    if (expert >= 0) call->route_order[starts[expert]++] = static_cast<int32_t>(route);
  }
  std::memmove(starts + 1, starts, p.local_experts * sizeof(*starts));
  starts[0] = 0;
}

ffi::Error FusedMoe(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                    ffi::Dictionary attributes) {
  Operands operands(kOperandNames);
  Results results;
  Options options;
  Call call = {};
  int64_t intermediate_size = 0;
  JAX_MOE_TRY(operands.Take(args));
  JAX_MOE_TRY(DecodeOptions({attributes, ""}, &options));
  const size_t num_results = options.precision == Precision::kW4A4Dynamic ? 9 : 7;
  JAX_MOE_TRY(GetResults(rets, num_results, " (out and the workspaces of cpu_workspaces)", &results));
  if (options.x_form == XForm::kParcels)
    return Refuse("attribute precision: got 'w4a4_parcels', which only a GPU takes");
  JAX_MOE_TRY(CanonicalIntermediateSize(operands, &intermediate_size));
  JAX_MOE_TRY(DecodeProblem(operands, results, options, intermediate_size, &call.problem));
  JAX_MOE_TRY(DecodeCanonicalWeights(operands, &call.problem));
  JAX_MOE_TRY(DecodeWorkspaces(results, &call));
  if (call.problem.num_tokens == 0) return ffi::Error::Success();

  SortRoutes(&call);
  const Kernels& kernels = ChooseKernels();
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  call.down_unit_columns = UnitColumns(call.problem.hidden_size, threads);
  ParallelFor(pool, threads, call.num_x_rows(), [&](int64_t unit) { kernels.x_row(call, unit); });
  ParallelFor(pool, threads, call.num_gate_up_units(), [&](int64_t unit) { kernels.gate_up_unit(call, unit); });
  if (call.problem.precision == Precision::kW4A4Dynamic) {
    ParallelFor(pool, threads, call.num_rows, [&](int64_t unit) { kernels.intermediate_row(call, unit); });
  }
  ParallelFor(pool, threads, call.num_down_units(), [&](int64_t unit) { kernels.down_unit(call, unit); });
  if (call.problem.combine == Combine::kOrdered) {
    ParallelFor(pool, threads, call.problem.num_tokens, [&](int64_t unit) { kernels.combine_row(call, unit); });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_moe

// The name of the kernels that calls in this process run.
extern "C" __attribute__((visibility("default"))) const char* JaxMoeCpuKernels() {
  const jax_moe::Kernels* const chosen = &jax_moe::ChooseKernels();
#if defined(JAX_MOE_X86_VARIANTS)
  if (chosen == &jax_moe::kKernelsAvx512) return "avx512";
  if (chosen == &jax_moe::kKernelsAvx2) return "avx2";
#endif
  return chosen == &jax_moe::kKernelsBaseline ? "baseline" : "unknown";
}

// Everything else in the library is hidden.
extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* JaxMoeFusedMoeCpu(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxMoeFusedMoeCpu, jax_moe::FusedMoe,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
