// The CUDA handler's other kind of call, ragged_dot, against the recording driver: what is its own. handler_test.cc has
// what every kind of call shares, and runs these.

#include <functional>
#include <utility>

#include "call_site.h"
#include "cuda/driver.h"
#include "expect.h"
#include "fake.h"

namespace jax_moe::cuda::fake {
namespace {

void TestEagerAndCaptured() {
  ProductSite site({});
  ExpectEqual(site.Run(), "", "an eager product");
  ExpectEqual(Join(recorder->calls), "launch groups_kernel; launch product_kernel", "eager: nothing is zeroed");
  Expect(recorder->launches.at(0).attributes.empty(), "groups has no attribute");
  Expect(recorder->launches.at(1).attributes.size() == 1, "product may overlap");
  const std::vector<uint64_t>& parameters = recorder->launches.at(1).parameters;
  Expect(parameters[0] == 0x1000 && parameters[1] == 0x100000 && parameters[2] == 0x200000, "its buffers");

  for (const auto& [options, launches] :
       {std::pair{ProductOptions{}, "launch groups_kernel; launch product_kernel"},
        {ProductOptions{T, true, false}, "launch groups_kernel; launch x_rows_kernel; launch product_kernel"},
        {ProductOptions{0}, "node 101: empty after 7; set 101"}}) {
    ProductSite captured(options);
    CaptureAfterNode(7);
    recorder->calls.clear(), recorder->last_node = 100;
    ExpectEqual(captured.Run(), "", launches);
    ExpectEqual(Join(recorder->calls), launches, "captured: no node beside the launches");
  }
  Expect(recorder->zeroed.empty(), "no product zeroes its output");
}

void TestProductCounters() {
  int64_t before[3], after[3];
  JaxMoeCudaCounters(before);
  ProductSite site({});
  ExpectEqual(site.Run(), "", "an eager product");
  CaptureAfterNode(7);
  Expect(site.Execute().empty() && site.Execute(JaxMoeCudaNoCapture).empty(), "two captured products");
  JaxMoeCudaCounters(after);
  Expect(after[0] - before[0] == 1 && after[1] - before[1] == 2 && after[2] == before[2],
         "counters: 1 eager, 2 captured, none forked");
}

void TestProductFailures() {
  ProductSite site({});
  Expect(site.Instantiate().empty(), "instantiating");
  ExpectContains(site.Execute(), "ragged_dot: executed before it was initialized", "executing before loading");
  for (const char* call : {"cuModuleLoadData", "cuCtxGetId"}) {
    recorder->failing_call = call;
    ExpectContains(site.Initialize(), "ragged_dot: ", call);
  }
  recorder->failing_call.clear();
  ExpectEqual(site.Initialize(), "", "loading");
  recorder->failing_call = "cuLaunchKernelEx product_kernel";
  ExpectContains(site.Execute(), "ragged_dot: launching product: cuLaunchKernelEx", "a launch that fails");
}

void TestProductRefusals() {
  struct Case {
    const char* what;
    const char* message;
    std::function<void(ProductSite&)> change;
  };
  const Case cases[] = {
      {"other rows", "num_rows = 8 (planned for 4)",
       [](ProductSite& site) { site.operands[0].dims[0] = site.results[0].dims[0] = 8; }},
      {"other groups", "num_groups = 6 (planned for 5)", [](ProductSite& site) { site.operands[1].dims = {6}; }},
      {"other local groups", "local_groups = 2 (planned for 3)",
       [](ProductSite& site) { site.operands[5].dims = {2}; }},
      {"other columns", "in_features = 64 (planned for 32)", [](ProductSite& site) { site.operands[0].dims[1] = 64; }},
      {"another width", "out_features = 64 (planned for 48)", [](ProductSite& site) { site.results[0].dims[1] = 64; }},
      {"another output type", "out_bytes = 4 (planned for 2)",
       [](ProductSite& site) { site.results[0].dtype = XLA_FFI_DataType_F32; }},
      {"rows of another output", "out: got bf16[3,48], needs bf16[4,48]",
       [](ProductSite& site) { site.results[0].dims[0] = 3; }},
      {"f32 x", "x: got f32[4,32], needs bf16[4,32]",
       [](ProductSite& site) { site.operands[0].dtype = XLA_FFI_DataType_F32; }},
      {"float sizes", "group_sizes: got f32[5], needs s32[5]",
       [](ProductSite& site) { site.operands[1].dtype = XLA_FFI_DataType_F32; }},
      {"odd columns", "in_features (axis 1 of x): got 40", [](ProductSite& site) { site.operands[0].dims[1] = 40; }},
      {"short weights", "weights.payload: got u8[2,1,4608], 9216 bytes; the call's kernels were planned for 13824",
       [](ProductSite& site) { site.operands[3].dims[0] = 2; }},
      {"block scales outside", "weights.block_scale: got f8e4m3fn[3,4], 12 bytes",
       [](ProductSite& site) { site.operands[4].dims[1] = 4; }},
      {"a short workspace", "workspace 0: got s32[3], 12 bytes", [](ProductSite& site) { site.results[1].dims = {3}; }},
      {"no workspace", "results: got 1, needs 2", [](ProductSite& site) { site.results.pop_back(); }},
      {"fused_moe's operands", "operands: got 14, needs 8",
       [](ProductSite& site) { site.operands.resize(14, site.operands[0]); }},
      {"an odd address", "weights.payload: its data starts at an address that is not a multiple of 16",
       [](ProductSite& site) { site.operands[3].address += 8; }},
      {"a short bias", "weights.bias: got f32[3,32], needs f32[3,48]",
       [](ProductSite& site) { site.operands[7] = {XLA_FFI_DataType_F32, {3, 32}, 0x8000}; }},
      {"no rows planned", "kernels.launches: got 'groups product', needs none where x has no rows",
       [](ProductSite& site) { site.sizes->Set("num_rows", int64_t{0}); }},
      {"a product that adds", "kernels.adds: got 'product', needs '': nothing adds",
       [](ProductSite& site) { site.kernels->Set("adds", "product"); }},
      {"an output that nobody writes", "kernels.launches: none is given the output",
       [](ProductSite& site) {
         for (const char* name : {"groups", "product"}) site.kernel_of[name]->Set("arguments", "operand:0 result:1");
       }},
      {"an operand that only fused_moe has", "kernels.groups.arguments: no such buffer",
       [](ProductSite& site) { site.kernel_of["groups"]->Set("arguments", "operand:8"); }},
      {"no size of the weights", "attribute kernels.weight_bytes.weights.payload",
       [](ProductSite& site) { site.weight_bytes->Erase("weights.payload"); }},
      {"fused_moe's sizes", "attribute kernels.sizes.num_rows",
       [](ProductSite& site) { site.sizes->Erase("num_rows"), site.sizes->Set("num_tokens", T); }},
      {"an odd precision", "attribute precision: got 'w8a8', needs w4a16 | w4a4",
       [](ProductSite& site) { site.attributes.Set("precision", "w8a8"); }},
      {"w4a4 without its scale", "kernels.launches: none is given weights.input_scale",
       [](ProductSite& site) { site.attributes.Set("precision", "w4a4"); }},
  };
  for (const Case& one : cases) {
    ProductSite site({});
    one.change(site);
    const std::string error = site.Run();
    ExpectContains(error, one.message, one.what);
    Expect(error.rfind("3: ", 0) == 0, std::string(one.what) + " is INVALID_ARGUMENT");
    ExpectEqual(Join(recorder->calls), "", std::string(one.what) + ": nothing is enqueued");
  }
  ProductSite quantised({T, true});
  quantised.operands[6] = {XLA_FFI_DataType_F32, {0}, 0};
  ExpectContains(quantised.Run(), "weights.input_scale: got f32[0] (absent)", "w4a4 without its operand");
}

}  // namespace

void TestProducts() {
  for (void (*test)() : {TestEagerAndCaptured, TestProductCounters, TestProductFailures, TestProductRefusals}) {
    WithRecorder(test);
  }
}

}  // namespace jax_moe::cuda::fake
