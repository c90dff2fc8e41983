"""A linear layer outside the experts, in any of the formats that stand beside NVFP4 experts, as bfloat16.

Mixed checkpoints keep attention, shared experts or the router in bfloat16 or FP8 while the experts have 4 bits.
``docs/checkpoint-formats.md`` has the table.
"""

from collections.abc import Set
import dataclasses
import math

import ml_dtypes
import numpy as np

from jax_moe import nvfp4
from jax_moe.checkpoints import quantization, stored
from jax_moe.checkpoints.files import CheckpointError, Files, FLOATS, read_floats, read_rows, TensorInfo
from jax_moe.experts import Projection

_FP8_SCALES = ("weight_scale", "weight_scale_inv", "scale")
_FP8_SCALE_DTYPES = (*FLOATS, "F8_E8M0", "U8")

# What activations and the key-value cache are quantised with, by several tools: a product with bfloat16 activations has
# no use for it. Anything else beside a weight is an error.
_ACTIVATIONS = {
    "input_scale", "input_scale_2", "input_global_scale", "input_scale_ub", "output_scale", "q_scale", "k_scale",
    "v_scale", "k_bias", "v_bias",
}  # fmt: skip

_ROWS_AT_ONCE = 1024  # dequantised in float32; memory holds the result and that many rows


@dataclasses.dataclass(frozen=True)
class Linear:
    """``y = x @ weight.T + bias``.

    Attributes:
      weight: bfloat16 ``[N, C]``, dequantised in float32 and rounded once.
      bias: float32 ``[N]``, or None.
    """

    weight: np.ndarray
    bias: np.ndarray | None


def read_linear(files: Files, module: str) -> Linear:
    """Reads the linear layer ``module`` ("model.layers.0.self_attn.q_proj"): bf16, f16, f32, FP8, NVFP4 or MXFP4.

    Raises:
      CheckpointError: there is no such layer, it is in another format, has a tensor that its format does not explain,
        or a weight, scale or bias that is not finite; or its activations would have to be transformed.
    """
    quantization.refuse_online_transforms(files, [module])
    return read_plain(files, module)


def read_projection(files: Files, module: str) -> Projection:
    """Reads the 4-bit linear layer ``module`` as it is: NumPy arrays ``[N, C/2]``, ``[N, C/16]``, scalars, and a bias.

    Raises:
      CheckpointError: as :func:`read_linear`, or the layer is not in NVFP4, nor in MXFP4 that NVFP4 represents.
    """
    quantization.refuse_online_transforms(files, [module])
    present = files.under(f"{module}.")
    weight = files.info(f"{module}.weight") if f"{module}.weight" in present else None
    if weight is not None and weight.dtype not in ("U8", "I8"):
        raise CheckpointError(
            f"{weight}: found {weight.summary}, expected {module} in NVFP4 or MXFP4; load_linear reads it in bfloat16"
        )
    linear = stored.find_linear(files, module)
    bias = _bias(files, f"{module}.bias", linear.num_rows)
    _check_explained(files, module, present - linear.expected_names())
    input_scale = linear.input_scale(0, 0)
    if any("FP8" in name for name in quantization.algorithms(files, module)):
        input_scale = None  # W4A8: it is that of FP8 activations
    return Projection(
        payload=np.ascontiguousarray(linear.payload(0, 0)),
        block_scale=np.ascontiguousarray(linear.block_scale(0, 0)),
        global_scale=np.float32(linear.global_scale(0, 0)),
        input_scale=None if input_scale is None else np.float32(input_scale),
        bias=bias,
    )


def read_plain(files: Files, module: str) -> Linear:
    """As :func:`read_linear`, where the configuration has been asked for transforms already."""
    present = files.under(f"{module}.")
    weight = files.info(f"{module}.weight") if f"{module}.weight" in present else None
    if weight is None or weight.dtype in ("U8", "I8"):
        matrix, used = _four_bits(files, module)
    elif weight.dtype == "F8_E4M3":
        matrix, used = _fp8(files, module, weight, present)
    else:
        matrix, used = _floats(weight), {weight.name}
    bias = _bias(files, f"{module}.bias", matrix.shape[0])
    _check_explained(files, module, present - used)
    return Linear(matrix, bias)


def _check_explained(files: Files, module: str, left: Set[str]) -> None:
    unexplained = left - {f"{module}.{name}" for name in ("bias", *_ACTIVATIONS)}
    if unexplained:
        raise CheckpointError(
            f"{files.info(min(unexplained))}: found a tensor that a linear layer in this format does not have; leaving "
            "it out could change the result"
        )


def _bias(files: Files, name: str, rows: int) -> np.ndarray | None:
    if name not in files.names():
        return None
    info = files.info(name)
    if info.dtype not in FLOATS or info.shape != (rows,):
        raise CheckpointError(f"{info}: found {info.summary}, expected {' or '.join(FLOATS)} [{rows}]")
    return read_floats(info)


def _floats(info: TensorInfo) -> np.ndarray:
    if info.dtype not in FLOATS or len(info.shape) != 2:
        raise CheckpointError(
            f"{info}: found {info.summary}, expected {', '.join(FLOATS)} or F8_E4M3 of two axes, NVFP4 or MXFP4"
        )
    result = np.empty(info.shape, ml_dtypes.bfloat16)
    for start in range(0, info.shape[0], _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, info.shape[0])
        result[start:stop] = read_floats(info, start, stop)
    return result


def _four_bits(files: Files, module: str) -> tuple[np.ndarray, Set[str]]:
    linear = stored.find_linear(files, module)
    scales = linear.block_scale(0, 0).astype(np.float32)
    payload, global_scale = linear.payload(0, 0), linear.global_scale(0, 0)

    def codes(rows: slice) -> np.ndarray:
        pairs = np.stack([payload[rows] & 15, payload[rows] >> 4], -1).reshape(-1, linear.contraction)
        return pairs.view(ml_dtypes.float4_e2m1fn).astype(np.float32)

    shape = (linear.num_rows, linear.contraction)
    return _dequantize(codes, scales, shape, (1, nvfp4.BLOCK_SIZE), global_scale), linear.expected_names()


def _fp8(files: Files, module: str, weight: TensorInfo, present: Set[str]) -> tuple[np.ndarray, Set[str]]:
    names = [f"{module}.{suffix}" for suffix in _FP8_SCALES if f"{module}.{suffix}" in present]
    if len(names) != 1 or len(weight.shape) != 2:
        raise CheckpointError(
            f"{weight}: found {weight.summary} with {len(names)} scales, expected two axes and one of "
            f"{', '.join(_FP8_SCALES)}"
        )
    info = files.info(names[0])
    block = _block(info, weight)
    scales = read_rows(info)
    if info.dtype in ("F8_E8M0", "U8"):
        if (scales.view(np.uint8) == 255).any():
            raise CheckpointError(f"{info}: found an e8m0 scale of NaN (255), expected numbers")
        scales = np.ldexp(np.float32(1), scales.view(np.uint8).astype(np.int32) - 127)
    else:
        scales = read_floats(info)
    grid = [math.ceil(size / extent) for size, extent in zip(weight.shape, block, strict=True)]
    values = read_rows(weight)
    # NaN of e4m3 is 0x7f and 0xff; it has no infinity.
    if any((values[start : start + _ROWS_AT_ONCE].view(np.uint8) & 0x7F == 0x7F).any()
           for start in range(0, len(values), _ROWS_AT_ONCE)):  # fmt: skip
        raise CheckpointError(f"{weight}: found NaN, expected finite weights")
    result = _dequantize(lambda rows: values[rows].astype(np.float32), scales.reshape(grid), weight.shape, block)
    return result, {weight.name, info.name}


def _block(scale: TensorInfo, weight: TensorInfo) -> tuple[int, int]:
    """Rows and columns that share a scale; where two readings fit a shape they mean the same."""
    rows, columns = weight.shape
    shape = scale.shape
    if len(shape) == 4 and shape[1] == shape[3] == 1:  # ModelOpt's FP8_PB_WO keeps the blocks' own axes
        shape = (shape[0], shape[2])
    if math.prod(shape) == 1:
        shape = (1, 1)
    elif len(shape) == 1:
        shape = (*shape, 1)
    per_tensor, per_channel, block, mx = (max(rows, 1), max(columns, 1)), (1, max(columns, 1)), (128, 128), (1, 32)
    for extent in (per_tensor, per_channel, block, mx):
        fits = shape == (math.ceil(rows / extent[0]), math.ceil(columns / extent[1]))
        if fits and scale.dtype in _FP8_SCALE_DTYPES:
            return extent
    raise CheckpointError(
        f"{scale}: found {scale.summary}, expected {'/'.join(_FP8_SCALE_DTYPES)} of one value, or for F8_E4M3 "
        f"{list(weight.shape)} one for each row, block of 128 x 128 or 32 columns of a row"
    )


def _dequantize(codes, scales: np.ndarray, shape: tuple[int, ...], block: tuple[int, int], factor=None) -> np.ndarray:
    """bfloat16 ``codes * scale of the block [* factor]``, multiplied in float32 from left to right."""
    result = np.empty(shape, ml_dtypes.bfloat16)
    for start in range(0, shape[0], _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, shape[0]))
        of_rows = scales[np.arange(rows.start, rows.stop) // block[0]]
        values = codes(rows) * np.repeat(of_rows, block[1], axis=1)[:, : shape[1]]
        result[rows] = values if factor is None else values * factor
    return result
