"""``python -m jax_moe``: doctor, bench and compile; tests/checkpoints/test_commands.py has inspect and convert."""

import os
import pathlib
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import jax_moe
from jax_moe.__main__ import app
from jax_moe.cli import doctor, show
from jax_moe.kernels import compile as kernels, specs

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


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_compiler", lambda: None)
    monkeypatch.setenv("JAX_MOE_CACHE_DIR", str(tmp_path))


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


def test_doctor_shows_the_kernel_cache_and_what_the_environment_sets(tmp_path, monkeypatch):
    for name in doctor.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "kernels").mkdir()
    for name in ("a.json", "b.json", ".unfinished.tmp"):
        (tmp_path / "kernels" / name).touch()
    done = run("doctor", JAX_MOE_CACHE_DIR=str(tmp_path), JAX_MOE_DEBUG="1")
    assert "2 kernels" in row(done.stdout, str(tmp_path / "kernels"))
    assert str(tmp_path) in row(done.stdout, "JAX_MOE_CACHE_DIR")
    assert " 1 " in row(done.stdout, "JAX_MOE_DEBUG")
    assert "JAX_MOE_FFI_LIBRARY" not in done.stdout
    done = run("doctor", JAX_MOE_CACHE_DIR=str(tmp_path / "absent"))
    assert "0 kernels" in row(done.stdout, str(tmp_path / "absent" / "kernels"))


def test_doctor_advises_what_works_for_a_package_that_is_on_no_index(monkeypatch):
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(doctor, "_version", lambda package: "not installed")
    monkeypatch.setattr(doctor, "_devices", lambda: ([], None))
    assert "pip install '.[cuda13]'" in row(run_here("doctor").output, "Hopper")


def test_doctor_shows_a_long_path_whole(tmp_path):
    library = tmp_path / ("long" * 20) / "library.so"
    library.parent.mkdir()
    library.symlink_to(jax_moe.ffi.library_path())
    assert str(library) in row(run("doctor", JAX_MOE_FFI_LIBRARY=str(library)).stdout, " library ")
    shown = run_on_a_terminal("doctor", JAX_MOE_FFI_LIBRARY=str(library))
    assert max(map(len, shown.splitlines())) <= 80
    cells = [line.split("│")[2].strip() for line in shown.splitlines() if line.count("│") == 3]
    assert str(library) in "".join(cells)


def test_a_missing_kernel_asks_for_what_can_be_installed(no_compiler):
    with pytest.raises(kernels.MissingKernelError) as error:
        kernels.compiled(specs.CombineSpec("float32"), "sm_90a", " --layer 8,2,64,64")
    assert "`pip install nvidia-cutlass-dsl`" in str(error.value)
    assert "jax_moe[" not in str(error.value)


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
