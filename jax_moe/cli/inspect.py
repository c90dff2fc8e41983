"""``python -m jax_moe inspect``: what a checkpoint holds, from its headers and scales."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.table import Table
import typer

from jax_moe import checkpoints
from jax_moe.checkpoints.summary import LayerSummary, Range

_HEADINGS = (
    "layer", "format", "E", "experts", "MiB", "gate_up scale", "gate/up differ", "down scale", "x scale",
    "intermediate scale",
)  # fmt: skip


def inspect(directory: Annotated[Path, typer.Argument(help="A checkpoint, published or converted.")]) -> None:
    """Show the MoE layers of a checkpoint: format, shapes, scales, size; exit status 1 if one is unusable."""
    console = Console()
    try:
        summary = checkpoints.summarize(directory)
    except checkpoints.CheckpointError as error:
        _print_error(str(error))
        raise typer.Exit(1) from None
    usable = [layer for layer in summary.layers.values() if isinstance(layer, LayerSummary)]
    total = sum(layer.nbytes for layer in usable)
    table = Table(
        title=f"{directory}: {summary.family} ({summary.model_type}), {len(usable)} MoE layers, {total / 2**30:.3f} GiB"
    )
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for layer in usable:
        table.add_row(
            str(layer.layer),
            layer.format,
            str(layer.experts),
            f"{layer.parts} x [{layer.intermediate}, {layer.hidden}]",
            f"{layer.nbytes / 2**20:.2f}",
            _show(layer.gate_up_scale),
            "no" if layer.part_ratio == 1 else f"up to {layer.part_ratio:.3g}x",
            _show(layer.down_scale),
            _show(layer.gate_up_input_scale),
            _show(layer.down_input_scale),
        )
    console.print(table)
    errors = [layer for layer in summary.layers.values() if not isinstance(layer, LayerSummary)]
    for error in errors:
        _print_error(str(error))
    if errors or not usable:
        raise typer.Exit(1)


def _print_error(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}", highlight=False)


def _show(values: Range | None) -> str:
    if values is None:
        return "none"
    low, high = values
    return f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"
