// What the tests of the CUDA handler say of what they saw. Each expectation that does not hold is a line of output.

#ifndef JAX_MOE_TESTS_CUDA_EXPECT_H_
#define JAX_MOE_TESTS_CUDA_EXPECT_H_

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "fake.h"

namespace jax_moe::cuda::fake {

inline int num_failures = 0;

inline void Expect(bool holds, const std::string& what) {
  if (holds) return;
  ++num_failures;
  std::printf("FAILED %s\n", what.c_str());
}

inline void ExpectEqual(const std::string& got, const std::string& want, const std::string& what) {
  Expect(got == want, what + "\n  got  " + got + "\n  want " + want);
}

inline void ExpectContains(const std::string& got, const std::string& want, const std::string& what) {
  Expect(got.find(want) != std::string::npos, what + "\n  got  " + got + "\n  want " + want);
}

inline std::string Join(const std::vector<std::string>& lines) {
  std::string joined;
  for (const std::string& line : lines) joined += (joined.empty() ? "" : "; ") + line;
  return joined;
}

// Each test gets a recorder of its own, and contexts that no other test has loaded kernels into.
inline void WithRecorder(const std::function<void()>& test) {
  static uintptr_t fresh_context = 0;
  Recorder fresh;
  for (const char* name : {"sort", "x_rows", "gemm1", "gemm2", "combine", "groups", "product", "parcels"}) {
    fresh.parameters_of[std::string(name) + "_kernel"] = 4;
  }
  recorder = &fresh;
  current_context = fresh_context += 10;
  test();
  recorder = nullptr;
}

inline void CaptureAfterNode(uintptr_t node) {
  recorder->capture_status = kCaptureActive;
  recorder->capture_dependencies = {reinterpret_cast<GraphNode>(node)};
}

// Those of ragged_dot (product_test.cc).
void TestProducts();

// Those of parcels (parcels_test.cc).
void TestParcels();

}  // namespace jax_moe::cuda::fake

#endif  // JAX_MOE_TESTS_CUDA_EXPECT_H_
