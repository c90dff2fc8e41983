"""Kernels with their PTX, compiled once for the emulator, the lint and the tests of machine code.

Kept on disk beside the kernels and under their keys (``jax_moe/kernels/cache.py``), where other test files and other
processes find them.
"""

import contextlib
import fcntl
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
    text = path.with_suffix(".ptx")
    with only_one(path):
        if (kernel := cache._read(path)) is None:
            with cache._lock:
                kernel, made = compiler.compile_with_ptx(spec, target)
            text.write_text(made)
            cache._write(path, kernel)  # after its PTX: where this is, both are whole
        return kernel, text.read_text()


@contextlib.contextmanager
def only_one(path: pathlib.Path):
    """Of the processes that make ``path``: whoever waited finds it made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield
