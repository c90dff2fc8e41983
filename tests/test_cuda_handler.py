"""The CUDA handler without a GPU: the real handler against a recording driver (ffi/tests/cuda), and its mutants.

Also what needs no driver at all: the library opens without CUDA and names its symbols.
"""

import os
import pathlib
import shutil
import subprocess

import jax
import pytest

_FFI = pathlib.Path(__file__).parents[1] / "ffi"
_COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(_COMPILER is None, reason="no C++ compiler to build the handler's test with")

# A mutant is a wrong handler: (file, what is there, what stands there instead). Every one must fail the test.
_MUTANTS = {
    "zeroing forgotten": ("cuda/handler.cc", "driver_.cuMemsetD8Async(Address(destination), 0, bytes, stream)", "0"),
    "captured zeroing forgotten": (
        "launch_sequence.h",
        "if (!run(LaunchStep::kZero, api.AddZeroNode(stream, output, plan.output_bytes, &zeroed))) return result;",
        "",
    ),
    "join forgotten": ("launch_sequence.h", "= api.AddDependency(stream, zeroed);", "= 0;"),
    "join replaces": ("cuda/handler.cc", "&node, 1, kAddCaptureDependencies", "&node, 1, kSetCaptureDependencies"),
    "zeroing depends on nothing": ("cuda/handler.cc", "capture.num_dependencies, &params", "0, &params"),
    "half zeroed": ("cuda/handler.cc", "bytes / element_bytes, 1}", "bytes / element_bytes / 2, 1}"),
    "capture taken for eager": (
        "cuda/handler.cc",
        "*capturing = status == kCaptureActive;",
        "*capturing = false;",
    ),
    "alignment unchecked": ("cuda/handler.cc", "% kAlignment == 0", "% 1 == 0"),
    "shape unchecked": ("cuda/handler.cc", "if (shape != program.shape())", "if (false)"),
    "kernels not kept by context": ("cuda/program.cc", "driver.cuCtxGetId(context, id)", "(*id = 1, kSuccess)"),
    "runs unloaded": ("cuda/program.cc", "if (found == functions_.end()) return", "if (found == functions_.end()) (void)"),
}  # fmt: skip


def _compile(folder: pathlib.Path, source: str, include: pathlib.Path = _FFI) -> pathlib.Path:
    path = include / source if (include / source).exists() else _FFI / source
    target = folder / (path.stem + ".o")
    flags = ["-std=c++20", "-O0", "-c", "-pthread"]
    includes = [f"-I{include}", f"-I{_FFI}", f"-I{_FFI / 'tests/cuda'}", f"-isystem{jax.ffi.include_dir()}"]
    built = subprocess.run([_COMPILER, *flags, *includes, path, "-o", target], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target


def _run(folder: pathlib.Path, objects) -> subprocess.CompletedProcess:
    program = folder / "handler_test"
    linked = subprocess.run([_COMPILER, *objects, "-ldl", "-pthread", "-o", program], capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    return subprocess.run([program], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The objects of the unchanged handler and of its test, by source."""
    folder = tmp_path_factory.mktemp("handler")
    sources = ["tests/cuda/handler_test.cc", "cuda/driver.cc", "cuda/program.cc", "cuda/handler.cc"]
    built = {}
    for source in sources:
        (folder / source).parent.mkdir(parents=True, exist_ok=True)
        built[source] = _compile((folder / source).parent, source)
    return built


def test_handler_against_the_recording_driver(objects, tmp_path):
    ran = _run(tmp_path, objects.values())
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("name", _MUTANTS)
def test_a_mutant_of_the_handler_fails(name, objects, tmp_path):
    source, original, replacement = _MUTANTS[name]
    text = (_FFI / source).read_text()
    assert text.count(original) >= 1, f"the mutant no longer applies to {source}"
    mutated = tmp_path / source
    mutated.parent.mkdir(parents=True, exist_ok=True)
    mutated.write_text(text.replace(original, replacement))
    unit = source if source.endswith(".cc") else "cuda/handler.cc"
    if unit != source:  # a header: compile its user where the changed one is found first
        (tmp_path / unit).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_FFI / unit, tmp_path / unit)
    ran = _run(tmp_path, {**objects, unit: _compile(tmp_path, unit, include=tmp_path)}.values())
    assert ran.returncode != 0, "the mutant survived"


def test_the_drivers_interface_is_nvidias(tmp_path):
    """driver.h repeats structs and constants; compare them with cuda.h where that is installed."""
    roots = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr"]
    header = next((root for root in roots if (pathlib.Path(root) / "include/cuda.h").exists()), None)
    if header is None:
        pytest.skip("cuda.h is not installed (CUDA_HOME or /usr/local/cuda)")
    command = [_COMPILER, "-std=c++20", "-fsyntax-only", f"-I{_FFI}", f"-I{header}/include"]
    checked = subprocess.run([*command, _FFI / "tests/cuda/driver_abi_test.cc"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
