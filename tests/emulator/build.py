"""The machine as a shared library: compiled by g++ the first time, then taken from a cache folder."""

import concurrent.futures
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

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
    files = sorted(SOURCES.iterdir())
    digest = hashlib.sha256(repr(_FLAGS).encode() + _processor().encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    path = settings.cache_folder() / "emulator" / f"machine-{digest.hexdigest()[:24]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            sources = [file for file in files if file.suffix == ".cc"]
            objects = [pathlib.Path(folder) / f"{file.stem}.o" for file in sources]
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_compile, sources, objects))
            built = pathlib.Path(folder) / path.name
            _run([COMPILER, "-shared", *map(str, objects), "-o", str(built)])
            os.replace(built, path)
    return path


def _compile(source: pathlib.Path, output: pathlib.Path) -> None:
    _run([str(COMPILER), *_FLAGS, "-c", str(source), "-o", str(output)])


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stderr}")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
