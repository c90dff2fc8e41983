// Kernels that take the places of the op's in tests of the launch rule: what they compute shows the order they ran in.

extern "C" __global__ void nothing() {}

// Runs for at least so many clocks.
extern "C" __global__ void spin(int clocks) {
  const long long start = clock64();
  while (clock64() - start < clocks) {
  }
}

// out[i] += 1, as GEMM2 adds: right only on zeros, and only once.
extern "C" __global__ void add_one(float* out, int size) {
  for (long long i = blockIdx.x * 1024ll + threadIdx.x; i < size; i += gridDim.x * 1024ll) atomicAdd(out + i, 1.0f);
}

// out[i] = 1, as the ordered combine writes.
extern "C" __global__ void write_one(float* out, int size) {
  for (long long i = blockIdx.x * 1024ll + threadIdx.x; i < size; i += gridDim.x * 1024ll) out[i] = 1.0f;
}
