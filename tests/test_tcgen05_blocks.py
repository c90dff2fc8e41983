"""The blocks for ``tcgen05.mma``, against a statement in plain NumPy of where each code and each scale lies.

Written from the PTX ISA and the worked kernels, without the index formulas of ``device/weight_block.py``; what these
say must be the same. tests/test_prepare.py has what goes for every layout.
"""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_prepare

import jax_moe
from jax_moe import nvfp4
from jax_moe.kernels.sm100.device import weight_block

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def lane_row(lane, gated):
    """``(part, row)`` of a block's lane: neighbouring rows meet in one thread, which gets lanes g, g + 8, ..."""
    warp, half, upper, group = lane // 32, lane // 16 % 2, lane // 8 % 2, lane % 8
    return (upper, 16 * warp + 2 * group + half) if gated else (0, 32 * warp + 4 * group + 2 * half + upper)


def read_fp4(block):
    """A block of 18432 bytes as codes [128 lanes, 256] and bits of scales [128, 16]."""
    codes, scales = np.empty((128, 256), int), np.empty((128, 16), int)
    for row in range(128):
        for k in range(256):
            chunk = k // 32 ^ row % 8
            byte = block[128 * row + 16 * chunk + k % 32 // 2]
            codes[row, k] = byte >> 4 if k % 2 else byte & 15
        for j in range(16):
            scales[row, j] = block[16384 + 512 * (j // 4) + 16 * (row % 32) + 4 * (row // 32) + j % 4]
    return codes, scales


def read_bf16(block):
    """A block of 4608 bytes as what a kernel makes of it: weights [128 lanes, 64]."""
    words, scale_words = block[:4096].view("<u4").reshape(2, 128, 4), block[4096:].view("<u4")
    weights = np.empty((128, 64))
    for lane in range(128):
        scales = [scale_words[lane], test_prepare.rotate_right(scale_words[lane], 8)]
        scales = [np.uint32(word & 0x0FF00FF0 | 0x70007000) >> 16 * i & 0xFFFF for word in scales for i in range(2)]
        for i in range(8):
            word = words[i // 4, lane, i % 4]
            spread = np.uint32(int(word & 0x001B001B) * 4228 & 0xFFFFFFFF)
            rotated = [word, test_prepare.rotate_right(word, 3), test_prepare.rotate_right(word, 6), spread]
            pairs = np.array([pair & np.uint32(0x81C081C0) for pair in rotated])
            scale = np.uint32(scales[i // 2] * 0x10001)
            weights[lane, 8 * i : 8 * i + 8] = test_prepare.multiply_bf16x2(pairs, scale).reshape(8)
    return weights * 2.0**7


def weights_of(layout, payload):
    """Dequantised blocks, float64 ``[row_blocks, k_blocks, 128 lanes, block_k]``."""

    def read(block):
        if layout == "tcgen05_bf16_v1":
            return read_bf16(block)
        codes, scales = read_fp4(block)
        values = scales.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(float)
        return E2M1[codes] * values.repeat(16, axis=1)

    return np.stack([np.stack([read(block) for block in row]) for row in np.asarray(payload)])


@pytest.mark.parametrize("sizes", [test_prepare.GATED, test_prepare.UNGATED, (1, 16, 272)], ids=str)
@pytest.mark.parametrize("layout", ["tcgen05_bf16_v1", "tcgen05_fp4_v1"])
def test_every_weight_is_where_the_kernels_look(layout, sizes):
    parts, intermediate, hidden = sizes
    experts = test_prepare.random_experts(np.random.default_rng(0), 1, parts, intermediate, hidden)
    scales = np.asarray(experts.down.block_scale).view(np.uint8).copy()
    scales[0, 3, 0], scales[0, 5, 0], scales[0, 7, 0] = 0x80 | 0x3A, 0x80, 0
    scales = jnp.asarray(scales.view(ml_dtypes.float8_e4m3fn))
    experts = dataclasses.replace(experts, down=dataclasses.replace(experts.down, block_scale=scales))
    prepared = jax_moe.prepare(experts, layout, progress=False)
    for projection, packed, gated in (
        (experts.gate_up, prepared.gate_up, parts == 2), (experts.down, prepared.down, False)
    ):  # fmt: skip
        wanted = np.asarray(nvfp4.dequantize(projection.payload, projection.block_scale), float)[0]
        wanted = wanted.reshape(-1, *wanted.shape[-2:])
        blocks = weights_of(layout, packed.payload[0])
        rows_per_block, block_k = 128 // wanted.shape[0], blocks.shape[3]
        padded = np.zeros((wanted.shape[0], blocks.shape[0] * rows_per_block, blocks.shape[1] * block_k))
        padded[:, : wanted.shape[1], : wanted.shape[2]] = wanted
        for lane in range(128):
            part, row = lane_row(lane, gated)
            got = blocks[:, :, lane].reshape(blocks.shape[0], -1)
            np.testing.assert_array_equal(got, padded[part, row::rows_per_block])


def test_the_formulas_are_those():
    """``weight_block``'s index formulas on the bytes that the statement reads."""
    block = np.random.default_rng(1).integers(0, 256, 18432, np.uint8)
    codes, scales = read_fp4(block)
    row, k = np.arange(128)[:, None], np.arange(256)
    byte = block[weight_block.code_byte(row, k)]
    np.testing.assert_array_equal(np.where(k % 2, byte >> 4, byte & 15), codes)
    np.testing.assert_array_equal(block[weight_block.scale_byte(row, k[::16])], scales)
    lanes = [weight_block.lane(*place) for place in np.ndindex(2, 4, 8, 2)]
    assert sorted(lanes) == list(range(128))
    places = weight_block.bf16_code_byte(row, np.arange(64))
    half, lane, word = np.unravel_index(places // 4, (2, 128, 4))
    np.testing.assert_array_equal(32 * half + 8 * word, np.broadcast_to(np.arange(64) // 8 * 8, (128, 64)))
    np.testing.assert_array_equal(lane, np.broadcast_to(row, (128, 64)))
    assert weight_block.bf16_scale_byte(5) == 4096 + 20


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_fp4_keeps_nan_scales(nan):
    experts = test_prepare.random_experts(np.random.default_rng(2), 1, 2, 64, 64)
    scales = np.asarray(experts.down.block_scale).view(np.uint8).copy()
    scales[0, 3, 1] = nan
    down = dataclasses.replace(experts.down, block_scale=jnp.asarray(scales.view(ml_dtypes.float8_e4m3fn)))
    prepared = jax_moe.prepare(dataclasses.replace(experts, down=down), "tcgen05_fp4_v1", progress=False)
    assert not np.isnan(prepared.down.global_scale).any()
    weights = weights_of("tcgen05_fp4_v1", prepared.down.payload[0])[0, 0]
    (lane,) = (lane for lane in range(128) if lane_row(lane, False) == (0, 3))
    wanted = np.zeros((128, 256), bool)
    wanted[lane, 16:32] = True
    np.testing.assert_array_equal(np.isnan(weights), wanted)
