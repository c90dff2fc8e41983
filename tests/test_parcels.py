"""Tokens as they travel in w4a4: what is in a parcel, the kernels that make and read parcels, and the custom call."""

import functools
import importlib.util
import shutil

import emulated_call
import emulator
import jax
import jax.numpy as jnp
import numpy as np
from parcel_cases import arrays, expected, same, SCALE, SIZES
import pytest
import statement

from jax_moe import parcels, parcels_primitive
from jax_moe.kernels import specs
from jax_moe.routing import Routing

no_compiler = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"
)
no_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_parcels_on_a_cpu(sizes):
    x, ids, weights = arrays(*sizes)
    x = np.where(np.abs(np.asarray(x, np.float32)) < 2.0**-126, 0, x).astype(x.dtype)  # as XLA's CPU backend does
    make = jax.jit(functools.partial(parcels_primitive.make, layout="wgmma_v1", command_buffer=True))
    got = make(jnp.asarray(x), Routing(jnp.asarray(ids), jnp.asarray(weights)), jnp.float32(SCALE))
    same(np.asarray(got), x, ids, weights)
    opened = parcels.routing_of(got, sizes[1])
    np.testing.assert_array_equal(opened.expert_ids, ids)
    np.testing.assert_array_equal(np.asarray(opened.weights).view(np.int32), weights.view(np.int32))
    flat = np.asarray(x, np.float32)
    want = statement.dequantize(*statement.quantize(flat, SCALE))
    np.testing.assert_array_equal(np.asarray(parcels.x_of(got, *sizes[1:]), np.float32), want)


def launch(spec, grid, given, target):
    kernel, shared_bytes = emulated_call.compiled(spec, target)
    return emulator.Launch(kernel, grid, given, spec.threads, spec.cluster, shared_bytes, spec.overlap)


def read(made: np.ndarray, top_k: int, hidden: int) -> None:
    """Runs the pass over x of such parcels, and compares what it makes of them with the definition."""
    memory, tokens = emulator.Memory(), len(made)
    spec = specs.ParcelRowsSpec()
    out = memory.poisoned((tokens, hidden), jnp.bfloat16, strict=True)
    given = [memory.array(made), out, tokens, top_k, hidden // 16]
    emulator.run([launch(spec, spec.grid(tokens, hidden), given, "sm_90a")], memory)
    want = np.asarray(jax.jit(parcels.x_of, static_argnums=(1, 2))(made, top_k, hidden))
    got = out.read()
    is_nan = np.isnan(want.astype(np.float32))
    assert np.isnan(got.astype(np.float32))[is_nan].all()
    np.testing.assert_array_equal(got.view(np.uint16)[~is_nan], want.view(np.uint16)[~is_nan])


@no_compiler
@no_emulator
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ["made", "read"])
def test_kernels(name, sizes):
    tokens, top_k, hidden = sizes
    x, ids, weights = arrays(*sizes)
    memory = emulator.Memory()
    if name == "made":
        spec = specs.ParcelsSpec()
        out = memory.poisoned((tokens, parcels.num_bytes(top_k, hidden)), np.uint8, strict=True)
        given = [*map(memory.array, (np.asarray(x), ids, weights, np.float32([SCALE]))), out]
        grid = -(-spec.num_threads(tokens, top_k, hidden // 16) // spec.threads)
        emulator.run([launch(spec, grid, [*given, tokens, top_k, hidden // 16], "sm_90a")], memory)
        same(out.read(), x, ids, weights)
        return
    made, _ = expected(x, ids, weights)
    read(made, top_k, hidden)


@no_compiler
@no_emulator
def test_every_code_under_every_scale():
    top_k, hidden = 1, 16 * 256
    routing, codes = np.zeros(8 * top_k, np.uint8), np.resize(np.arange(0x10, 0x100, 0x22, np.uint8), hidden // 2)
    made = np.concatenate([routing, codes, np.arange(256, dtype=np.uint8)])[None]
    assert made.shape == (1, parcels.num_bytes(top_k, hidden))
    read(made, top_k, hidden)
