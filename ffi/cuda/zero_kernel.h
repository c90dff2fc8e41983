// What zeroes a short output while capturing. In a graph, a memset node of at most 4096 bytes costs 5 to 8 us, a longer
// one or a kernel 0.3 (benchmarks/notes-h200.md, Zeroing): such a memset is not run as a kernel is. Hence one, as PTX,
// which the driver compiles for any GPU when a program is loaded.

#ifndef JAX_MOE_CUDA_ZERO_KERNEL_H_
#define JAX_MOE_CUDA_ZERO_KERNEL_H_

#include <cstddef>

namespace jax_moe::cuda {

inline constexpr std::size_t kShortBytes = 4096;  // of an output that the kernel zeroes; a multiple of 16
inline constexpr unsigned kZeroThreads = 256;     // in one CTA, 16 bytes each
static_assert(kShortBytes == 16 * kZeroThreads);

inline constexpr char kZeroKernel[] = "jax_moe_zero";
inline constexpr char kZeroPtx[] = R"ptx(
.version 7.0
.target sm_70
.address_size 64

.visible .entry jax_moe_zero(.param .u64 output, .param .u32 bytes) {
  .reg .pred %p<2>;
  .reg .b32 %r<5>;
  .reg .b64 %rd<4>;

  ld.param.u64 %rd1, [output];
  ld.param.u32 %r1, [bytes];
  mov.u32 %r2, %tid.x;
  shl.b32 %r3, %r2, 4;
  setp.ge.u32 %p1, %r3, %r1;
  @%p1 bra DONE;
  cvt.u64.u32 %rd2, %r3;
  add.s64 %rd3, %rd1, %rd2;
  mov.b32 %r4, 0;
  st.global.v4.b32 [%rd3], {%r4, %r4, %r4, %r4};
DONE:
  ret;
}
)ptx";

}  // namespace jax_moe::cuda

#endif  // JAX_MOE_CUDA_ZERO_KERNEL_H_
