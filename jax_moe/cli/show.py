"""What the commands print: nothing is cut off, and text is shown as it is, whatever brackets it has."""

from collections.abc import Callable, Sequence
import functools
from typing import ParamSpec

from rich.console import Console
from rich.table import Table
from rich.text import Text
import typer

P = ParamSpec("P")

_UNLIMITED = 100_000
"""Columns of what is no terminal: a file or a pipe gets a line for each row."""


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal that it writes to, or as anything that is printed."""
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.file.isatty():
        made.width = _UNLIMITED
    return made


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; if a terminal is too narrow for it, a paragraph for each row: no name or number breaks."""
    out, grid = console(), Table()
    for i, heading in enumerate(headings):
        grid.add_column(heading, justify="right" if i else "left")
    for row in rows:
        grid.add_row(*row)
    out.print(title, soft_wrap=True)
    if out.measure(grid, options=out.options.update_width(_UNLIMITED)).maximum <= out.width:
        out.print(grid)
    else:
        for row in rows:
            out.print("; ".join(f"{heading}: {value}" for heading, value in zip(headings, row, strict=True)))


def error(message: str) -> None:
    """Prints ``error:`` and the message, on standard error."""
    console(stderr=True).print(Text.assemble(("error:", "red"), f" {message}"), soft_wrap=True)


def warning(message: str) -> None:
    """Prints ``warning:`` and the message, on standard error."""
    console(stderr=True).print(Text.assemble(("warning:", "yellow"), f" {message}"), soft_wrap=True)


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose machine fails it (a file, the memory, a device, a library) in one line and with exit status 1.

    What is wrong with an argument is for the command to say. What no user can cause keeps its traceback: it is a bug.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):  # which are RuntimeErrors
            raise
        except (OSError, ImportError, MemoryError, RuntimeError) as failure:
            said = str(failure).strip().splitlines() or ["it did not say why"]
            kind = "not enough memory: " if isinstance(failure, MemoryError) else ""
            error(f"{kind}{said[0]}")
            raise typer.Exit(1) from None

    return run
