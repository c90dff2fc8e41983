// One call of the CUDA handler as XLA would make it, and what the library shows.

#ifndef JAX_MOE_TESTS_CUDA_CALL_SITE_H_
#define JAX_MOE_TESTS_CUDA_CALL_SITE_H_

#include <sstream>

#include "fake.h"

extern "C" {
XLA_FFI_Error* JaxMoeFusedMoeCudaInstantiate(XLA_FFI_CallFrame*);
XLA_FFI_Error* JaxMoeFusedMoeCudaV1Instantiate(XLA_FFI_CallFrame*);
XLA_FFI_Error* JaxMoeRaggedDotCudaInstantiate(XLA_FFI_CallFrame*);
XLA_FFI_Error* JaxMoeParcelsCudaInstantiate(XLA_FFI_CallFrame*);
XLA_FFI_Error* JaxMoeCudaInitialize(XLA_FFI_CallFrame*);
XLA_FFI_Error* JaxMoeCuda(XLA_FFI_CallFrame*);
XLA_FFI_Error* JaxMoeCudaNoCapture(XLA_FFI_CallFrame*);
void JaxMoeCudaCounters(int64_t counters[3]);
void* JaxMoeCudaTypeId();
const void* JaxMoeCudaTypeInfo();
}

namespace jax_moe::cuda::fake {

constexpr int64_t T = 4, K = 2, L = 3, P = 2, H = 32, I = 16;

struct SiteOptions {
  int64_t tokens = T;
  bool ordered = false;
  bool x_rows = false;
  bool bf16 = true;
  bool parcels = false;  // of w4a4, in the place of x
};

// Of a token with K routes and H values: 8 * K + H / 2 + H / 16, and zeros to a multiple of 8.
constexpr int64_t kParcelBytes = 40;

// A call as XLA would make it: attributes, operands at addresses 0x1000, 0x2000, ..., results at 0x100000, ...
struct Site {
  explicit Site(XLA_FFI_Handler* handler) : instantiate(handler) {
    context.stream = reinterpret_cast<void*>(uintptr_t{0x5eed});
  }

  ~Site() {
    if (context.state == nullptr) return;
    static_cast<const XLA_FFI_TypeInfo*>(JaxMoeCudaTypeInfo())->deleter(context.state);
  }

  // The attributes, made anew with what a test has changed.
  Attributes* Changed() {
    if (kernels == nullptr) return &attributes;
    for (auto& [name, kernel] : kernel_of) kernels->Set(name, kernel);
    kernels->Set("sizes", sizes).Set("weight_bytes", weight_bytes);
    attributes.Set("kernels", kernels);
    return &attributes;
  }

  std::string Instantiate(XLA_FFI_Handler* handler = nullptr) {
    return Call(handler == nullptr ? instantiate : handler, XLA_FFI_ExecutionStage_INSTANTIATE, &context, {}, {},
                Changed());
  }
  std::string Initialize() {
    return Call(JaxMoeCudaInitialize, XLA_FFI_ExecutionStage_INITIALIZE, &context, operands, results, &attributes);
  }
  std::string Execute(XLA_FFI_Handler* handler = JaxMoeCuda) {
    return Call(handler, XLA_FFI_ExecutionStage_EXECUTE, &context, operands, results, &attributes);
  }
  std::string Run() {
    std::string error = Instantiate();
    if (error.empty()) error = Initialize();
    return error.empty() ? Execute() : error;
  }

  // One launch of the list.
  void AddKernel(const std::string& name, const std::string& arguments) {
    auto kernel = std::make_shared<Attributes>();
    kernel->Set("image", "image of " + name)
        .Set("name", name + "_kernel")
        .Set("grid", int64_t{name == "sort" ? 8 : 132})
        .Set("threads", int64_t{256})
        .Set("cluster", int64_t{name == "sort" ? 8 : 1})
        .Set("shared", int64_t{100000})
        .Set("overlap", int64_t{name == "gemm1" || name == "product"})
        .Set("arguments", arguments);
    kernel_of[name] = kernel;
  }

  XLA_FFI_Handler* const instantiate;
  Attributes attributes;
  std::shared_ptr<Attributes> kernels = std::make_shared<Attributes>(), sizes = std::make_shared<Attributes>(),
                              weight_bytes = std::make_shared<Attributes>();
  std::map<std::string, std::shared_ptr<Attributes>> kernel_of;
  std::vector<Buffer> operands, results;
  XLA_FFI_ExecutionContext context;
};

// A call of fused_moe.
struct CallSite : Site {
  explicit CallSite(const SiteOptions& options) : Site(JaxMoeFusedMoeCudaInstantiate) {
    const int64_t t = options.tokens;
    operands = {{XLA_FFI_DataType_BF16, {t, H}, 0x1000},
                {XLA_FFI_DataType_S32, {t, K}, 0x2000},
                {XLA_FFI_DataType_F32, {t, K}, 0x3000},
                {XLA_FFI_DataType_S32, {}, 0x4000},
                {XLA_FFI_DataType_U8, {L, 1, 4608}, 0x5000},
                {XLA_FFI_DataType_F8E4M3FN, {L, 0}, 0x6000},
                {XLA_FFI_DataType_F32, {L, P}, 0x7000},
                {XLA_FFI_DataType_F32, {0}, 0},
                {XLA_FFI_DataType_F32, {0}, 0},
                {XLA_FFI_DataType_U8, {L, 2, 4608}, 0xa000},
                {XLA_FFI_DataType_F8E4M3FN, {L, 0}, 0xb000},
                {XLA_FFI_DataType_F32, {L}, 0xc000},
                {XLA_FFI_DataType_F32, {0}, 0},
                {XLA_FFI_DataType_F32, {0}, 0}};
    results = {{options.bf16 ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F32, {t, H}, 0x100000},
               {XLA_FFI_DataType_S32, {L + 1}, 0x200000},
               {XLA_FFI_DataType_BF16, {t * K, I}, 0x300000}};
    sizes->Set("num_tokens", t)
        .Set("top_k", K)
        .Set("local_experts", L)
        .Set("num_parts", P)
        .Set("hidden_size", H)
        .Set("intermediate_size", I)
        .Set("out_bytes", int64_t{options.bf16 ? 2 : 4});
    weight_bytes->Set("gate_up.payload", L * 4608)
        .Set("gate_up.block_scale", int64_t{0})
        .Set("down.payload", L * 2 * 4608)
        .Set("down.block_scale", int64_t{0});
    std::string launches = t == 0 ? "" : options.x_rows ? "sort x_rows gemm1 gemm2" : "sort gemm1 gemm2";
    if (options.ordered && t != 0) launches += " combine";
    kernels->SetSizes("workspace_bytes", {(L + 1) * 4, t * K * I * 2})
        .Set("launches", launches)
        .Set("adds", options.ordered || t == 0 ? "" : "gemm2");
    std::istringstream names(launches);
    for (std::string name; names >> name;) {
      const bool last = name == (options.ordered ? "combine" : "gemm2");
      AddKernel(name, std::string("operand:0 result:1 null i32:-7") + (last ? " result:0" : ""));
    }
    attributes.Set("precision", "w4a16")
        .Set("combine", options.ordered ? "ordered" : "atomic")
        .Set("weight_on", "output")
        .Set("activation", "swiglu")
        .Set("alpha", 1.0f)
        .Set("beta", 0.0f)
        .Set("limit", 1e30f);
    if (options.parcels) {
      operands[0] = {XLA_FFI_DataType_U8, {t, kParcelBytes}, 0x1000};
      operands[7] = {XLA_FFI_DataType_F32, {}, 0x8000};
      operands[12] = {XLA_FFI_DataType_F32, {L}, 0xd000};
      attributes.Set("precision", "w4a4_parcels");
      if (t != 0) AddKernel("gemm1", "operand:7 operand:12 result:1 i32:-7");
    }
  }
};

struct ProductOptions {
  int64_t rows = T;
  bool quantised = false;
  bool bf16 = true;
};

// A call of ragged_dot: 5 groups have a size, 3 a matrix.
struct ProductSite : Site {
  explicit ProductSite(const ProductOptions& options) : Site(JaxMoeRaggedDotCudaInstantiate) {
    constexpr int64_t kGroups = 5, kLocal = 3, kIn = 32, kOut = 48;
    const int64_t t = options.rows;
    operands = {{XLA_FFI_DataType_BF16, {t, kIn}, 0x1000},
                {XLA_FFI_DataType_S32, {kGroups}, 0x2000},
                {XLA_FFI_DataType_S32, {}, 0x3000},
                {XLA_FFI_DataType_U8, {kLocal, 1, 4608}, 0x4000},
                {XLA_FFI_DataType_F8E4M3FN, {kLocal, 0}, 0x5000},
                {XLA_FFI_DataType_F32, {kLocal}, 0x6000},
                {XLA_FFI_DataType_F32, {options.quantised ? kLocal : 0}, 0x7000},
                {XLA_FFI_DataType_F32, {0}, 0}};
    results = {{options.bf16 ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F32, {t, kOut}, 0x100000},
               {XLA_FFI_DataType_S32, {kLocal + 3}, 0x200000}};
    sizes->Set("num_rows", t)
        .Set("num_groups", kGroups)
        .Set("local_groups", kLocal)
        .Set("in_features", kIn)
        .Set("out_features", kOut)
        .Set("out_bytes", int64_t{options.bf16 ? 2 : 4});
    weight_bytes->Set("weights.payload", kLocal * 4608).Set("weights.block_scale", int64_t{0});
    const std::string launches = t == 0 ? "" : options.quantised ? "groups x_rows product" : "groups product";
    kernels->SetSizes("workspace_bytes", {(kLocal + 3) * 4}).Set("launches", launches).Set("adds", "");
    std::istringstream names(launches);
    for (std::string name; names >> name;) {
      AddKernel(name, name == "x_rows" ? "operand:0 operand:6 result:1 null" : "operand:0 result:0 result:1 i32:-7");
    }
    attributes.Set("precision", options.quantised ? "w4a4" : "w4a16");
  }
};

// A call that makes parcels.
struct ParcelsSite : Site {
  explicit ParcelsSite(int64_t tokens = T) : Site(JaxMoeParcelsCudaInstantiate) {
    operands = {{XLA_FFI_DataType_BF16, {tokens, H}, 0x1000},
                {XLA_FFI_DataType_S32, {tokens, K}, 0x2000},
                {XLA_FFI_DataType_F32, {tokens, K}, 0x3000},
                {XLA_FFI_DataType_F32, {}, 0x4000}};
    results = {{XLA_FFI_DataType_U8, {tokens, kParcelBytes}, 0x100000}};
    sizes->Set("num_tokens", tokens).Set("top_k", K).Set("hidden_size", H);
    kernels->SetSizes("workspace_bytes", {}).Set("launches", tokens == 0 ? "" : "parcels").Set("adds", "");
    if (tokens != 0) AddKernel("parcels", "operand:0 operand:3 result:0 i32:-7");
  }
};

}  // namespace jax_moe::cuda::fake

#endif  // JAX_MOE_TESTS_CUDA_CALL_SITE_H_
