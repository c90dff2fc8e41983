"""Tokens and their parcels, by the definitions in plain NumPy."""

import numpy as np
import small_kernels

from jax_moe import parcels

SIZES = [(1, 1, 16), (3, 5, 176), (7, 8, 272), (40, 3, 512)]  # T, K, H: 7, 5, 7 and 0 bytes of zeros
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
