"""The machine as a shared library: compiled by g++ the first time, then taken from a cache folder."""

import concurrent.futures
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess

import compiled_once

from jax_moe import settings

SOURCES = pathlib.Path(__file__).parent / "machine"
COMPILER = os.environ.get("CXX") or shutil.which("g++")
# Without contraction: a product and a sum are rounded each on its own, as PTX says.
_FLAGS = (
    "-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-Wall", "-Wextra",
)  # fmt: skip


@functools.cache
def library() -> pathlib.Path:
    """The library's path.

    Raises:
      RuntimeError: there is no compiler, or it fails.
    """
    if COMPILER is None:
        raise RuntimeError("the emulator is compiled with g++, which is not here")
    common = [
        repr(_FLAGS).encode(),
        _processor().encode(),
        *(path.read_bytes() for path in sorted(SOURCES.glob("*.h"))),
    ]
    folder = settings.cache_folder() / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(SOURCES.glob("*.cc"))
    objects = [folder / f"{source.stem}-{_digest([*common, source.read_bytes()])}.o" for source in sources]
    path = folder / f"machine-{_digest([file.name.encode() for file in objects])}.so"
    with compiled_once.only_one(path):
        if not path.exists():
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_compile, sources, objects))
            _make(path, "-shared", *map(str, objects))
    return path


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compile(source: pathlib.Path, output: pathlib.Path) -> None:
    if not output.exists():
        _make(output, *_FLAGS, "-c", str(source))


def _make(output: pathlib.Path, *arguments: str) -> None:
    """Under a name of its own first: other processes see the whole file or none."""
    part = output.with_name(f"{os.getpid()}-{output.name}")
    ran = subprocess.run([str(COMPILER), *arguments, "-o", str(part)], capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"{COMPILER} {' '.join(arguments)}\n{ran.stderr}")
    os.replace(part, output)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
