"""Programs that leave the process: exported ones carry their kernels along, compiled ones are found again by JAX."""

import functools
import importlib.metadata
import os

import calls
import helpers
import jax
import pytest

_CASE = """
import pathlib, sys, functools
import jax, numpy as np
import helpers, jax_moe
case = helpers.make_case(9, tokens=16, hidden=128, intermediate=64, combine="ordered")
experts = jax_moe.prepare(case.experts, precision="w4a16", progress=False)  # for the GPU that is the default device
op = jax.jit(functools.partial(jax_moe.fused_moe, combine="ordered"))
folder = pathlib.Path(sys.argv[1])
"""
_EXPORT = (
    _CASE
    + """
exported = jax.export.export(op, disabled_checks=jax_moe.export_checks())(case.x, experts, case.routing)
(folder / "op").write_bytes(exported.serialize())
np.save(folder / "out", np.asarray(op(case.x, experts, case.routing)).astype(np.float32))
"""
)
_IMPORT = (
    _CASE
    + """
op = jax.export.deserialize((folder / "op").read_bytes()).call
for _ in range(3):
    out = op(case.x, experts, case.routing)
np.testing.assert_array_equal(np.asarray(out).astype(np.float32), np.load(folder / "out.npy"))
"""
)
_RUN = _CASE + "op(case.x, experts, case.routing).block_until_ready()"


def _on_gpu(program: str, *args, **environment) -> str:
    if calls.why_not_run():  # the kernels of _CASE
        case = helpers.make_case(9, tokens=16, hidden=128, intermediate=64, combine="ordered")
        experts = calls.prepared(case).experts
        calls.jit(functools.partial(helpers.jax_moe.fused_moe, combine="ordered"), {})(case.x, experts, case.routing)
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return helpers.run_python(program, *args, JAX_PLATFORMS="cuda,cpu", **memory, **environment)


def test_an_exported_call_needs_neither_cache_nor_compiler(tmp_path):
    _on_gpu(_EXPORT, tmp_path)
    empty = tmp_path / "empty"
    _on_gpu(_IMPORT, tmp_path, JAX_MOE_CACHE_DIR=str(empty))
    assert not empty.exists()


def test_jax_finds_the_compiled_program_again(tmp_path):
    cache = tmp_path / "cache"
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    _on_gpu(_RUN, tmp_path, **settings)
    programs = _files(cache)
    assert programs
    _on_gpu(_RUN, tmp_path, **settings)
    assert _files(cache) == programs


def _files(cache) -> set[str]:
    return {name for name in os.listdir(cache) if not name.endswith("-atime")}


def test_a_missing_kernel_is_an_error_that_names_the_command(tmp_path, monkeypatch):
    calls.require_gpu()
    if "nvidia-cutlass-dsl" in {d.name for d in importlib.metadata.distributions()}:
        pytest.skip("nvidia-cutlass-dsl is installed: nothing is ever missing")
    monkeypatch.setenv("JAX_MOE_CACHE_DIR", str(tmp_path))
    case = helpers.make_case(10)
    experts = calls.prepared(case).experts
    command = f"python -m jax_moe compile --target {calls.target().name} --card .* --layer 4,2,48,64 --tokens 5"
    with pytest.raises(RuntimeError, match=command):
        jax.jit(helpers.jax_moe.fused_moe)(case.x, experts, case.routing)
