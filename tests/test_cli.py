"""``python -m jax_moe``: doctor, bench and compile; tests/checkpoints/test_commands.py has inspect and convert."""

import dataclasses
import itertools
import json
import os
import pathlib
import shlex
import subprocess
import sys

import cuda_call
import pytest
from typer.testing import CliRunner

import jax_moe
from jax_moe import activations, settings
from jax_moe.__main__ import app
from jax_moe.cli import bench, doctor, options, show
from jax_moe.kernels import cache, compiler as dsl, lowering, specs, targets

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
def compiler(monkeypatch):
    """Stands in for the compiler; returns the names of the kernels that it was asked for."""
    asked = []

    def compiled(spec, target):
        asked.append(spec.name)
        return dsl.CompiledKernel(b"x" * 98765, spec.name, 384, 232448, (8,), 168, 0, 16)

    monkeypatch.setattr(cache, "compiled", compiled)
    return asked


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_compiler_version", lambda: None)
    monkeypatch.setenv("JAX_MOE_CACHE_DIR", str(tmp_path))


def test_doctor_says_what_runs_and_why_not_the_rest():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert jax_moe.__version__ in row(done.stdout, "jax_moe ")
    assert " yes " in row(done.stdout, "│ CPU  ")
    for target in targets.TARGETS.values():
        assert " no " in row(done.stdout, f"{target.generation} ({target.name})")


def test_doctor_examines_an_installation_that_does_not_start():
    done = run("doctor", JAX_PLATFORMS="nonsense")
    assert done.returncode == 0, done.stderr
    assert "JAX does not start" in row(done.stdout, "JAX devices")


def test_doctor_examines_an_installation_without_its_library(tmp_path):
    done = run("doctor", JAX_MOE_FFI_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 0, done.stderr
    assert "the FFI library is missing" in " ".join(done.stdout.split())


def test_doctor_shows_the_kernel_cache_and_what_the_environment_sets(tmp_path, monkeypatch):
    for setting in settings.SETTINGS:
        monkeypatch.delenv(setting.name, raising=False)
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


def test_bench_writes_what_it_shows(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("an older and longer file " * 100)
    done = run("bench", "--model", "3,2,48,32", "--tokens", "1,5", "--repeats", "2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())["results"]
    assert [(r["precision"], r["tokens"]) for r in results] == [("w4a16", 1), ("w4a16", 5), ("w4a4", 1), ("w4a4", 5)]
    assert all(r["seconds"] > 0 for r in results)
    assert done.stdout.count("w4a4") == 2


FOUR = "4 positive integers"
COUNTS = "needs numbers from 1 to 1000000, as 1,32, or ranges, as 1-8192"
ACTIVATION = "SwiGLU, GeGLU, ReLU2, SiTU, by itself or with alpha,beta,limit"


@pytest.mark.parametrize(("command", "message"), [
    ("bench --model nonsense", f"--model: got 'nonsense', needs one of qwen3-30b-a3b, qwen3-235b-a22b, "
     f"deepseek-r1-ep8, mixtral-8x7b, gpt-oss-120b, or E,K,H,I: {FOUR}"),
    ("bench --model 4,2,64", "--model: got '4,2,64', needs one of"),
    ("bench --model 4,2,100,64", "--model: got H = 100, needs a multiple of 16"),
    ("bench --model 2,3,48,32", "--model: got K = 3, needs at most E = 2"),
    ("bench --tokens 0", f"--tokens: got '0', {COUNTS}"),
    ("bench --tokens 1-99999999999", f"--tokens: got '1-99999999999', {COUNTS}"),
    ("bench --repeats 0", "--repeats"),
    ("bench --seed 99999999999999999999", "--seed"),
    ("bench --precision fp8", "--precision: got 'fp8', needs one of 'w4a16', 'w4a4', "),
    ("bench --combine sum", "--combine: got 'sum', needs one of 'atomic', 'ordered'"),
    ("bench --batch-invariant", "--batch-invariant: got --combine atomic, needs ordered"),
    ("bench --json /nope/x.json", "--json: got '/nope/x.json', needs a file that can be written"),
    ("compile", "nothing to compile: give --model or --product"),
    ("compile --product 8,64", "--product: got '8,64', needs G,C,N: 3 positive integers"),
    ("compile --product 8,64,40", "--product: got N = 40, needs a multiple of 16"),
    ("compile --product 8,64,64 --num-experts 4", "--num-experts: got 4, needs at least G = 8"),
    ("compile --model qwen", f"--model: got 'qwen', needs one of qwen3-30b-a3b, qwen3-235b-a22b, deepseek-r1-ep8, "
     f"mixtral-8x7b, gpt-oss-120b, or L,K,H,I: {FOUR}"),
    ("compile --model 8,2,64,64 --target hopper", "--target: got 'hopper', needs one of sm_90a"),
    ("compile --model 1,2,3", "--model: got '1,2,3', needs one of"),
    ("compile --model a,b,c,d", "--model: got 'a,b,c,d', needs one of"),
    ("compile --model 8,-2,128,64", "--model: got '8,-2,128,64', needs one of"),
    ("compile --model 0,2,128,64", "--model: got '0,2,128,64', needs one of"),
    ("compile --model 8,2,128,72", "--model: got I = 72, needs a multiple of 16"),
    ("compile --model 8,2,64,64 --num-experts 4", "--num-experts: got 4, needs at least L = 8"),
    ("compile --model 8,2,64,64 --tokens x", f"--tokens: got 'x', {COUNTS}"),
    ("compile --model 8,2,64,64 --tokens 1,,2", f"--tokens: got '', {COUNTS}"),
    ("compile --model 8,2,64,64 --tokens 8,32-1", f"--tokens: got '32-1', {COUNTS}"),
    ("compile --model 8,2,64,64 --tokens 1-", f"--tokens: got '1-', {COUNTS}"),
    ("compile --model 8,2,64,64 --tokens 0-4", f"--tokens: got '0-4', {COUNTS}"),
    ("compile --model 8,2,64,64 --tokens -5", f"--tokens: got '-5', {COUNTS}"),
    ("compile --model 8,2,64,64 --precision w4a16,fp8", "--precision: got 'fp8', needs one of 'w4a16', 'w4a4', "),
    ("compile --model 8,2,64,64 --combine both", "--combine: got 'both', needs one of 'atomic', 'ordered'"),
    ("compile --model 8,2,64,64 --combine atomic,ordered --batch-invariant",
     "--batch-invariant: got --combine atomic,ordered, needs ordered"),
    ("compile --model 8,2,64,64 --weight-on both", "--weight-on: got 'both', needs one of 'output', 'input'"),
    ("compile --model 8,2,64,64 --out-dtype float16", "--out-dtype: got float16, needs bfloat16 or float32"),
    ("compile --model 8,2,64,64 --activation swiglu", f"--activation: got 'swiglu', needs one of {ACTIVATION}"),
    ("compile --model 8,2,64,64 --activation SwiGLU,1", f"--activation: got 'SwiGLU,1', needs one of {ACTIVATION}"),
    ("compile --model 8,2,64,64 --activation SwiGLU,1,2,x", "--activation: got 'SwiGLU,1,2,x', needs one of"),
    ("compile --model 8,2,64,64 --activation GeGLU,1,0,inf", "--activation: got 'GeGLU,1,0,inf', needs one of"),
    ("compile --model 8,2,64,64 --jobs 0", "--jobs"),
], ids=lambda value: value if value.startswith(("bench", "compile")) else "")  # fmt: skip
def test_a_mistake_names_its_option_and_what_that_needs(compiler, monkeypatch, command, message):
    monkeypatch.setattr(bench, "time_op", lambda *_: pytest.fail("measured before the options were checked"))
    ran = run_here(*shlex.split(command))
    assert message in ran.output
    assert ran.exit_code == 2
    assert not compiler


def test_activations_that_an_error_prints_are_read_back():
    for activation in (
        activations.SwiGLU(1.702, 1.0, 7.0), activations.SwiGLU(), activations.GeGLU(), activations.ReLU2(),
        activations.SiTU(2.5, None), activations.SiTU(),
    ):  # fmt: skip
        numbers = ",".join(map(repr, activations.parameters(activation)))
        assert options.activation("--activation", f"{type(activation).__name__},{numbers}") == activation
        assert options.activation("--activation", type(activation).__name__) == type(activation)()


def test_compile_and_bench_call_a_layer_alike(compiler):
    """And compile by its former names, which messages and scripts have."""

    def made(*arguments):
        compiler.clear()
        # Kernels of few routes are the same for any number of experts.
        assert run_here("compile", "--tokens", "40", *arguments).exit_code == 0
        return list(compiler)

    name, sizes = "qwen3-30b-a3b", "128,8,2048,768"
    assert made("--model", name) == made("--model", sizes) == made("--shape", name) == made("--layer", sizes)
    assert set(made("--model", name, "--model", "8,2,64,64")) > set(made("--model", name))


def test_token_counts_are_numbers_and_ranges():
    assert options.numbers("--tokens", "1-3,32,5-5") == [1, 2, 3, 32, 5]


@pytest.mark.parametrize(("option", "values"), [
    ("--precision", "w4a16,w4a4"), ("--combine", "atomic,ordered"), ("--weight-on", "output,input"),
    ("--out-dtype", "bfloat16,float32"),
])  # fmt: skip
def test_compile_makes_the_kernels_of_every_value_in_a_list(compiler, option, values):
    def made(text):
        compiler.clear()
        assert run_here("compile", "--model", "8,2,64,64", "--tokens", "1,64", option, text).exit_code == 0
        return set(compiler)

    first, second = map(made, values.split(","))
    assert first != second
    assert made(values) == first | second


def test_compile_shows_every_column_in_a_pipe(compiler):
    arguments = "compile --model 8,2,64,64 --tokens 1-8,8190-8192 --activation SiTU"
    ran = CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments.split())
    assert ran.exit_code == 0
    for heading in ("kernel", "threads", "registers", "stack bytes", "shared bytes", "tensor core", "cubin bytes"):
        assert heading in row(ran.output, "kernel ")
    for name in compiler:
        assert row(ran.output, f" {name} ").split("│")[2:-1] == [
            f"{value:>{width}} "
            for value, width in zip((384, 168, 0, 232448, 16, 98765), (8, 10, 12, 13, 12, 12), strict=True)
        ]


@pytest.mark.parametrize(
    ("fact", "message"), [("stack_bytes", "it spills"), ("tensor_core_instructions", "no wgmma.mma_async")]
)
def test_check_fails_for_what_spills_or_has_no_wgmma(compiler, monkeypatch, fact, message):
    stub = cache.compiled
    bad = {"stack_bytes": dsl.MOST_STACK_BYTES + 8, "tensor_core_instructions": 0}[fact]
    monkeypatch.setattr(cache, "compiled", lambda *call: dataclasses.replace(stub(*call), **{fact: bad}))
    arguments = ["compile", "--model", "8,2,64,64", "--tokens", "1-2"]
    assert run_here(*arguments).exit_code == 0
    ran = run_here(*arguments, "--check")
    assert ran.exit_code == 1
    assert message in ran.output


def test_every_combination_of_a_list_is_compiled(compiler):
    arguments = "--tokens 1,100-101 --precision w4a16,w4a4 --combine atomic,ordered --out-dtype bfloat16,float32"
    assert run_here("compile", "--model", "8,2,64,64", *arguments.split()).exit_code == 0
    gemms = [name for name in compiler if "_gemm2_" in name]
    for parts in itertools.product(("_w4a16_", "_w4a4_"), ("atomic_bfloat16", "atomic_float32", "ordered_float32")):
        assert sum(all(part in name for part in parts) for name in gemms) == 2, (
            parts
        )  # the tiles of 1 and of 100 tokens


def test_processes_compile_every_kernel(monkeypatch, tmp_path):
    """What they find in the cache here, where there may be no compiler."""
    monkeypatch.setenv("JAX_MOE_CACHE_DIR", str(tmp_path))
    layer = {"top_k": 2, "local_experts": 8, "hidden_size": 64, "intermediate_size": 64}
    calls = [cuda_call.problem(num_tokens=tokens, **layer) for tokens in (1, 100)]
    wanted = {launch.spec for call in calls for launch in lowering.launches(call)}
    kernel = dsl.CompiledKernel(b"x" * 98765, "symbol", 384, 232448, (8,), 168, 0, 16)
    for spec in wanted:
        name = cache._file_name(spec, "sm_90a", cache._compiler_version() or "1.0")
        cache._write(cache.cache_folder() / name, kernel)
    ran = run_here("compile", "--model", "8,2,64,64", "--tokens", "1,100", "--jobs", "2")
    assert ran.exit_code == 0, ran.output
    assert all(row(ran.output, spec.name).count("98765") == 1 for spec in wanted)


def test_compile_without_the_compiler_is_one_plain_line(no_compiler):
    ran = run_here("compile", "--model", "8,2,64,64", "--tokens", "1")
    assert ran.exit_code == 1
    (line,) = ran.output.splitlines()
    assert "needs nvidia-cutlass-dsl" in line
    assert "pip install nvidia-cutlass-dsl" in line


@pytest.mark.parametrize(("command", "message"), [
    ("bench --model 99999999,2,48000,32000 --tokens 1", "not enough memory: "),
    (f"convert {CHECKPOINT} /dev/null", "File exists: '/dev/null'"),
    (f"convert {CHECKPOINT} /proc/nothing/out", "No such file or directory: '/proc/nothing'"),
    (f"inspect {CHECKPOINT / 'config.json'}", "found a file, expected a directory with a checkpoint"),
], ids=["memory", "file", "folder", "no directory"])  # fmt: skip
def test_what_the_machine_cannot_do_is_one_plain_line(command, message):
    ran = run_here(*shlex.split(command))
    assert ran.exit_code == 1
    (line,) = ran.output.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("failure", [RuntimeError("no GPU\nat all"), ImportError("no GPU")], ids=repr)
def test_a_device_or_a_library_that_fails_is_one_plain_line(monkeypatch, failure):
    def devices():
        raise failure

    monkeypatch.setattr(bench.jax, "devices", devices)
    ran = run_here("bench", "--model", "3,2,48,32")
    assert (ran.exit_code, ran.output) == (1, "error: no GPU\n")


def test_bench_without_a_kernel_prints_the_error_alone(no_compiler, monkeypatch):
    def time_op(*_):
        cache.compiled(specs.CombineSpec("float32"), "sm_90a")

    monkeypatch.setattr(bench, "time_op", time_op)
    ran = run_here("bench", "--model", "3,2,48,32")
    assert ran.exit_code == 1
    (line,) = ran.output.splitlines()
    assert "kernel jax_moe_combine_float32 for sm_90a is not in" in line


def test_a_table_is_complete_on_a_narrow_terminal():
    piped = run("inspect", str(CHECKPOINT)).stdout
    cells = [cell.strip() for cell in piped.splitlines()[4].split("│")[1:-1]]
    assert len(cells) == 13
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
