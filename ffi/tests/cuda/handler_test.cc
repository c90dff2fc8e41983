// The CUDA handler against a recording driver and a stand-in for XLA. tests/test_cuda_handler.py builds and runs it,
// once as it is and once for each mutant of the handler, which must fail.
//
// Prints a line for each expectation that does not hold; the exit code is their number.

#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>

#include "call_site.h"
#include "cuda/driver.h"
#include "cuda/program.h"
#include "expect.h"
#include "fake.h"

namespace jax_moe::cuda::fake {
namespace {

constexpr int64_t kLong = 128;  // tokens of a call whose output a memset zeroes, captured too

void TestEager() {
  CallSite site({});
  ExpectEqual(site.Run(), "", "an eager call");
  ExpectEqual(Join(recorder->calls), "memset 256 to 0; launch sort_kernel; launch gemm1_kernel; launch gemm2_kernel",
              "eager, atomic");

  const Launch& sort = recorder->launches.at(0);
  Expect(sort.config.grid_x == 8 && sort.config.grid_y == 1 && sort.config.grid_z == 1, "the grid");
  Expect(sort.config.block_x == 256 && sort.config.block_y == 1 && sort.config.block_z == 1, "the CTA");
  Expect(sort.config.shared_bytes == 100000, "the shared memory");
  Expect(sort.config.stream == reinterpret_cast<Stream>(0x5eed), "the stream is XLA's");
  Expect(sort.attributes.size() == 1 && sort.attributes[0].id == kLaunchClusterDimension &&
             sort.attributes[0].value.cluster.x == 8 && sort.attributes[0].value.cluster.y == 1 &&
             sort.attributes[0].value.cluster.z == 1,
         "sort is launched in clusters of 8");
  const Launch& gemm1 = recorder->launches.at(1);
  Expect(gemm1.attributes.size() == 1 && gemm1.attributes[0].id == kLaunchProgrammaticStreamSerialization &&
             gemm1.attributes[0].value.programmatic_stream_serialization == 1,
         "gemm1 may overlap");
  Expect(recorder->launches.at(2).attributes.empty(), "gemm2 has no attribute");

  const std::vector<uint64_t>& parameters = sort.parameters;
  Expect(parameters[0] == 0x1000 && parameters[1] == 0x200000, "operand:0 and result:1");
  Expect(parameters[2] == 0, "null");
  Expect(static_cast<int32_t>(parameters[3]) == -7, "i32:-7");
}

void TestWhere() {
  // What the driver is asked for, eager and captured: on XLA's stream, in its context, for the output.
  CallSite site({kLong});
  ExpectEqual(site.Run(), "", "an eager call");
  CaptureAfterNode(7);
  ExpectEqual(site.Execute(), "", "a captured call");
  CallSite empty({0});
  ExpectEqual(empty.Run(), "", "a captured call without tokens");
  Expect(recorder->streams == std::set{reinterpret_cast<Stream>(0x5eed)}, "every stream is XLA's");
  Expect(recorder->zeroed == std::set<DevicePointer>{0x100000}, "the output is what is zeroed");
  Expect(recorder->memset_contexts == std::set{reinterpret_cast<Context>(current_context)}, "in the current context");
  Expect(recorder->function_attributes ==
             std::map<int, int>{{kFunctionMaxDynamicSharedBytes, 100000}, {kFunctionPreferredSharedCarveout, 100}},
         "more than 48 KiB of shared memory is asked for");
  Expect(recorder->images.count({"gemm1_kernel", "image of gemm1"}) == 1, "a function is of its own image");
}

void TestWhatTellsKernelsApart() {
  // Every GEMM of a model has the same name: the image tells them apart.
  CallSite site({});
  ExpectEqual(site.Run(), "", "a call");
  int loads = recorder->num_loads;
  for (const char* what : {"image", "name", "shared"}) {
    CallSite other({});
    if (std::string(what) == "shared") {
      other.kernel_of["sort"]->Set(what, int64_t{2000});
    } else {
      other.kernel_of["sort"]->Set(what, "another");
    }
    ExpectEqual(other.Run(), "", what);
    Expect(recorder->num_loads == ++loads, std::string("loaded for another ") + what);
  }
}

void TestOptions() {
  CallSite f32({T, false, false, false});
  ExpectEqual(f32.Run(), "", "an f32 call");
  ExpectEqual(recorder->calls.at(0), "memset 512 to 0", "an f32 output is twice the size");

  recorder->calls.clear();
  CallSite ordered({T, true, true});
  ExpectEqual(ordered.Run(), "", "an ordered call");
  ExpectEqual(
      Join(recorder->calls),
      "launch sort_kernel; launch x_rows_kernel; launch gemm1_kernel; launch gemm2_kernel; launch combine_kernel",
      "ordered mode zeroes nothing");
}

void TestCaptured() {
  CallSite site({kLong});
  Expect(site.Instantiate().empty() && site.Initialize().empty(), "loading");
  CaptureAfterNode(7);
  ExpectEqual(site.Execute(), "", "a captured call");
  // Nodes are numbered from 101: sort, the memset, gemm1, gemm2.
  const std::string node = ": memset 8192 to 0 rows 1 after 7; ";
  ExpectEqual(Join(recorder->calls),
              "launch sort_kernel; node 102" + node + "launch gemm1_kernel; add 102; launch gemm2_kernel",
              "captured, atomic: the zeroing forks before sort and joins before gemm2");

  for (const auto& [launches, want] :
       {std::pair{"gemm2", "node 101" + node + "add 101; launch gemm2_kernel"},
        {"gemm2 sort", "node 101" + node + "add 101; launch gemm2_kernel; launch sort_kernel"},
        {"gemm1 gemm2 sort",
         "launch gemm1_kernel; node 102" + node + "add 102; launch gemm2_kernel; launch sort_kernel"}}) {
    CallSite other({kLong});
    other.kernels->Set("launches", launches);
    other.kernel_of["gemm1"]->Set("overlap", int64_t{0});
    CaptureAfterNode(7);
    recorder->calls.clear(), recorder->last_node = 100;
    ExpectEqual(other.Run(), "", launches);
    ExpectEqual(Join(recorder->calls), want, launches);
  }

  recorder->calls.clear();
  CallSite ordered({T, true});
  Expect(ordered.Instantiate().empty() && ordered.Initialize().empty(), "loading");
  ExpectEqual(ordered.Execute(), "", "a captured ordered call");
  ExpectEqual(Join(recorder->calls),
              "launch sort_kernel; launch gemm1_kernel; launch gemm2_kernel; launch combine_kernel",
              "no fork when ordered");

  recorder->capture_status = 2;
  ExpectContains(site.Execute(), "cuStreamGetCaptureInfo", "an invalidated capture is not taken for an eager call");
}

void TestShortOutputs() {
  // A kernel zeroes up to 4096 bytes of a captured call; if it cannot be loaded, a memset does.
  const std::string rest = "launch gemm1_kernel; add 102; launch gemm2_kernel";
  for (const auto& [tokens, zeroing] : {std::pair{int64_t{64}, "jax_moe_zero of 4096"},
                                        {int64_t{1}, "jax_moe_zero of 64"},
                                        {int64_t{65}, "memset 4160 to 0 rows 1"}}) {
    CallSite site({tokens});
    CaptureAfterNode(7);
    recorder->calls.clear(), recorder->last_node = 100;
    ExpectEqual(site.Run(), "", "a captured call");
    ExpectEqual(Join(recorder->calls), std::string("launch sort_kernel; node 102: ") + zeroing + " after 7; " + rest,
                zeroing);
  }
  Expect(recorder->zeroed == std::set<DevicePointer>{0x100000}, "the output is what is zeroed");
  CallSite site({});
  recorder->failing_call = "cuGraphAddKernelNode";
  const std::string error = site.Run();
  ExpectContains(error, "zeroing the output: cuGraphAddKernelNode", "the kernel's node is refused");
  recorder->failing_call.clear();

  ++current_context;
  recorder->failing_call = "cuModuleGetFunction jax_moe_zero";
  recorder->calls.clear(), recorder->last_node = 100;
  CaptureAfterNode(7);
  ExpectEqual(site.Run(), "", "a captured call without the kernel");
  ExpectEqual(Join(recorder->calls), "launch sort_kernel; node 102: memset 256 to 0 rows 1 after 7; " + rest,
              "a memset does the same");
}

void TestCounters() {
  int64_t before[3], after[3];
  JaxMoeCudaCounters(before);
  CallSite site({}), ordered({T, true});
  Expect(site.Run().empty() && ordered.Run().empty(), "two eager calls");
  CaptureAfterNode(7);
  Expect(site.Execute().empty() && site.Execute().empty() && ordered.Execute().empty(), "three captured calls");
  JaxMoeCudaCounters(after);
  Expect(after[0] - before[0] == 2 && after[1] - before[1] == 3 && after[2] - before[2] == 2,
         "counters: 2 eager, 3 captured, 2 forked");
}

void TestNoTokens() {
  CallSite site({0});
  ExpectEqual(site.Run(), "", "a call without tokens");
  ExpectEqual(Join(recorder->calls), "", "no tokens: nothing to do");
  CaptureAfterNode(7);
  ExpectEqual(site.Execute(), "", "a captured call without tokens");
  ExpectEqual(Join(recorder->calls), "node 101: empty after 7; set 101", "XLA refuses an empty trace");
}

void TestDriverFailures() {
  const std::vector<std::pair<std::string, std::string>> eager = {
      {"cuStreamGetCaptureInfo", "asking whether"},           {"cuMemsetD8Async", "zeroing the output"},
      {"cuLaunchKernelEx sort_kernel", "launching sort: "},   {"cuLaunchKernelEx gemm1_kernel", "launching gemm1: "},
      {"cuLaunchKernelEx gemm2_kernel", "launching gemm2: "}, {"cuCtxGetId", "cuCtxGetId"},
  };
  const std::vector<std::pair<std::string, std::string>> captured = {
      {"cuStreamGetCaptureInfo", "asking whether"},
      {"cuCtxGetCurrent", "zeroing the output"},
      {"cuGraphAddMemsetNode", "zeroing the output"},
      {"cuLaunchKernelEx gemm1_kernel", "launching gemm1: "},
      {"cuStreamUpdateCaptureDependencies", "joining the zeroing"},
  };
  CallSite site({kLong});
  Expect(site.Instantiate().empty() && site.Initialize().empty(), "loading");
  for (bool capturing : {false, true}) {
    for (const auto& [call, step] : capturing ? captured : eager) {
      recorder->capture_status = kCaptureNone;
      if (capturing) CaptureAfterNode(7);
      recorder->calls.clear();
      recorder->failing_call = call;
      const std::string error = site.Execute();
      ExpectContains(error, step, call + " fails");
      ExpectContains(error, call.substr(0, call.find(' ')), call + " fails");
      ExpectContains(error, "CUDA_ERROR_FAKE (as the test asked)", call + " fails");
      recorder->failing_call.clear();
    }
  }
  CaptureAfterNode(7);
  recorder->calls.clear();
  recorder->failing_call = "cuLaunchKernelEx gemm1_kernel";
  site.Execute();
  ExpectContains(recorder->calls.back(), "add ", "an error after the fork joins it");
  recorder->also_failing = "cuStreamUpdateCaptureDependencies";
  ExpectContains(site.Execute(), "launching gemm1: cuLaunchKernelEx", "the first failure is told");
  ExpectContains(site.Execute(), "joining the zeroing then failed", "and that of the clean-up");
}

void TestLoading() {
  CallSite first({}), second({});
  Expect(first.Instantiate().empty() && second.Instantiate().empty(), "instantiating");
  Expect(recorder->num_loads == 0, "instantiating loads nothing");
  ExpectContains(first.Execute(), "initialize", "executing before loading");
  Expect(first.Initialize().empty() && first.Initialize().empty(), "loading twice");
  Expect(recorder->num_loads == 4, "loaded once");
  Expect(second.Initialize().empty() && recorder->num_loads == 4, "two call sites share a kernel");
  ++current_context;
  ExpectContains(first.Execute(), "initialize", "a second device has its own kernels");
  Expect(first.Initialize().empty() && recorder->num_loads == 8, "loaded on a second device");
  ExpectEqual(first.Execute(), "", "a call on the second device");
  Expect(recorder->num_loads == 8, "executing loads nothing");

  ++current_context;
  for (const char* call : {"cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuCtxGetId"}) {
    recorder->failing_call = call;
    ExpectContains(first.Initialize(), "CUDA_ERROR_FAKE", std::string(call) + " fails");
  }
  recorder->failing_call = "cuModuleLoadData";
  recorder->failing_code = kErrorNoBinaryForGpu;
  ExpectContains(first.Initialize(), "another GPU", "a kernel for another GPU");
  recorder->failing_call.clear();
  ExpectEqual(first.Initialize(), "", "a failed load can be tried again");
}

void TestRefusals() {
  struct Case {
    const char* what;
    const char* message;
    std::function<void(CallSite&)> change;
  };
  const std::vector<Case> cases = {
      {"unaligned x", "3: jax_moe: x: its data starts", [](CallSite& site) { site.operands[0].address += 8; }},
      {"unaligned payload", "3: jax_moe: down.payload", [](CallSite& site) { site.operands[9].address += 4; }},
      {"unaligned workspace", "3: jax_moe: result 2", [](CallSite& site) { site.results[2].address += 8; }},
      {"x of another T", "3: jax_moe: ", [](CallSite& site) { site.operands[0].dims[0] += 1; }},
      {"other T everywhere", "kernels.sizes: the buffers have num_tokens = 5 (planned for 4)",
       [](CallSite& site) {
         for (size_t i : {0, 1, 2}) site.operands[i].dims[0] += 1;
         site.results[0].dims[0] += 1;
       }},
      {"other T and L", "the buffers have num_tokens = 4 (planned for 5), local_experts = 3 (planned for 4)",
       [](CallSite& site) { site.sizes->Set("num_tokens", T + 1).Set("local_experts", L + 1); }},
      {"f32 output, bf16 kernels", "the buffers have out_bytes = 4 (planned for 2)",
       [](CallSite& site) { site.results[0].dtype = XLA_FFI_DataType_F32; }},
      {"short weights", "3: jax_moe: gate_up.payload", [](CallSite& site) { site.operands[4].dims[2] -= 1; }},
      {"short workspace", "3: jax_moe: workspace 1", [](CallSite& site) { site.results[2].dims[0] -= 1; }},
      {"short down weights", "3: jax_moe: down.payload", [](CallSite& site) { site.operands[9].dims[2] -= 1; }},
      {"long weights", "3: jax_moe: gate_up.payload", [](CallSite& site) { site.operands[4].dims[2] += 1; }},
      {"short first workspace", "3: jax_moe: workspace 0", [](CallSite& site) { site.results[1].dims[0] -= 1; }},
      {"unaligned output", "3: jax_moe: result 0", [](CallSite& site) { site.results[0].address += 8; }},
      {"unaligned last operand", "3: jax_moe: down.bias: its data starts",
       [](CallSite& site) { site.operands[13] = {XLA_FFI_DataType_F32, {L, H}, 0xe004}; }},
      {"many arguments", "cannot read 'null'",
       [](CallSite& site) {
         std::string many;
         for (size_t i = 0; i <= kMostArguments; ++i) many += i ? " null" : "null";
         site.kernel_of["sort"]->Set("arguments", many);
       }},
      {"huge cluster", "sort.cluster: got 16",
       [](CallSite& site) { site.kernel_of["sort"]->Set("cluster", int64_t{16}); }},
      {"no cluster", "sort.cluster: got 0", [](CallSite& site) { site.kernel_of["sort"]->Set("cluster", int64_t{0}); }},
      {"much shared", "sort.shared: got 2147483648, needs 0..2147483647",
       [](CallSite& site) { site.kernel_of["sort"]->Set("shared", int64_t{1} << 31); }},
      {"odd overlap", "sort.overlap", [](CallSite& site) { site.kernel_of["sort"]->Set("overlap", int64_t{2}); }},
      {"the first launch overlaps", "attribute kernels.sort.overlap: got 1, needs 0",
       [](CallSite& site) { site.kernel_of["sort"]->Set("overlap", int64_t{1}); }},
      {"another launch is first and overlaps", "attribute kernels.gemm1.overlap: got 1, needs 0",
       [](CallSite& site) { site.kernels->Set("launches", "gemm1 sort gemm2"); }},
      {"huge grid", "sort.grid", [](CallSite& site) { site.kernel_of["sort"]->Set("grid", int64_t{1} << 31); }},
      {"no name", "sort.name: is empty", [](CallSite& site) { site.kernel_of["sort"]->Set("name", ""); }},
      {"no workspace", "3: jax_moe: results: got 2", [](CallSite& site) { site.results.pop_back(); }},
      {"missing operand", "3: jax_moe: operands: got 13", [](CallSite& site) { site.operands.pop_back(); }},
      {"no gemm2", "attribute kernels.launches: has no kernel for 'gemm2'",
       [](CallSite& site) { site.kernel_of.erase("gemm2"); }},
      {"a number for gemm2", "attribute kernels.gemm2: Wrong attribute type",
       [](CallSite& site) { site.kernel_of.erase("gemm2"), site.kernels->Set("gemm2", int64_t{1}); }},
      {"no launches", "kernels.launches: got '', needs one where x has rows",
       [](CallSite& site) { site.kernels->Set("launches", "").Set("adds", ""); }},
      {"no list of launches", "attribute kernels.launches", [](CallSite& site) { site.kernels->Erase("launches"); }},
      {"two spaces", "kernels.launches: has no kernel for ''",
       [](CallSite& site) { site.kernels->Set("launches", "sort  gemm1 gemm2"); }},
      {"nothing adds", "kernels.adds: got '', needs 'gemm2', the first launch that is given the output",
       [](CallSite& site) { site.kernels->Set("adds", ""); }},
      {"no word of what adds", "attribute kernels.adds", [](CallSite& site) { site.kernels->Erase("adds"); }},
      {"an unknown launch adds", "kernels.adds: got 'gemm3', needs 'gemm2'",
       [](CallSite& site) { site.kernels->Set("adds", "gemm3"); }},
      {"an earlier launch adds", "kernels.adds: got 'gemm1', needs 'gemm2'",
       [](CallSite& site) { site.kernels->Set("adds", "gemm1"); }},
      {"the output before it is zero", "kernels.adds: got 'gemm2', needs 'sort'",
       [](CallSite& site) { site.kernel_of["sort"]->Set("arguments", "operand:1 result:0"); }},
      {"no launch writes the output", "kernels.launches: none is given the output",
       [](CallSite& site) { site.kernel_of["gemm2"]->Set("arguments", "operand:0 result:1"); }},
      {"an ordered call that adds", "kernels.adds: got 'gemm2', needs '': nothing adds",
       [](CallSite& site) { site.attributes.Set("combine", "ordered"); }},
      {"no such operand", "no such buffer",
       [](CallSite& site) { site.kernel_of["sort"]->Set("arguments", "operand:14"); }},
      {"no such result", "no such buffer",
       [](CallSite& site) { site.kernel_of["sort"]->Set("arguments", "result:3"); }},
      {"odd argument", "cannot read 'i64:1'",
       [](CallSite& site) { site.kernel_of["sort"]->Set("arguments", "operand:0 i64:1"); }},
      {"odd number", "cannot read 'i32:1x'",
       [](CallSite& site) { site.kernel_of["sort"]->Set("arguments", "i32:1x"); }},
      {"zero grid", "sort.grid", [](CallSite& site) { site.kernel_of["sort"]->Set("grid", int64_t{0}); }},
      {"huge CTA", "sort.threads: got 2048, needs 1..1024",
       [](CallSite& site) { site.kernel_of["sort"]->Set("threads", int64_t{2048}); }},
      {"ragged clusters", "multiple of cluster",
       [](CallSite& site) { site.kernel_of["sort"]->Set("grid", int64_t{9}); }},
      {"no image", "sort.image", [](CallSite& site) { site.kernel_of["sort"]->Erase("image"); }},
      {"no sizes", "attribute kernels.sizes", [](CallSite& site) { site.sizes = site.kernel_of["sort"]; }},
      {"no top_k", "attribute kernels.sizes.top_k", [](CallSite& site) { site.sizes->Erase("top_k"); }},
      {"no size of a weight", "attribute kernels.weight_bytes.down.payload",
       [](CallSite& site) { site.weight_bytes->Erase("down.payload"); }},
      {"no precision", "attribute precision", [](CallSite& site) { site.attributes.Erase("precision"); }},
      {"odd activation", "attribute activation: got 'gelu', needs swiglu | geglu | relu2 | situ",
       [](CallSite& site) { site.attributes.Set("activation", "gelu"); }},
      {"many workspaces", "kernels.workspace_bytes: needs fewer than 16",
       [](CallSite& site) { site.kernels->SetSizes("workspace_bytes", std::vector<int64_t>(16)); }},
      {"no kernels", "attribute kernels: Unexpected attribute", [](CallSite& site) { site.kernels = nullptr; }},
  };
  for (const Case& one : cases) {
    CallSite site({});
    one.change(site);
    const std::string error = site.Run();
    ExpectContains(error, one.message, one.what);
    Expect(error.rfind("3: ", 0) == 0, std::string(one.what) + " is INVALID_ARGUMENT");
    ExpectEqual(Join(recorder->calls), "", std::string(one.what) + ": nothing is enqueued");
  }
}

std::string Refused(CallSite* site) {
  std::string error = site->Instantiate();
  return error.empty() ? "instantiated" : error;
}

void TestStaticRefusals() {
  // What no buffers can make right is refused when the call is instantiated, before there are any.
  CallSite ordered({T});
  ordered.attributes.Set("combine", "ordered");
  ExpectContains(Refused(&ordered), "kernels.adds: got 'gemm2'", "instantiating an ordered call that adds");
  CallSite argument({T});
  argument.kernel_of["gemm2"]->Set("arguments", "result:3");
  ExpectContains(Refused(&argument), "kernels.gemm2.arguments: no such buffer", "instantiating with a wrong argument");

  CallSite quantised({T});
  quantised.attributes.Set("precision", "w4a4");
  ExpectContains(Refused(&quantised), "none is given gate_up.input_scale", "w4a4 without the scale of x");
  quantised.kernel_of["gemm1"]->Set("arguments", "operand:7");
  ExpectContains(Refused(&quantised), "none is given down.input_scale", "w4a4 without the scale of the intermediate");
  quantised.kernel_of["gemm2"]->Set("arguments", "operand:12 result:0");
  ExpectEqual(quantised.Instantiate(), "", "w4a4 with both");
  CallSite dynamic({T});
  dynamic.attributes.Set("precision", "w4a4_dynamic");
  ExpectEqual(dynamic.Instantiate(), "", "w4a4_dynamic with neither");

  CallSite empty({0});
  ExpectEqual(empty.Run(), "", "without tokens no kernel is needed");
  empty.kernels->Set("adds", "gemm2");
  ExpectContains(Refused(&empty), "kernels.adds: got 'gemm2', needs ''", "without tokens nothing adds");
  CallSite idle({T});
  idle.sizes->Set("num_tokens", int64_t{0});
  ExpectContains(Refused(&idle), "got 'sort gemm1 gemm2', needs none where x has no rows", "launches without tokens");

  CallSite old({T});
  ExpectContains(old.Instantiate(JaxMoeFusedMoeCudaV1Instantiate),
                 "3: jax_moe: custom call jax_moe_fused_moe_v1: ", "a program of an earlier version");
  Expect(old.context.state == nullptr, "which leaves no state");
}

thread_local int64_t num_allocations = 0;
int64_t allocations_of_a_call = -1;

XLA_FFI_Error* CountAllocations(XLA_FFI_CallFrame* frame) {
  const int64_t before = num_allocations;
  XLA_FFI_Error* error = JaxMoeCuda(frame);
  allocations_of_a_call = num_allocations - before;
  return error;
}

void TestAllocations() {
  // The checks of a call that passes them build no text: they are a part of every eager call's host time.
  Driver quiet = MakeDriver();  // what it does for a call allocates nothing either
  quiet.cuMemsetD8Async = [](DevicePointer, unsigned char, size_t, Stream) -> Result { return kSuccess; };
  quiet.cuLaunchKernelEx = [](const LaunchConfig*, Function, void**, void**) -> Result { return kSuccess; };
  const char* reason = nullptr;
  const Driver* recording = GetDriver(&reason);
  SetDriverForTesting(&quiet);
  CallSite site({T, true, true});
  ExpectEqual(site.Run(), "", "a quiet call");
  ExpectEqual(site.Execute(CountAllocations), "", "a counted call");
  Expect(allocations_of_a_call == 0, "a call allocates " + std::to_string(allocations_of_a_call) + " times");
  SetDriverForTesting(recording);
}

void TestThreads() {
  // Two call sites on two devices from eight threads: nothing but counting can go wrong here, the rest is for tsan.
  CallSite first({}), second({T, true});
  Expect(first.Instantiate().empty() && second.Instantiate().empty(), "instantiating");
  const uintptr_t context = current_context;
  // The recorder's mutex would order what the handler must order itself: these calls do without it.
  Driver quiet = MakeDriver();
  quiet.cuCtxGetId = [](Context, unsigned long long* id) -> Result { return *id = 1000 + current_context, kSuccess; };
  const char* reason = nullptr;
  const Driver* recording = GetDriver(&reason);
  SetDriverForTesting(&quiet);
  std::vector<std::thread> threads;
  std::barrier start(8);
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      start.arrive_and_wait();
      current_context = context + i % 2;
      CallSite& site = i % 4 < 2 ? first : second;
      for (int run = 0; run < 20; ++run) {
        XLA_FFI_ExecutionContext own = site.context;
        Attributes attributes = site.attributes;  // its Frame() is per object
        std::string error = Call(JaxMoeCudaInitialize, XLA_FFI_ExecutionStage_INITIALIZE, &own, {}, {}, nullptr);
        if (error.empty()) {
          error = Call(JaxMoeCuda, XLA_FFI_ExecutionStage_EXECUTE, &own, site.operands, site.results, &attributes);
        }
        const std::lock_guard<std::mutex> lock(recorder->mutex);
        Expect(error.empty(), "a threaded call: " + error);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  SetDriverForTesting(recording);
  Expect(recorder->num_loads == 10,
         "each kernel loaded once on each device");  // sort, gemm1, gemm2, jax_moe_zero; combine
}

void TestTraits() {
  Expect(Metadata(JaxMoeCuda).traits == XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE, "capture is allowed");
  Expect(Metadata(JaxMoeCudaNoCapture).traits == 0, "the other target opts out of capture");
  CallSite site({});
  Expect(site.Run().empty() && site.Execute(JaxMoeCudaNoCapture).empty(), "both targets do the same");
}

void TestNoDriver() {
  SetDriverForTesting(nullptr);
  CallSite site({});
  ExpectEqual(site.Instantiate(), "", "a call can be instantiated without a driver");
  const char* reason = nullptr;
  if (GetDriver(&reason) == nullptr) {
    ExpectContains(site.Initialize(), "9: fused_moe: the CUDA driver cannot be opened", "no driver");
    ExpectContains(site.Execute(), "9: fused_moe: the CUDA driver cannot be opened", "no driver");
  }
}

}  // namespace
}  // namespace jax_moe::cuda::fake

void* operator new(size_t bytes) {
  ++jax_moe::cuda::fake::num_allocations;
  if (void* memory = std::malloc(bytes)) return memory;
  std::abort();
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

int main() {
  using namespace jax_moe::cuda::fake;
  static_cast<XLA_FFI_TypeId*>(JaxMoeCudaTypeId())->type_id = 1;  // as XLA sets it on registration
  const jax_moe::cuda::Driver driver = MakeDriver();
  jax_moe::cuda::SetDriverForTesting(&driver);
  TestProducts();
  TestParcels();
  for (void (*test)() : {TestEager, TestWhere, TestWhatTellsKernelsApart, TestOptions, TestCaptured, TestShortOutputs,
                         TestCounters, TestNoTokens, TestDriverFailures, TestLoading, TestRefusals, TestStaticRefusals,
                         TestAllocations, TestThreads, TestTraits, TestNoDriver}) {
    WithRecorder(test);
  }
  std::printf("%d failures\n", num_failures);
  return num_failures > 0;
}
