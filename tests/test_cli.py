"""``python -m jax_moe``: doctor, bench and compile; tests/checkpoints/test_commands.py has inspect and convert."""

import os
import pathlib
import subprocess
import sys

from typer.testing import CliRunner

import jax_moe
from jax_moe.__main__ import app
from jax_moe.cli import show

CHECKPOINT = pathlib.Path(__file__).parent / "checkpoints" / "data" / "modelopt-qwen3_moe"


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jax_moe", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def run_here(*arguments):
    """In this process; the columns are for typer's boxes around errors, which are as wide as a terminal."""
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(argument) for argument in arguments])


def run_on_a_terminal(*arguments, **environment) -> str:
    """What a terminal of 80 columns gets."""
    terminal, end = os.openpty()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "dumb"} | environment
    process = subprocess.Popen([sys.executable, "-m", "jax_moe", *arguments], stdout=end, env=environment)
    os.close(end)
    shown = b""
    try:
        while data := os.read(terminal, 4096):
            shown += data
    except OSError:  # how Linux says that nobody writes any more
        pass
    os.close(terminal)
    assert process.wait() == 0
    return shown.decode().replace("\r\n", "\n")


def row(output, name):
    return next(line for line in output.splitlines() if name in line)


def test_doctor_says_what_runs_and_why_not_the_rest():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert jax_moe.__version__ in row(done.stdout, "jax_moe ")
    assert " yes " in row(done.stdout, "CPU")
    assert " no " in row(done.stdout, "Hopper")
    assert "no kernel is written for it" in row(done.stdout, "Blackwell")


def test_doctor_examines_an_installation_that_does_not_start():
    done = run("doctor", JAX_PLATFORMS="nonsense")
    assert done.returncode == 0, done.stderr
    assert "JAX does not start" in row(done.stdout, "JAX devices")


def test_a_table_is_complete_on_a_narrow_terminal():
    piped = run("inspect", str(CHECKPOINT)).stdout
    cells = [cell.strip() for cell in piped.splitlines()[4].split("│")[1:-1]]
    assert len(cells) == 10
    shown = run_on_a_terminal("inspect", str(CHECKPOINT))
    _, *lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    paragraph = " ".join(" ".join(lines).split())
    assert [part.partition(": ")[2] for part in paragraph.split("; ")] == cells


def test_text_is_printed_as_it_is(capsys):
    show.table("[red]title", ("heading",), [(":smile: [bold]",)])
    assert "[red]title" in (shown := capsys.readouterr().out)
    assert ":smile: [bold]" in shown
    show.error("found no [file]")
    assert capsys.readouterr().err == "error: found no [file]\n"
