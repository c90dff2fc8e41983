"""``python -m jax_moe``: doctor, bench, compile, inspect, convert."""

import typer

from jax_moe.cli import bench, compile, convert, doctor, inspect

app = typer.Typer(
    help="NVFP4 mixture-of-experts for JAX.", no_args_is_help=True, add_completion=False, rich_markup_mode="rich"
)
app.command()(doctor.doctor)
app.command()(bench.bench)
app.command()(compile.compile)
app.command()(inspect.inspect)
app.command()(convert.convert)

if __name__ == "__main__":
    app()
