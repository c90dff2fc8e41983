"""Writes linear layers in FP8 with compressed-tensors, and what it makes of them: ``generate_linears.py OUT``.

``OUT`` gets ``model.safetensors``, with a layer for each way to share scales, and ``expected.json``: the tool's version
and the SHA-256 of its own decompression of each layer to bfloat16. Needs torch and compressed-tensors.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
import sys

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    apply_quantization_config,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from safetensors.torch import save_file
import torch

ROWS, COLUMNS, BLOCK = 144, 160, 128
FP8_MAX = 448.0
EXTENTS = {"tensor": (ROWS, COLUMNS), "channel": (1, COLUMNS), "block": (BLOCK, BLOCK)}


def scheme(strategy: str) -> QuantizationScheme:
    extra = {"block_structure": [BLOCK, BLOCK]} if strategy == "block" else {}
    weights = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True, **extra)
    return QuantizationScheme(targets=[f"model.{strategy}"], weights=weights)


def scales(weight: torch.Tensor, extent: tuple[int, int]) -> torch.Tensor:
    """amax / 448 of each block of ``extent``."""
    rows = weight.float().abs().split(extent[0], 0)
    return torch.stack([torch.stack([part.max() for part in row.split(extent[1], 1)]) for row in rows]) / FP8_MAX


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    for strategy in EXTENTS:
        setattr(model.model, strategy, torch.nn.Linear(COLUMNS, ROWS, dtype=torch.bfloat16, bias=strategy != "block"))
    groups = {strategy: scheme(strategy) for strategy in EXTENTS}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, format="float-quantized"))
    for strategy, extent in EXTENTS.items():
        layer = getattr(model.model, strategy)
        layer.weight_scale.data = scales(layer.weight, extent).reshape(layer.weight_scale.shape).to(torch.bfloat16)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out / "model.safetensors")
    compressor.decompress_model(model)
    dense = {name: getattr(model.model, name).weight.detach().to(torch.bfloat16) for name in EXTENTS}
    expected = {
        "compressed-tensors": importlib.metadata.version("compressed-tensors"),
        "sha256": {
            f"model.{name}": hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, weight in dense.items()
        },
    }
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
