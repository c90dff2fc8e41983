"""The smallest complete FFI op: C++ code as a JAX function that works under jit, vmap and grad.

Run it:  python examples/minimal_ffi/minimal_ffi.py        (needs g++ and jax, not jax_moe; about 5 s, half of it g++)

Read ``discounted_sum.cc`` first, then this from top to bottom: build, register, call, derivatives, batches, errors.
It prints

    jit  max |difference| 1.4e-06
    vmap max |difference| 2.9e-06
    grad max |difference| 3.1e-05
    MLIR custom_call @minimal_ffi_discounted_sum_v1(%arg0, %arg1) {backend_config = "",
         mhlo.backend_config = {decay = 0.899999976 : f32}
    C++  INVALID_ARGUMENT: discounted_sum: start has 5 elements, it needs one for each of x's 6 rows

What a library that is more than an example adds, and where this repository does it:

- A build that users need not see: ``pyproject.toml`` and ``ffi/CMakeLists.txt`` compile the library into the wheel,
  with the headers of the *oldest* jaxlib supported: a runtime refuses a library built on newer headers than its own.
- Checks at trace time, with messages that name the argument (``jax_moe/check.py``), and all of them once more in C++
  for callers who bypass Python (``ffi/decode.h``).
- A version in the target's name, because exported programs outlive libraries; workspaces as extra results, because
  a handler must not allocate what grows with the model; refusals where XLA would do the wrong thing silently, such
  as gathering sharded weights (``jax_moe/primitive.py``, ``jax_moe/problem.py``).
- Threads: XLA's own pool, through the execution context (``ffi/cpu/parallel_for.h``).
- A GPU: a handler that takes the stream, registered for platform "CUDA" (``../minimal_ffi_gpu``, then ``ffi/cuda/``).
"""

import ctypes
import functools
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np

# --- 1. Build: one command. -isystem keeps our warning flags out of XLA's headers. ------------------------------------

here = pathlib.Path(__file__).parent
source, library = here / "discounted_sum.cc", here / "libdiscounted_sum.so"


def build() -> None:
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return
    flags = ["-std=c++17", "-O2", "-Wall", "-shared", "-fPIC", "-isystem", jax.ffi.include_dir()]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)


# --- 2. Register: a name, the address of the handler, a platform. Before the first call is compiled. ------------------

TARGET = "minimal_ffi_discounted_sum_v1"


def register() -> None:
    handler = ctypes.CDLL(str(library)).DiscountedSumCpu
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")


# --- 3. Call. ffi_call makes a JAX function of the target: result types first, then operands, then attributes. --------


def _ffi_discounted_sum(x: jax.Array, start: jax.Array, decay: float) -> jax.Array:
    call = jax.ffi.ffi_call(
        TARGET,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        # 4. Under vmap, JAX gives every operand the batch axis in front, repeated where it had none, and makes *one*
        # call. That is right for this op because its leading axes are rows. Without this argument vmap is an error,
        # which is the better default: "sequential" would be right for any op, and a loop that nobody asked for.
        vmap_method="broadcast_all",
    )
    # An attribute's type is what the C++ side says: Attr<float> is float32, and a Python float would arrive as double.
    return call(x, start, decay=np.float32(decay))


# --- 5. Derivatives. XLA cannot look into the call, so without a rule grad is an error. The rule of a linear op is --
# its transpose: a running sum transposed is the running sum from the other end, so the same call does both.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def discounted_sum(x: jax.Array, start: jax.Array, decay: float) -> jax.Array:
    """``y[..., t] = x[..., t] + decay * y[..., t - 1]`` with ``y[..., -1] = start``.

    Args:
      x: float32 ``[..., T]``.
      start: float32 ``[...]``.
      decay: a Python number; the derivative with respect to it is not defined.

    Raises:
      TypeError, ValueError: an argument is not of that dtype or shape; raised while tracing.
    """
    for name, array in (("x", x), ("start", start)):
        if array.dtype != jnp.float32:
            raise TypeError(f"{name}: got dtype {array.dtype}, needs float32")
    if x.ndim == 0 or start.shape != x.shape[:-1]:
        raise ValueError(f"x, start: got shapes {x.shape} and {start.shape}, need [..., T] and [...]")
    return _ffi_discounted_sum(x, start, decay)


def _forward(x, start, decay):
    return discounted_sum(x, start, decay), None  # linear: the backward pass needs nothing from this one


def _backward(decay, _, y_bar):
    x_bar = jnp.flip(discounted_sum(jnp.flip(y_bar, -1), jnp.zeros(y_bar.shape[:-1], y_bar.dtype), decay), -1)
    return x_bar, decay * x_bar[..., 0]


discounted_sum.defvjp(_forward, _backward)


def reference(x: jax.Array, start: jax.Array, decay: float) -> jax.Array:
    """The same in plain JAX: what the op is tested against."""

    def step(total, column):
        total = column + decay * total
        return total, total

    return jnp.moveaxis(jax.lax.scan(step, start, jnp.moveaxis(x, -1, 0))[1], 0, -1)


def max_difference(a, b) -> str:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return f"max |difference| {max(float(jnp.max(jnp.abs(p - q))) for p, q in pairs):.1e}"


def main() -> None:
    build()
    register()
    x = jax.random.normal(jax.random.key(0), (6, 1000))
    start = jnp.arange(6.0)

    op = jax.jit(discounted_sum, static_argnums=2)
    print("jit ", max_difference(op(x, start, 0.9), reference(x, start, 0.9)))

    batched = jax.jit(jax.vmap(discounted_sum, in_axes=(0, None, None)), static_argnums=2)
    xs = jnp.stack([x, 2 * x])
    expected = jnp.stack([reference(x, start, 0.9), reference(2 * x, start, 0.9)])
    print("vmap", max_difference(batched(xs, start, 0.9), expected))

    def norm(f):
        return jax.jit(jax.grad(lambda x, start: jnp.sum(f(x, start, 0.9) ** 2), argnums=(0, 1)))

    print("grad", max_difference(norm(discounted_sum)(x, start), norm(reference)(x, start)))

    print("MLIR", re.findall(rf"custom_call @{TARGET}.*?}}", op.lower(x, start, 0.9).as_text())[0])

    # The checks in C++ answer whoever gets past the ones in Python: here, by calling the target with a wrong shape.
    try:
        jax.block_until_ready(_ffi_discounted_sum(x, start[:5], 0.9))
    except jax.errors.JaxRuntimeError as error:
        print("C++ ", str(error).splitlines()[0])


if __name__ == "__main__":
    main()
