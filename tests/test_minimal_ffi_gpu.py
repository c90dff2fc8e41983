"""``examples/minimal_ffi_gpu`` without a GPU: it builds, its kernel adds atomically, and the program is one call."""

import importlib.util
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "minimal_ffi_gpu"


@pytest.mark.skipif(shutil.which("g++") is None, reason="the example builds its op with g++, which is not here")
def test_the_handler_builds_without_a_warning_and_has_its_stages(tmp_path):
    """With any jax that we support: its headers are what the example compiles against."""
    library = tmp_path / "libsegment_sum.so"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-isystem", jax.ffi.include_dir()]
    subprocess.run(["g++", *flags, str(EXAMPLE / "segment_sum.cc"), "-o", str(library), "-ldl"], check=True)
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(library)], check=True, capture_output=True, text=True)
    stages = ("Instantiate", "Initialize", "Execute", "TypeId", "TypeInfo")
    assert all(f" SegmentSum{stage}\n" in symbols.stdout for stage in stages)


@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="the kernel is compiled by CuTe DSL")
def test_the_example_runs_without_a_gpu(tmp_path):
    # A copy, because it builds its library beside itself, on the headers of the jax that runs it.
    folder = shutil.copytree(EXAMPLE, tmp_path / "example", ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, str(folder / "segment_sum.py")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "bytes of machine code" in output
    assert "lowered to 1 custom call" in output
