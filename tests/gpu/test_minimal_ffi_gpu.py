"""``examples/minimal_ffi_gpu`` on a GPU: eager, captured and replayed, against ``jax.ops.segment_sum``.

The example compiles its kernel. Where the GPU is and the DSL is not, it takes the machine code that this test left in
the kernel cache where ``JAX_MOE_COMPILE_ONLY`` ran it.
"""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import calls
import pytest

from jax_moe.kernels import cache

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "minimal_ffi_gpu"
COMPILED = "minimal_ffi_gpu.json"
READ_COMPILED = """
import json

def machine_code(arch):
    made = json.load(open({file!r}))[arch]
    return bytes.fromhex(made["image"]), made["name"]
"""
COMPILE = """
import json, kernel
image, name = kernel.machine_code({arch!r})
print(json.dumps({{{arch!r}: {{"image": bytes(image).hex(), "name": name}}}}))
"""


def test_the_example(tmp_path):
    folder = shutil.copytree(EXAMPLE, tmp_path / "example", ignore=shutil.ignore_patterns("*.so"))
    compiled = cache.cache_folder() / COMPILED
    if importlib.util.find_spec("cutlass") is None:
        if not compiled.exists():
            pytest.skip("the example compiles its kernel with CuTe DSL")
        (folder / "kernel.py").write_text(READ_COMPILED.format(file=str(compiled)))
    elif calls.COMPILE_ONLY:
        compiled.parent.mkdir(parents=True, exist_ok=True)
        compiled.write_text(json.dumps(json.loads(_run(["-c", COMPILE.format(arch="sm_90a")], folder))))
    output = _run(["segment_sum.py"], folder)
    calls.require_gpu()
    assert "eager and captured: as jax.ops.segment_sum, 8 times each" in output


def _run(arguments: list[str], folder: pathlib.Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
