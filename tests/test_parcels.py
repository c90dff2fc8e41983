"""Tokens as they travel in w4a4: what is in a parcel, the kernels that make and read parcels, and the custom call."""

import functools
import importlib.util
import shutil

import emulated_call
import emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_kernels
import statement

from jax_moe import parcels
from jax_moe.kernels import specs
from jax_moe.routing import Routing

no_compiler = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
no_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

SIZES = [(1, 1, 16), (3, 5, 144), (7, 8, 272), (40, 3, 512)]  # T, K, H: 7, 7, 7 and 0 bytes of zeros
SCALE = np.float32(1 / 448)


def arrays(tokens, top_k, hidden):
    rng = np.random.default_rng(hidden)
    x = small_kernels.hard_values(rng, (tokens, hidden))
    ids = rng.integers(-(2**31), 2**31, (tokens, top_k)).astype(np.int32)
    weights = rng.integers(0, 2**32, (tokens, top_k), np.uint32).view(np.float32)  # any bits, those of NaN too
    return x, ids, weights


def expected(x, ids, weights):
    """Parcels by the definitions, and which bytes NaN leaves open: the codes of a block with one."""
    codes, scales = small_kernels.expected_nvfp4(x, SCALE)
    nan = np.isnan(np.asarray(x, np.float32)).reshape(len(x), -1, 16).any(-1)
    scales = np.where(nan, 0x7F, scales.view(np.uint8))
    routing = [np.ascontiguousarray(part).view(np.uint8) for part in (ids, weights)]
    found = np.concatenate([*routing, codes[:, 0::2] | codes[:, 1::2] << 4, scales], axis=1)
    found = np.pad(found, ((0, 0), (0, -found.shape[1] % 8)))
    is_open = np.zeros(found.shape, bool)
    first = 8 * ids.shape[1]
    is_open[:, first : first + codes.shape[1] // 2] = nan.repeat(8, axis=1)
    return found, is_open


def same(got, x, ids, weights):
    want, is_open = expected(x, ids, weights)
    assert got.shape == want.shape
    assert got.shape[1] == parcels.num_bytes(ids.shape[1], x.shape[1])
    np.testing.assert_array_equal(np.where(is_open, 0, got), np.where(is_open, 0, want))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_parcels_on_a_cpu(sizes):
    x, ids, weights = arrays(*sizes)
    x = np.where(np.abs(np.asarray(x, np.float32)) < 2.0**-126, 0, x).astype(x.dtype)  # as XLA's CPU backend does
    make = jax.jit(functools.partial(parcels.make, layout="wgmma_v1", command_buffer=True))
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
    spec = specs.ParcelRowsSpec()
    made, _ = expected(x, ids, weights)
    out = memory.poisoned((tokens, hidden), jnp.bfloat16, strict=True)
    given = [memory.array(made), out, tokens, top_k, hidden // 16]
    emulator.run([launch(spec, spec.grid(tokens, hidden), given, "sm_90a")], memory)
    want = np.asarray(jax.jit(parcels.x_of, static_argnums=(1, 2))(made, top_k, hidden))
    got = out.read()
    is_nan = np.isnan(want.astype(np.float32))
    assert np.isnan(got.astype(np.float32))[is_nan].all()
    np.testing.assert_array_equal(got.view(np.uint16)[~is_nan], want.view(np.uint16)[~is_nan])
