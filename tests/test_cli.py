"""``python -m jax_moe``: doctor and bench; tests/checkpoints/test_commands.py has inspect and convert."""

import json
import os
import subprocess
import sys

import jax_moe


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jax_moe", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "JAX_PLATFORMS": "cpu"} | environment,
    )


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


def test_bench_writes_what_it_shows(tmp_path):
    path = tmp_path / "results.json"
    done = run("bench", "--model", "3,2,48,32", "--tokens", "1,5", "--repeats", "2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())["results"]
    assert [(r["precision"], r["tokens"]) for r in results] == [("w4a16", 1), ("w4a16", 5), ("w4a4", 1), ("w4a4", 5)]
    assert all(r["seconds"] > 0 for r in results)
    assert done.stdout.count("w4a4") == 2


def test_bench_refuses_without_a_traceback():
    for options, message in {
        ("--model", "nonsense"): "nonsense",
        ("--model", "4,2,100,64"): "up: got H = 100",
        ("--model", "2,3,48,32"): "k: got 3",
        ("--tokens", "0"): "tokens: got 0",
        ("--repeats", "0"): "repeats",
        ("--precision", "fp8"): "precision: got 'fp8'",
        ("--combine", "sum"): "combine: got 'sum'",
    }.items():
        done = run("bench", *options)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
