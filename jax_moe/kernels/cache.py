"""Compiled kernels, kept in memory and on disk.

The cache is a folder of JSON files, one a kernel, written whole and then renamed into place, so that processes
may share it, over a network file system too. A file's name holds what the kernel depends on: the target, all that the
spec says, the sources of device code and the compiler. Neither other host code nor a comment is among them.
"""

import ast
import base64
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import re
import tempfile
import threading
import tokenize
from typing import Any
import warnings

from jax_moe import settings
from jax_moe.kernels import compiler
from jax_moe.kernels.compiler import CompiledKernel
from jax_moe.kernels.specs import Spec

_VERSION = "1"  # of what compiler.py asks for and reads, which is host code and so in no other part of the key
_lock = threading.Lock()  # the DSL keeps its state in globals; and whoever waited finds the kernel on disk


class MissingKernelError(RuntimeError):
    """A kernel is not in the cache, and the DSL that could compile it is not installed."""


def cache_folder() -> pathlib.Path:
    """Where kernels are kept: ``$JAX_MOE_CACHE_DIR/kernels``, or in the user's cache folder."""
    return settings.cache_folder() / "kernels"


def compiled(spec: Spec, target: str) -> CompiledKernel:
    """The kernel of ``spec`` for ``target``: from memory, from disk, or compiled now.

    Args:
      spec: the kernel.
      target: the architecture, as the compiler names it.

    Raises:
      MissingKernelError: it would have to be compiled, and the DSL is not installed.
    """
    return _compiled(spec, target, cache_folder())


@functools.cache
def _compiled(spec: Spec, target: str, folder: pathlib.Path) -> CompiledKernel:
    version = _compiler_version()
    with _lock:
        for path in _candidates(spec, target, folder, version):
            if (found := _read(path)) is not None:
                return found
        if version is None:
            raise MissingKernelError(
                f"jax_moe: kernel {spec.name} for {target} is not in {folder}, and {compiler.PACKAGE} is not installed "
                "to compile it."
            )
        kernel = compiler.compile(spec, target)
        try:
            _write(folder / _file_name(spec, target, version), kernel)
        except OSError as error:
            warnings.warn(f"jax_moe: kernel {spec.name} was compiled, but not kept: {error}", stacklevel=2)
    return kernel


def _compiler_version() -> str | None:
    """The installed DSL, as part of a file name: its version, and a digest of its settings: some change its output."""
    try:
        version = importlib.metadata.version(compiler.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    settings = sorted(item for item in os.environ.items() if item[0].startswith("CUTE_DSL_"))
    return f"{version}-{_digest(repr(settings).encode())[:8]}" if settings else version


@functools.cache
def _source_digest(implementation: str) -> str:
    """Of the device code that the kernel may consist of: what lies beside its module, and what all targets share."""
    module = importlib.util.find_spec(implementation.partition(":")[0])
    assert module is not None, implementation
    assert module.origin is not None, implementation
    digest = hashlib.sha256()
    for folder in (pathlib.Path(__file__).parent / "device", pathlib.Path(module.origin).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n{_code_of(path.read_text())}\0".encode())
    return digest.hexdigest()


def _code_of(source: str) -> str:
    """A module's lines without comments, docstrings and what then is empty."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[number - 1] = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_name(spec: Spec, target: str, version: str) -> str:
    return f"{_prefix(spec, target)}.{version}.json"


def _prefix(spec: Spec, target: str) -> str:
    return f"{target}.{_digest((_VERSION + _source_digest(spec.implementation) + _facts(spec)).encode())[:32]}"


def _facts(value: Any) -> str:
    """All that a spec says: fields, and constants and properties too, which device code reads as well."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    facts = {name: getattr(value, name) for name in dir(value) if not name.startswith("_")}
    said = [f"{name}={_facts(fact)}" for name, fact in facts.items() if not callable(fact)]
    return f"{type(value).__name__}({', '.join(said)})"


def _candidates(spec: Spec, target: str, folder: pathlib.Path, version: str | None) -> list[pathlib.Path]:
    """Files that may hold the kernel. Without a compiler of our own, any version's will do.

    Released versions without settings come first, and among them the newest.
    """
    if version is not None:
        return [folder / _file_name(spec, target, version)]
    prefix, suffix = _prefix(spec, target) + ".", ".json"

    def rank(path: pathlib.Path) -> tuple[bool, list[int]]:
        other = path.name[len(prefix) : -len(suffix)]
        return re.fullmatch(r"[0-9.]+", other) is not None, [int(n) for n in re.findall(r"\d+", other)]

    return sorted(folder.glob(f"{prefix}*{suffix}"), key=rank, reverse=True)


def _read(path: pathlib.Path) -> CompiledKernel | None:
    """The kernel in a file; None if there is none, or a damaged one, which is then compiled anew."""
    try:
        fields = json.loads(path.read_text())
        if fields.pop("sha256") != _digest_of(fields):
            return None
        image = base64.b64decode(fields.pop("image"), validate=True)
        return CompiledKernel(image=image, **{**fields, "parameter_bytes": tuple(fields["parameter_bytes"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest_of(fields: dict[str, Any]) -> str:
    return _digest(json.dumps(fields, sort_keys=True).encode())


def _write(path: pathlib.Path, kernel: CompiledKernel) -> None:
    fields = dataclasses.asdict(kernel)
    fields["image"] = base64.b64encode(kernel.image).decode()
    fields["sha256"] = _digest_of(fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own first: whoever reads meanwhile sees the whole file or none.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
        try:
            json.dump(fields, file)
            file.flush()
            os.chmod(file.name, 0o644)  # a shared folder's other users read it too
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
