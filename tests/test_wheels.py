"""What `make wheels` leaves in dist/: what the wheels hold and need, and that all builds compute the same bits.

With MANYLINUX set, as .ci/run sets it, they must be there, and these tests must run on one of them.
"""

import email
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import jax_moe
from jax_moe import ffi

ROOT = pathlib.Path(__file__).parents[1]
MUST_BE_THERE = bool(os.environ.get("MANYLINUX"))
ARCHITECTURES = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
LIBRARY = "jax_moe/lib/libjax_moe_ffi.so"


def _missing(what: str) -> None:
    (pytest.fail if MUST_BE_THERE else pytest.skip)(what)


def _sources() -> dict[str, bytes]:
    """What a wheel has of the checkout, by name."""
    listed = subprocess.run(["git", "ls-files", "jax_moe"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return {name: (ROOT / name).read_bytes() for name in listed.stdout.split()}


@pytest.fixture(scope="module")
def wheels() -> dict[str, zipfile.ZipFile]:
    """The wheels by architecture."""
    found = {}
    for architecture in ARCHITECTURES:
        paths = list(ROOT.glob(f"dist/jax_moe-{jax_moe.__version__}-py3-none-manylinux_2_28_{architecture}.whl"))
        if len(paths) != 1:
            _missing(f"`make wheels` has not been run: {len(paths)} wheels for {architecture}")
        found[architecture] = zipfile.ZipFile(paths[0])
    return found


@pytest.fixture(scope="module")
def sdist() -> pathlib.Path:
    paths = list(ROOT.glob(f"dist/jax_moe-{jax_moe.__version__}.tar.gz"))
    if not paths:
        _missing("`make wheels` has not been run: no source archive")
    return paths[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_wheel_is_the_checkout_and_the_library(wheels, architecture):
    """Byte for byte: so programs that tests start here, which find the checkout first, run the wheel's Python too."""
    wheel = wheels[architecture]
    inside = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    inside.pop(LIBRARY)
    sources = _sources()
    if inside != sources and not MUST_BE_THERE:
        pytest.skip("dist/ was made of other sources: run `make wheels` again")
    assert sorted(inside) == sorted(sources)
    assert inside == sources


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_wheel_says_what_it_is_for(wheels, architecture):
    wheel = wheels[architecture]
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL"))
    about = email.message_from_bytes(wheel.read(name))
    assert about.get_all("Tag") == [f"py3-none-manylinux_2_28_{architecture}"]
    assert about["Root-Is-Purelib"] == "false"
    assert pathlib.Path(wheel.filename).stat().st_size < 2_000_000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_library_needs_glibc_alone_and_shows_its_handlers_alone(wheels, architecture):
    elffile = pytest.importorskip("elftools.elf.elffile")
    elf = elffile.ELFFile(io.BytesIO(wheels[architecture].read(LIBRARY)))
    assert elf["e_machine"] == ARCHITECTURES[architecture]
    assert not [section.name for section in elf.iter_sections() if re.match(r"\.(symtab|debug)", section.name)]

    needed = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    glibc = {"libc.so.6", "libdl.so.2", "libpthread.so.0", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert needed <= glibc
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    exported = {symbol.name for symbol in symbols if symbol["st_shndx"] != "SHN_UNDEF"}
    assert {"JaxMoeFusedMoeCpu", "JaxMoeRaggedDotCpu", "JaxMoeCuda", "JaxMoeFfiVersion"} <= exported
    assert {name for name in exported if not name.startswith("JaxMoe")} == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auditwheel_finds_nothing_newer_than_the_tag(wheels, architecture):
    pytest.importorskip("auditwheel")
    command = [sys.executable, "-m", "auditwheel", "show", wheels[architecture].filename]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    found = re.search(
        rf'consistent with\s+the following platform tag:\s+"manylinux_2_(\d+)_{architecture}"', shown.stdout
    )
    assert found, shown.stdout
    assert int(found[1]) <= 28


# --- Every build gives the same bits ------------------------------------------------------------------------------

_SEEDS = (1, 11, 99)
_CALLS = 4000


def _best_kernels() -> str:
    flags = set(re.search(r"^flags\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    if not {"avx2", "fma"} <= flags:
        return "baseline"
    return "avx512" if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags else "avx2"


def _digests(command: list, kernels: str, **environment: str) -> list[str]:
    """What hostile_calls says of each seed's calls: how many were refused, how many accepted, and the digest.

    All were computed by ``kernels``: a library that finds no instruction set passes every test of its bits, slowly.
    """
    lines = []
    for seed in _SEEDS:
        ran = subprocess.run(
            [*command, str(seed), str(_CALLS)], capture_output=True, text=True, env=os.environ | environment
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        said = re.fullmatch(r"(\w+) kernels, (seed \d+: .* digest [0-9a-f]{16})\n", ran.stdout)
        assert said, ran.stdout
        assert said[1] == kernels
        lines.append(said[2])
    return lines


def _hostile_calls(architecture: str) -> pathlib.Path:
    """The program that the wheel's build left; it loads whichever library LD_LIBRARY_PATH names."""
    path = ROOT / "build" / f"manylinux_{architecture}" / "hostile_calls"
    if not path.exists():
        _missing(f"`make wheels` has not been run here: no {path}")
    return path


def _library(wheel: zipfile.ZipFile, folder: pathlib.Path) -> str:
    """The folder into which the wheel's library has been written."""
    (folder / pathlib.Path(LIBRARY).name).write_bytes(wheel.read(LIBRARY))
    return str(folder)


@pytest.fixture(scope="module")
def digests(wheels, tmp_path_factory) -> list[str]:
    """Of the x86_64 wheel's library."""
    if sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("compares with x86_64")
    folder = _library(wheels["x86_64"], tmp_path_factory.mktemp("x86_64"))
    lines = _digests([_hostile_calls("x86_64")], _best_kernels(), LD_LIBRARY_PATH=folder)
    assert len(set(lines)) == len(_SEEDS)
    return lines


def test_avx2_gives_the_bits_of_avx512(wheels, digests, tmp_path):
    if _best_kernels() != "avx512":
        pytest.skip("this CPU has no AVX-512")
    folder = _library(wheels["x86_64"], tmp_path)
    command = [_hostile_calls("x86_64")]
    assert _digests(command, "avx2", LD_LIBRARY_PATH=folder, JAX_MOE_CPU_KERNELS="avx2") == digests


def test_arm_gives_the_same_bits(wheels, digests, tmp_path):
    """NEON against AVX. qemu takes Arm's C library from QEMU_LD_PREFIX, by default where Debian puts it."""
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    prefix = os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu")
    if qemu is None or not pathlib.Path(prefix, "lib").exists():
        pytest.skip("needs Debian's qemu-user-static and libc6-arm64-cross")
    folder = _library(wheels["aarch64"], tmp_path)
    command = [qemu, "-L", prefix, "-E", f"LD_LIBRARY_PATH={folder}", _hostile_calls("aarch64")]
    assert _digests(command, "baseline") == digests  # compiled for NEON


# --- Installing ---------------------------------------------------------------------------------------------------


def _run(*command, **options) -> str:
    """In a folder that holds nothing of ours, without what the environment adds to Python's path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _uv() -> str:
    uv = shutil.which("uv", path=f"{ROOT / 'build/uv/bin'}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("needs uv, which `make install` puts into build/uv")
    return uv


def test_the_source_archive_builds_with_the_compiler_that_is_here(wheels, sdist, digests, tmp_path):
    """In an environment of its own, with g++; and that library gives the bits of the one that zig made.

    The portable code, too. It has no fused multiply-add, so its bits are the others' only where no product leaves the
    range of float32, and some of these calls do.
    """
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    _run(_uv(), "build", "--python", sys.executable, "--wheel", "--out-dir", tmp_path, sdist, cwd=tmp_path)
    (path,) = tmp_path.glob("*.whl")
    gcc, zig = tmp_path / "gcc", tmp_path / "zig"
    gcc.mkdir(), zig.mkdir()
    _library(zipfile.ZipFile(path), gcc)
    _library(wheels["x86_64"], zig)
    command = [_hostile_calls("x86_64")]
    assert _digests(command, _best_kernels(), LD_LIBRARY_PATH=str(gcc)) == digests
    portable = [
        _digests(command, "baseline", LD_LIBRARY_PATH=str(folder), JAX_MOE_CPU_KERNELS="baseline")
        for folder in (gcc, zig)
    ]
    assert portable[0] == portable[1]


@pytest.fixture(scope="module")
def bare(wheels, tmp_path_factory) -> pathlib.Path:
    """The bin folder of an environment that has the wheel and what it asks for, and nothing else."""
    environment = tmp_path_factory.mktemp("bare") / "environment"
    wheel = wheels.get(os.uname().machine)
    if wheel is None:
        pytest.skip("no wheel is for this machine")
    _run(_uv(), "venv", "--python", sys.executable, environment)
    _run(_uv(), "pip", "install", "--python", environment / "bin" / "python", wheel.filename)
    return environment / "bin"


def test_a_bare_environment_runs_the_op(bare, tmp_path):
    """The quickstart, which compares with the oracle; and every module of the package can be imported."""
    shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path)
    shown = _run(bare / "python", "quickstart.py", cwd=tmp_path)
    errors = [float(line.split("│")[3]) for line in shown.splitlines() if re.search(r"w4a(4|16) *│", line)]
    assert len(errors) == 4, shown
    assert max(errors) < 1e-4  # a few bfloat16 in a million are rounded the other way


def test_a_bare_environment_has_the_commands(bare, tmp_path):
    assert _run(bare / "python", "-m", "jax_moe", "--version", cwd=tmp_path) == f"jax_moe {jax_moe.__version__}\n"
    shown = _run(bare / "jax-moe", "doctor", cwd=tmp_path)
    facts = {
        cells[1].strip(): cells[2].strip() for cells in (line.split("│") for line in shown.splitlines()) if cells[2:]
    }
    assert facts["wheel"] == f"py3-none-manylinux_2_28_{os.uname().machine}"
    assert facts["library"].startswith(str(bare.parent))
    assert "0.3 in the library" in facts["XLA's FFI"]


def test_these_tests_run_on_the_wheel(wheels):
    """Neither PYTHONPATH nor pytest's rootdir puts the checkout, or a library in it, before what is installed."""
    if not MUST_BE_THERE:
        pytest.skip("MANYLINUX is not set: these tests may run on anything")
    installed = pathlib.Path(sysconfig.get_path("platlib"), "jax_moe")
    assert pathlib.Path(jax_moe.__file__).parent == installed
    assert ffi.library_path() == installed / "lib" / "libjax_moe_ffi.so"
    assert ffi.library_path().read_bytes() == wheels[os.environ["MANYLINUX"]].read(LIBRARY)
    assert not (ROOT / LIBRARY).exists(), "programs that tests start here would load this library"
