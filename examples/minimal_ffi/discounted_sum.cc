// The smallest complete XLA FFI op: the discounted running sum along the last axis,
//
//   y[r, t] = x[r, t] + decay * y[r, t - 1],     y[r, -1] = start[r]
//
// (the returns of reinforcement learning, read backwards; a leaky integrator, read forwards). It is a recurrence: a
// plain loop here, awkward in jnp. It has one of everything an FFI op can have: buffers, a result, an attribute,
// checks. minimal_ffi.py beside this file builds it, registers it and calls it.

#include <cstddef>
#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"  // header-only, and part of jaxlib: jax.ffi.include_dir() says where

namespace ffi = xla::ffi;

// 1. The handler: what runs each time the compiled program reaches the call. Its parameters are the ones that the
// binding below lists, in the same order. `ffi::F32` fixes the dtype: a buffer of another one never gets here. The
// rank is left open, so that leading axes are simply more rows, which is what makes the vmap rule in Python a
// one-liner.
static ffi::Error DiscountedSum(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> start, float decay,
                                ffi::ResultBuffer<ffi::F32> y) {
  // 2. Checks. Whatever is used as an index or a loop bound below is checked here: the call may come from a program
  // that somebody wrote by hand or exported years ago, and reading past a buffer is no way to tell them. A returned
  // Error becomes a Python exception; never throw or abort.
  const auto shape = x.dimensions();  // a span of int64, row-major
  if (shape.size() == 0) {
    return ffi::Error::InvalidArgument("discounted_sum: x is a scalar, it needs at least one axis to sum along");
  }
  const int64_t length = shape.back();
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
  if (static_cast<int64_t>(start.element_count()) != rows) {
    return ffi::Error::InvalidArgument("discounted_sum: start has " + std::to_string(start.element_count()) +
                                       " elements, it needs one for each of x's " + std::to_string(rows) + " rows");
  }
  if (y->element_count() != x.element_count()) {
    return ffi::Error::InvalidArgument("discounted_sum: the result must have the shape of x");
  }

  // 3. The work. XLA owns all three buffers; the result's holds whatever was there before, so every element is written.
  const float* in = x.typed_data();
  float* out = y->typed_data();
  for (int64_t row = 0; row < rows; ++row) {
    float sum = start.typed_data()[row];
    for (int64_t t = 0; t < length; ++t) {
      sum = in[row * length + t] + decay * sum;
      out[row * length + t] = sum;
    }
  }
  return ffi::Error::Success();
}

// 4. The symbol that Python registers. The binding checks the number and dtypes of the buffers, and the name and type
// of each attribute, before every call to the handler. A C symbol, because Python looks it up by name in the library.
XLA_FFI_DEFINE_HANDLER_SYMBOL(DiscountedSumCpu, DiscountedSum,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x      [..., T]
                                  .Arg<ffi::Buffer<ffi::F32>>()  // start  [...]
                                  .Attr<float>("decay")          // static: part of the program, not an operand
                                  .Ret<ffi::Buffer<ffi::F32>>()  // y      [..., T]
);
