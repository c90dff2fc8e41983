"""Kernels with their PTX, compiled once for the emulator, the lint and the tests of machine code.

Kept on disk beside the kernels and under their keys (``jax_moe/kernels/cache.py``), where other test files and other
processes find them.
"""

import base64
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib

from jax_moe.kernels import cache, compiler
from jax_moe.kernels.compiler import CompiledKernel
from jax_moe.kernels.specs import Spec


def kernel_and_ptx(spec: Spec, target: str) -> tuple[CompiledKernel, str]:
    """The kernel of ``spec``, and the PTX that it was made of: from disk, or compiled now.

    Raises:
      MissingKernelError: the DSL is not installed.
    """
    version = cache._compiler_version()
    if version is None:
        raise cache.MissingKernelError(f"{compiler.PACKAGE} is not installed to compile {spec.name}")
    path = cache.cache_folder().with_name("kernels_with_ptx") / cache._file_name(spec, target, version)
    with only_one(path):
        if not path.exists():
            with cache._lock:
                kernel, text = compiler.compile_with_ptx(spec, target)
            fields = dataclasses.asdict(kernel) | {"image": base64.b64encode(kernel.image).decode()}
            part = path.with_suffix(".tmp")
            part.write_text(json.dumps({"ptx": text, "kernel": fields}))
            os.replace(part, path)
    found = json.loads(path.read_text())
    fields = found["kernel"]
    fields |= {"image": base64.b64decode(fields["image"]), "parameter_bytes": tuple(fields["parameter_bytes"])}
    return CompiledKernel(**fields), found["ptx"]


@contextlib.contextmanager
def only_one(path: pathlib.Path):
    """Of the processes that make ``path``: whoever waited finds it made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield
