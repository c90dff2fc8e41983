"""What the commands print: nothing is cut off, and text is shown as it is, whatever brackets it has."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

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
