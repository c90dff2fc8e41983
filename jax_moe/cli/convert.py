"""``python -m jax_moe convert``: the MoE layers of a checkpoint, in the layout that a target runs."""

from pathlib import Path
from typing import Annotated
import warnings

import typer

from jax_moe import checkpoints
from jax_moe.cli import options, show
from jax_moe.experts import CANONICAL
from jax_moe.kernels import targets


@show.one_line_errors
def convert(
    directory: Annotated[Path, typer.Argument(help="A checkpoint with NVFP4 or MXFP4 experts.")],
    output: Annotated[Path, typer.Argument(help="The directory to write; an interrupted conversion is continued.")],
    layout: Annotated[
        str,
        typer.Option(help=f"canonical (CPUs; `prepare` repacks it for a GPU), or a GPU: {', '.join(targets.TARGETS)}."),
    ] = CANONICAL,
    layers: Annotated[
        str | None, typer.Option(help="Only these, as 0,3-5. By default all that are in NVFP4 or MXFP4.")
    ] = None,
) -> None:
    """Convert the experts of each layer, one file a layer, safe to interrupt at any time."""
    try:
        numbers = None if layers is None else options.numbers("--layers", layers, least=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            written = checkpoints.convert(directory, output, layers=numbers, layout=layout)
        total = len(checkpoints.list_layers(output))
    except ValueError as error:
        show.error(str(error))
        raise typer.Exit(1) from None
    for warning in caught:
        show.warning(str(warning.message))
    complete = total - len(written)
    typer.echo(f"{output}: {total} layers, {len(written)} written by this run, {complete} were complete")
