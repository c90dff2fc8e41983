"""``python -m jax_moe``: doctor, bench, compile, inspect, convert."""

from typing import Annotated

import typer

import jax_moe
from jax_moe.cli import bench, compile, convert, doctor, inspect

app = typer.Typer(
    help="NVFP4 mixture-of-experts for JAX.", no_args_is_help=True, add_completion=False, rich_markup_mode="rich"
)
app.command()(doctor.doctor)
app.command()(bench.bench)
app.command()(compile.compile)
app.command()(inspect.inspect)
app.command()(convert.convert)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jax_moe {jax_moe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """NVFP4 mixture-of-experts for JAX."""


if __name__ == "__main__":
    app()
