// The CUDA handler's calls that make parcels, and those of fused_moe that take them, against the recording driver: what
// is their own. handler_test.cc has what every kind of call shares, and runs these.

#include <cstdint>
#include <functional>
#include <limits>
#include <utility>

#include "call_site.h"
#include "cuda/driver.h"
#include "expect.h"
#include "fake.h"

namespace jax_moe::cuda::fake {
namespace {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max() / 16 * 16;

template <class Site>
struct Case {
  const char* what;
  const char* message;
  std::function<void(Site&)> change;
};

template <class Site, class Options, size_t n>
void ExpectRefusals(const Options& options, const Case<Site> (&cases)[n]) {
  for (const Case<Site>& one : cases) {
    Site site(options);
    one.change(site);
    const std::string error = site.Run();
    ExpectContains(error, one.message, one.what);
    Expect(error.rfind("3: ", 0) == 0, std::string(one.what) + " is INVALID_ARGUMENT");
    ExpectEqual(Join(recorder->calls), "", std::string(one.what) + ": nothing is enqueued");
  }
}

void TestMaking() {
  ParcelsSite site;
  ExpectEqual(site.Run(), "", "parcels are made");
  ExpectEqual(Join(recorder->calls), "launch parcels_kernel", "by one launch: nothing is zeroed");
  const std::vector<uint64_t>& parameters = recorder->launches.at(0).parameters;
  Expect(parameters[0] == 0x1000 && parameters[1] == 0x4000 && parameters[2] == 0x100000, "its buffers");

  for (const auto& [tokens, calls] :
       {std::pair{T, "launch parcels_kernel"}, {int64_t{0}, "node 101: empty after 7; set 101"}}) {
    ParcelsSite captured(tokens);
    CaptureAfterNode(7);
    recorder->calls.clear(), recorder->last_node = 100;
    ExpectEqual(captured.Run(), "", calls);
    ExpectEqual(Join(recorder->calls), calls, "captured: no node beside the launch");
  }
  Expect(recorder->zeroed.empty(), "nothing is zeroed");
}

void TestRefusalsOfMaking() {
  const Case<ParcelsSite> cases[] = {
      {"other tokens", "num_tokens = 8 (planned for 4)",
       [](ParcelsSite& site) {
         for (size_t i : {0, 1, 2}) site.operands[i].dims[0] = 8;
         site.results[0].dims[0] = 8;
       }},
      {"another H", "hidden_size = 48 (planned for 32)",
       [](ParcelsSite& site) { site.operands[0].dims[1] = 48, site.results[0].dims[1] = 48; }},
      {"another K", "top_k = 3 (planned for 2)",
       [](ParcelsSite& site) {
         site.operands[1].dims[1] = site.operands[2].dims[1] = 3, site.results[0].dims[1] = 48;
       }},
      {"short parcels", "out: got u8[4,32], needs u8[4,40]", [](ParcelsSite& site) { site.results[0].dims[1] = 32; }},
      {"parcels of fewer tokens", "out: got u8[3,40], needs u8[4,40]",
       [](ParcelsSite& site) { site.results[0].dims[0] = 3; }},
      {"bf16 parcels", "out: got bf16[4,40], needs u8[4,40]",
       [](ParcelsSite& site) { site.results[0].dtype = XLA_FFI_DataType_BF16; }},
      {"f32 x", "x: got f32[4,32], needs bf16[4,32]",
       [](ParcelsSite& site) { site.operands[0].dtype = XLA_FFI_DataType_F32; }},
      {"flat x", "x: got bf16[128], needs 2 dimensions", [](ParcelsSite& site) { site.operands[0].dims = {T * H}; }},
      {"odd H", "hidden size (axis 1 of x): got 24", [](ParcelsSite& site) { site.operands[0].dims[1] = 24; }},
      {"no H", "hidden size (axis 1 of x): got 0", [](ParcelsSite& site) { site.operands[0].dims[1] = 0; }},
      {"no K", "experts per token (axis 1 of expert_ids): got 0",
       [](ParcelsSite& site) { site.operands[1].dims[1] = 0; }},
      {"a negative T", "tokens (axis 0 of x): got -1", [](ParcelsSite& site) { site.operands[0].dims[0] = -1; }},
      {"a huge H", "needs less than 2^31 of each", [](ParcelsSite& site) { site.operands[0].dims[1] = kHuge; }},
      {"a huge K", "needs less than 2^31 of each", [](ParcelsSite& site) { site.operands[1].dims[1] = kHuge; }},
      {"weights of other tokens", "routing_weights: got f32[5,2], needs f32[4,2]",
       [](ParcelsSite& site) { site.operands[2].dims[0] = 5; }},
      {"ids of other tokens", "expert_ids: got s32[5,2], needs s32[4,2]",
       [](ParcelsSite& site) { site.operands[1].dims[0] = 5; }},
      {"scales of experts", "input_scale: got f32[3], needs f32[]",
       [](ParcelsSite& site) { site.operands[3].dims = {3}; }},
      {"no scale", "input_scale: got f32[0], needs f32[]", [](ParcelsSite& site) { site.operands[3].dims = {0}; }},
      {"an odd address", "result 0: its data starts at an address that is not a multiple of 16",
       [](ParcelsSite& site) { site.results[0].address += 8; }},
      {"fused_moe's operands", "operands: got 14, needs 4",
       [](ParcelsSite& site) { site.operands.resize(14, site.operands[0]); }},
      {"a workspace", "results: got 2, needs 1", [](ParcelsSite& site) { site.results.push_back(site.results[0]); }},
      {"an operand that it lacks", "kernels.parcels.arguments: no such buffer",
       [](ParcelsSite& site) { site.kernel_of["parcels"]->Set("arguments", "operand:4 result:0"); }},
      {"a scale that nobody reads", "kernels.launches: none is given input_scale",
       [](ParcelsSite& site) { site.kernel_of["parcels"]->Set("arguments", "operand:0 result:0"); }},
      {"an output that nobody writes", "kernels.launches: none is given the output",
       [](ParcelsSite& site) { site.kernel_of["parcels"]->Set("arguments", "operand:0 operand:3"); }},
      {"parcels that add", "kernels.adds: got 'parcels', needs '': nothing adds",
       [](ParcelsSite& site) { site.kernels->Set("adds", "parcels"); }},
      {"ragged_dot's sizes", "attribute kernels.sizes.num_tokens",
       [](ParcelsSite& site) { site.sizes->Erase("num_tokens"), site.sizes->Set("num_rows", T); }},
  };
  ExpectRefusals<ParcelsSite>(T, cases);
}

void TestTaking() {
  CallSite site({.parcels = true});
  ExpectEqual(site.Run(), "", "parcels are taken");
  ExpectEqual(Join(recorder->calls), "memset 256 to 0; launch sort_kernel; launch gemm1_kernel; launch gemm2_kernel",
              "the launches of any call");
}

void TestRefusalsOfTaking() {
  const Case<CallSite> cases[] = {
      {"other tokens", "num_tokens = 8 (planned for 4)",
       [](CallSite& site) {
         for (size_t i : {0, 1, 2}) site.operands[i].dims[0] = 8;
         site.results[0].dims[0] = 8;
       }},
      {"another H", "hidden_size = 48 (planned for 32)",
       [](CallSite& site) { site.operands[0].dims[1] = 48, site.results[0].dims[1] = 48; }},
      {"parcels of another H", "x: got u8[4,48], needs u8[4,40]",
       [](CallSite& site) { site.operands[0].dims[1] = 48; }},
      {"parcels of another K", "x: got u8[4,40], needs u8[4,48]",
       [](CallSite& site) { site.operands[1].dims[1] = site.operands[2].dims[1] = 3; }},
      {"x in bfloat16", "x: got bf16[4,32], needs u8[4,40]",
       [](CallSite& site) { site.operands[0] = {XLA_FFI_DataType_BF16, {T, H}, 0x1000}; }},
      {"parcels where none are awaited", "x: got u8[4,48], needs bf16[4,48]",
       [](CallSite& site) { site.attributes.Set("precision", "w4a4_rounded_x"), site.operands[0].dims[1] = 48; }},
      {"a flat output", "out: got bf16[128], needs 2 dimensions",
       [](CallSite& site) { site.results[0].dims = {T * H}; }},
      {"an odd H", "hidden size (axis 1 of out): got 24", [](CallSite& site) { site.results[0].dims[1] = 24; }},
      {"a huge H", "needs less than 2^31 of each", [](CallSite& site) { site.results[0].dims[1] = kHuge; }},
      {"a huge K", "needs less than 2^31 of each",
       [](CallSite& site) {
         site.operands[0].dims[0] = 0;
         site.operands[1].dims = {0, kHuge};
       }},
      {"a weighted x", "attribute weight_on: got 'input'",
       [](CallSite& site) { site.attributes.Set("weight_on", "input"); }},
      {"no scale", "gate_up.input_scale: got f32[0] (absent)", [](CallSite& site) { site.operands[7].dims = {0}; }},
  };
  ExpectRefusals<CallSite>(SiteOptions{.parcels = true}, cases);
}

}  // namespace

void TestParcels() {
  for (void (*test)() : {TestMaking, TestRefusalsOfMaking, TestTaking, TestRefusalsOfTaking}) WithRecorder(test);
}

}  // namespace jax_moe::cuda::fake
