"""The CUDA handler called with kernels of a test's own choosing, and handlers that are wrong on purpose."""

import contextlib
import ctypes
import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from product_cases import ProductCase
import pytest
from raw_call import raw_call

import jax_moe
from jax_moe import ffi, placement, preparation
from jax_moe.kernels import targets
from jax_moe.kernels.target import Target

FOLDER = pathlib.Path(__file__).parent
FFI = FOLDER.parents[1] / "ffi"
_COMPILER = os.environ.get("CXX", "g++")

Weights = TypeVar("Weights", jax_moe.Experts, jax_moe.Projection)

COMPILE_ONLY = os.environ.get("JAX_MOE_COMPILE_ONLY", "")
"""Fill the kernel cache, for a machine that has a GPU and no compiler: 1, or the name of its card."""


@functools.cache
def _target() -> Target | str:
    """The target of the GPU at hand, or why there is none."""
    try:
        return targets.for_device(jax.devices("gpu")[0])
    except RuntimeError:
        return "needs an NVIDIA GPU: lowered, not run"
    except ValueError as error:
        return str(error)


@functools.cache
def why_not_run() -> str | None:
    """Why nothing can run here; None: it can.

    Then every test of this folder goes as far as it can: handlers are patched and built, programs lowered for a GPU.
    Only what would run is skipped, so that what only a GPU can run does not rot where there is none.
    """
    if COMPILE_ONLY:
        return "JAX_MOE_COMPILE_ONLY: compiled, not run"
    found = _target()
    return found if isinstance(found, str) else None


def planned():
    """A context in which calls are planned for the card that :data:`COMPILE_ONLY` names."""
    if COMPILE_ONLY in ("", "1"):
        return contextlib.nullcontext()
    return targets.planned_for(targets.card_named(target(), COMPILE_ONLY))


def target() -> Target:
    """What these tests prepare weights and compile kernels for: this machine's GPU, or else the first target."""
    found = _target()
    return next(iter(targets.TARGETS.values())) if isinstance(found, str) else found


def prepare(experts: Weights, precision: str = "w4a16") -> Weights:
    """Weights as :func:`target` reads them; where nothing can run, some of the same types and in the same places.

    Their values are not read then: what ``prepare`` computes, on a mesh too, is for tests/test_prepare.py.
    """
    if why_not_run() is None:
        return jax_moe.prepare(experts, target().name, precision, progress=False)  # type: ignore[arg-type]
    leaves, structure = jax.tree.flatten(experts)
    key = structure, precision, *((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
    if key not in _prepared:
        _prepared[key] = _zeros_as_prepared(experts, precision)
    return _prepared[key]


def _zeros_as_prepared(experts: Weights, precision: str) -> Weights:
    """Traced, not compiled: that is most of what a test of this folder would cost."""
    layout = targets.layout_for(target().name, precision).name  # type: ignore[arg-type]
    if isinstance(experts, jax_moe.Projection):
        types = jax.eval_shape(functools.partial(jax_moe.prepare, target=layout, progress=False), experts)
        return jax.tree.map(lambda type_: jnp.zeros(type_.shape, type_.dtype), types)
    where = placement.find(experts)
    if where.mesh is None:
        types = jax.eval_shape(functools.partial(jax_moe.prepare, target=layout, progress=False), experts)
        sharding = experts.gate_up.payload.sharding
        if isinstance(sharding, NamedSharding):  # a copy on each device
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        shardings = jax.tree.map(lambda _: sharding, types)
    else:
        run, arguments = preparation._prepare_in_place._bind(experts, (layout,))
        types = jax.eval_shape(run, *arguments)
        shardings = jax.tree.map(lambda spec: NamedSharding(where.mesh, spec), where.specs(types))
    return jax.tree.map(lambda type_, s: jax.device_put(np.zeros(type_.shape, type_.dtype), s), types, shardings)


_prepared: dict[tuple, Any] = {}


def prepared(case):
    """A case of ``helpers.make_case`` whose experts are."""
    return dataclasses.replace(case, experts=prepare(case.experts, case.options.get("precision", "w4a16")))


def jit(function, compiler_options, **options):
    """``jax.jit``; where nothing can run, a call lowers for a GPU, which compiles the kernels, and skips the test."""
    jitted = jax.jit(function, compiler_options=dict(compiler_options), **options)
    if why_not_run() is None:
        return jitted

    def lower_and_skip(*arguments):
        lower(jitted, *arguments)
        require_gpu()

    return lower_and_skip


def lower(jitted, *arguments) -> None:
    """Lowers a jitted function for a GPU, wherever this is; that compiles its kernels."""
    jitted.trace(*arguments).lower(lowering_platforms=("cuda",))


def eager(function):
    """The function itself; where nothing can run, as :func:`jit`."""
    return function if why_not_run() is None else jit(function, {})


def devices(count: int) -> list[jax.Device]:
    """The first GPUs, or skips the test; where nothing can run, the first devices of any kind."""
    found = [device for device in jax.devices() if why_not_run() or device.platform == "gpu"]
    if len(found) < count:
        pytest.skip(f"needs {count} GPUs")
    return found[:count]


def require_gpu() -> None:
    """Skips the rest of a test where nothing can run."""
    if reason := why_not_run():
        pytest.skip(reason)


@functools.cache
def launch_kernels(build_folder: pathlib.Path) -> bytes:
    """launch_kernels.cu as a cubin; where nothing can run and there is no nvcc, a stand-in for one."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if why_not_run() and not os.path.exists(nvcc):
        return b"stand-in"
    image = build_folder / "launch_kernels.cubin"
    code = target().name
    architecture = f"arch={code.replace('sm_', 'compute_')},code={code}"
    subprocess.run([nvcc, "-cubin", "-gencode", architecture, "-o", image, FOLDER / "launch_kernels.cu"], check=True)
    return image.read_bytes()


def step(image: bytes, name: str, arguments: str = "", *, grid=1, threads=1, cluster=1, shared=0) -> dict:
    """One launch of a call, as ``ffi/cuda/program.h`` reads it."""
    numbers = {"grid": grid, "threads": threads, "cluster": cluster, "shared": shared, "overlap": 0}
    return {"image": image, "name": name, "arguments": arguments or "null"} | {
        k: np.int64(v) for k, v in numbers.items()
    }


def call(
    x, steps, *, target=ffi.TARGET, combine="atomic", expert_ids=None, routing_weights=None, num_experts=1,
    expert_offset=0, input_scale=None, workspaces=(), out_dtype=jnp.float32,
) -> list[jax.Array]:  # fmt: skip
    """All results of the custom call, workspaces included; the weights are a few bytes that no kernel reads.

    ``steps`` are launched in their order; the first that is given the output (``result:0``) adds into it, if any does.
    """
    tokens, hidden = x.shape
    if expert_ids is None:
        expert_ids, routing_weights = jnp.zeros((tokens, 1), jnp.int32), jnp.ones((tokens, 1), jnp.float32)
    slots = expert_ids.shape[1]
    absent = jnp.zeros((0,), jnp.float32)
    payload, block_scale = jnp.zeros((16,), jnp.uint8), jnp.zeros((num_experts, 0), jnp.float8_e4m3fn)
    scales = jnp.ones((num_experts,), jnp.float32)
    operands = (
        x, expert_ids, routing_weights, jnp.asarray(expert_offset, jnp.int32),
        payload, block_scale, jnp.ones((num_experts, 2), jnp.float32),
        absent if input_scale is None else input_scale, absent,
        payload, block_scale, scales, absent, absent,
    )  # fmt: skip
    results = [jax.ShapeDtypeStruct(x.shape, out_dtype), *workspaces]
    sizes = {
        "num_tokens": tokens, "top_k": slots, "local_experts": num_experts, "num_parts": 2, "hidden_size": hidden,
        "intermediate_size": 64, "out_bytes": jnp.dtype(out_dtype).itemsize,
    }  # fmt: skip
    weight_bytes = {"gate_up.payload": 16, "gate_up.block_scale": 0, "down.payload": 16, "down.block_scale": 0}
    steps = steps if tokens else {}
    first = next((name for name, step in steps.items() if "result:0" in step["arguments"].split()), "")
    kernels = {
        **steps,
        "launches": " ".join(steps),
        "adds": first if combine == "atomic" else "",
        "sizes": {name: np.int64(size) for name, size in sizes.items()},
        "weight_bytes": {name: np.int64(size) for name, size in weight_bytes.items()},
        "workspace_bytes": np.array([w.size * w.dtype.itemsize for w in workspaces], np.int64),
    }
    attributes = {
        "precision": "w4a16", "combine": combine, "weight_on": "output", "activation": "swiglu",
        "alpha": np.float32(1), "beta": np.float32(0), "limit": np.float32(np.inf), "kernels": kernels,
    }  # fmt: skip
    return raw_call(target, results, attributes, *operands)


def product(case: ProductCase, **options):
    """The grouped product of ``case`` as a function of x, group sizes, offset and weights; and these, prepared.

    ``options``: further ones of ``ragged_dot``.
    """
    if target().product is None:
        pytest.skip(f"no grouped products for {target().name} yet")

    def function(x, group_sizes, group_offset, weights):
        return jax_moe.ragged_dot(
            x, weights, group_sizes, group_offset=group_offset, precision=case.precision, out_dtype=case.out_dtype,
            **options,
        )  # fmt: skip

    return function, prepare(case.weights, case.precision)


def register_changed(name: str, changes: dict[str, tuple[str, str]], build_folder: pathlib.Path) -> str:
    """Builds the library's CUDA half with some changes and registers it; returns the name of its target.

    ``changes``: by file, what is there and what is to stand there instead.
    """
    sources = build_folder / name
    shutil.copytree(FFI, sources, ignore=shutil.ignore_patterns("tests", "build"))
    for file, (original, replacement) in changes.items():
        text = (sources / file).read_text()
        assert original in text, f"the change no longer applies to {file}"
        (sources / file).write_text(text.replace(original, replacement))
    objects, read = [], []
    for unit in ("driver", "handler", "program"):
        unchanged = _object(unit, FFI, build_folder)
        of_unit = unchanged.with_suffix(".d").read_text().split()
        changed = any(str(FFI / file) in of_unit for file in changes)
        objects.append(_object(unit, sources, sources) if changed else unchanged)
        read += of_unit
    assert all(str(FFI / file) in read for file in changes), "a changed file that no unit reads changes nothing"
    library = sources / "changed.so"
    subprocess.run([_COMPILER, "-shared", *objects, "-ldl", "-o", library], check=True)
    return register(f"jax_moe_test_{name}", ctypes.CDLL(str(library)))


@functools.cache
def _object(unit: str, sources: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A unit of the library's CUDA half, compiled; beside it, what it reads, as for make."""
    made = folder / f"{unit}.o"
    includes = [f"-I{sources}", f"-isystem{jax.ffi.include_dir()}"]
    command = [_COMPILER, "-std=c++20", "-O0", "-fPIC", "-c", "-MMD", *includes, sources / "cuda" / f"{unit}.cc"]
    subprocess.run([*command, "-o", made], check=True)
    return made


def register(target: str, library: ctypes.CDLL) -> str:
    """Registers the handler of ``library``, which is not jax_moe's own, under a name of its own."""
    capsules = {}
    for key, getter in (("type_id", library.JaxMoeCudaTypeId), ("type_info", library.JaxMoeCudaTypeInfo)):
        getter.restype = ctypes.c_void_p
        capsules[key] = jax.ffi.pycapsule(getter())
    jax.ffi.register_ffi_type(f"{target}_state", capsules, platform="CUDA")
    stages = {
        "instantiate": library.JaxMoeFusedMoeCudaInstantiate,
        "initialize": library.JaxMoeCudaInitialize,
        "execute": library.JaxMoeCuda,
    }
    jax.ffi.register_ffi_target(target, {k: jax.ffi.pycapsule(v) for k, v in stages.items()}, platform="CUDA")
    return target
