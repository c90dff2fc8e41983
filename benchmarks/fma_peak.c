// Fused multiply-adds a second that this core can do in fp32, with nothing else in the way; cpu_vs_jax.py compiles it
// with -O3 -march=native and runs it on every core at once.

#include <time.h>

#if defined(__AVX512F__)
enum { kBytes = 64, kChains = 20 };  // enough independent chains to cover the latency, few enough for the registers
#elif defined(__AVX2__)
enum { kBytes = 32, kChains = 12 };
#else
enum { kBytes = 16, kChains = 12 };
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

static double Now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Floating-point operations a second, measured for `steps` rounds of the chains.
double fma_peak(long steps, float factor, float* sink) {
  Vector chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = (Vector){} + (float)i;
  const Vector b = (Vector){} + factor, c = (Vector){} + (1.0f - factor);
  const double start = Now();
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 20
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * b + c;
  }
  const double seconds = Now() - start;
  Vector total = (Vector){};
  for (int i = 0; i < kChains; ++i) total += chain[i];
  *sink = total[0];  // or the compiler would find that nobody needs the chains
  return 2.0 * steps * kChains * (kBytes / sizeof(float)) / seconds;
}
