// Kernels that take the places of the op's in tests of the launch rule: what they compute shows the order they ran in.

extern "C" __global__ void nothing() {}

// Runs for at least so many clocks.
extern "C" __global__ void spin(int clocks) {
  const long long start = clock64();
  while (clock64() - start < clocks) {
  }
}

// out[i] += 1 from the end on, as GEMM2 adds: right only on zeros, and only once.
extern "C" __global__ void add_one(float* out, int size) {
  const long long step = 1ll * gridDim.x * blockDim.x;
  for (long long i = size - 1 - (1ll * blockIdx.x * blockDim.x + threadIdx.x); i >= 0; i -= step) out[i] += 1.0f;
}

// out[i] = 1, as the ordered combine writes.
extern "C" __global__ void write_one(float* out, int size) {
  const long long step = 1ll * gridDim.x * blockDim.x;
  for (long long i = 1ll * blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) out[i] = 1.0f;
}
