"""``examples/minimal_ffi_gpu`` on a GPU: eager, captured and replayed, against ``jax.ops.segment_sum``."""

import pathlib
import shutil
import subprocess
import sys

import pytest

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "minimal_ffi_gpu"


@pytest.mark.gpu
def test_the_example(tmp_path):
    pytest.importorskip("cutlass", reason="the example compiles its kernel with CuTe DSL")
    folder = shutil.copytree(EXAMPLE, tmp_path / "example", ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, str(folder / "segment_sum.py")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "eager and captured: as jax.ops.segment_sum, 8 times each" in output
