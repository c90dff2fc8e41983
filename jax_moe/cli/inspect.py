"""``python -m jax_moe inspect``: what a checkpoint holds, from its headers and scales."""

from pathlib import Path
from typing import Annotated

import typer

from jax_moe import checkpoints
from jax_moe.checkpoints.summary import LayerSummary, Range
from jax_moe.cli import show

_HEADINGS = (
    "layer", "format", "E", "K", "experts", "router", "shared expert", "MiB", "gate_up scale", "gate/up differ",
    "down scale", "x scale", "intermediate scale",
)  # fmt: skip


@show.one_line_errors
def inspect(directory: Annotated[Path, typer.Argument(help="A checkpoint, published or converted.")]) -> None:
    """Show the MoE layers of a checkpoint: format, shapes, router, scales, size; exit status 1 if one is unusable."""
    try:
        summary = checkpoints.summarize(directory)
    except checkpoints.CheckpointError as error:
        show.error(str(error))
        raise typer.Exit(1) from None
    usable = [layer for layer in summary.layers.values() if isinstance(layer, LayerSummary)]
    total = sum(layer.nbytes for layer in usable)
    title = f"{directory}: {summary.family} ({summary.model_type}), {len(usable)} MoE layers, {total / 2**30:.3f} GiB"
    show.table(title, _HEADINGS, [_row(layer) for layer in usable])
    parts = [part for layer in usable for part in (layer.router, layer.shared_expert)]
    errors = [found for found in (*parts, *summary.layers.values()) if isinstance(found, checkpoints.CheckpointError)]
    for error in errors:
        show.error(str(error))
    if errors or not usable:
        raise typer.Exit(1)


def _row(layer: LayerSummary) -> tuple[str, ...]:
    return (
        str(layer.layer),
        layer.format,
        str(layer.experts),
        _part(layer.top_k),
        f"{layer.parts} x [{layer.intermediate}, {layer.hidden}]",
        _part(layer.router),
        "no" if layer.shared_expert is None else _part(layer.shared_expert),
        f"{layer.nbytes / 2**20:.2f}",
        _range(layer.gate_up_scale),
        "no" if layer.part_ratio == 1 else f"up to {layer.part_ratio:.3g}x",
        _range(layer.down_scale),
        _range(layer.gate_up_input_scale),
        _range(layer.down_input_scale),
    )


def _part(value: object) -> str:
    """What a layer has; or, where it cannot be loaded, a mark: the reason stands below the table."""
    return "?" if value is None or isinstance(value, checkpoints.CheckpointError) else str(value)


def _range(values: Range | None) -> str:
    if values is None:
        return "none"
    low, high = values
    return f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"
