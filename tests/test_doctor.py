"""What doctor says of an installation: its wheel, its FFI, cuDNN; and ``--version``. tests/test_cli.py has the rest."""

import ctypes
import importlib.metadata
import pathlib
import platform
import types

import pytest
from typer.testing import CliRunner

import jax_moe
from jax_moe.__main__ import app
from jax_moe.cli import doctor


def test_version_is_shown_and_nothing_else():
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"jax_moe {jax_moe.__version__}\n")
    assert importlib.metadata.version("jax_moe") == jax_moe.__version__


def _distribution(text: str | None, package: pathlib.Path):
    return lambda name: types.SimpleNamespace(read_text=lambda file: text, locate_file=lambda path: package)


def test_the_wheel_is_named_by_its_tags(monkeypatch, tmp_path):
    here = pathlib.Path(jax_moe.__file__).parent
    text = "Wheel-Version: 1.0\nTag: py3-none-manylinux_2_28_aarch64\nTag: py3-none-linux_aarch64\n"
    tags = "py3-none-manylinux_2_28_aarch64, py3-none-linux_aarch64"
    monkeypatch.setattr(importlib.metadata, "distribution", _distribution(text, here))
    assert doctor._wheel() == tags
    monkeypatch.setattr(importlib.metadata, "distribution", _distribution(text, tmp_path))
    assert doctor._wheel() == f"{tags}, hidden by {here}"
    monkeypatch.setattr(importlib.metadata, "distribution", _distribution(None, here))
    assert doctor._wheel() == "unknown tag"


def test_a_checkout_that_is_not_installed_says_so(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert doctor._wheel() == f"none installed; this is {pathlib.Path(jax_moe.__file__).parent}"


@pytest.mark.parametrize(
    ("ours", "header", "says"),
    [
        ((0, 3), "#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 5\n", "0.3 in the library and 0.5 in jaxlib"),
        ((0, 3), "#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 3\n", "0.3 in the library and 0.3 in jaxlib"),
        (
            (0, 10),
            "#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 9\n",
            "0.10 in the library and 0.9 in jaxlib: jaxlib is too old",
        ),
        ((), None, "an unknown version in the library and an unknown version in jaxlib"),
    ],
    ids=["newer jaxlib", "the same", "older jaxlib", "neither says"],
)
def test_the_ffi_of_the_library_is_held_against_jaxlibs(monkeypatch, tmp_path, ours, header, says):
    folder = tmp_path / "xla" / "ffi" / "api"
    folder.mkdir(parents=True)
    if header:
        (folder / "c_api.h").write_text(header)
    monkeypatch.setattr(doctor.jax.ffi, "include_dir", lambda: str(tmp_path))
    monkeypatch.setattr(doctor, "_library_ffi", lambda: ours)
    assert doctor._ffi() == says


def test_the_library_was_built_for_the_oldest_jaxlib():
    """Whose runtime takes what is older or as old: 0.3 is the FFI of jaxlib 0.10.2."""
    assert doctor._library_ffi() == (0, 3)
    assert "too old" not in doctor._ffi()


def test_a_library_that_is_broken_is_no_reason_to_stop(monkeypatch):
    def broken():
        raise OSError("libjax_moe_ffi.so: invalid ELF header")

    assert doctor._cpu_kernels() in ("avx512", "avx2", "baseline")
    monkeypatch.setattr(jax_moe.ffi, "library", broken)
    assert doctor._library_ffi() == ()
    assert doctor._cpu_kernels() == "unknown"


def test_cudnn_is_the_packages_or_the_systems(monkeypatch):
    versions = {"nvidia-cudnn-cu13": "9.28.1.4"}
    monkeypatch.setattr(doctor, "_version", lambda package: versions.get(package, "not installed"))
    assert doctor._cudnn() == "9.28.1.4"
    versions.clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(cudnnGetVersion=lambda: 92801))
    assert doctor._cudnn() == "9.28.1"

    def none(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert doctor._cudnn() == "not installed"


def test_the_machine_is_in_the_table(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(doctor, "_targets", lambda devices: {})
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["doctor"])
    assert "Linux, riscv64" in shown.output
