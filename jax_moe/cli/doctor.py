"""``python -m jax_moe doctor``: what this machine can run, and why not the rest."""

import ctypes
import importlib.metadata
import os
import pathlib
import platform
import re
from typing import Any

import jax
from rich.table import Column, Table
from rich.text import Text

import jax_moe
from jax_moe.cli import show
from jax_moe.kernels import cache, compiler, records, targets
from jax_moe.settings import SETTINGS


@show.one_line_errors
def doctor() -> None:
    """Show versions, devices, the FFI library, what can run here and why the rest cannot."""
    console = show.console()
    versions = Table("package", "version", title="Versions")
    versions.add_row("python", platform.python_version())
    versions.add_row("jax_moe", jax_moe.__version__)
    for package in ("jax", "jaxlib", "ml_dtypes", "nvidia-cutlass-dsl", "flax"):
        versions.add_row(package, _version(package))
    versions.add_row("cuDNN", _cudnn())
    console.print(versions)

    facts = Table("what", Column(overflow="fold"), title="This installation", show_header=False)
    facts.add_row("machine", f"{platform.system()}, {platform.machine()}, {' '.join(platform.libc_ver())}")
    facts.add_row("wheel", _wheel())
    facts.add_row("library", _library())
    facts.add_row("XLA's FFI", _ffi())
    facts.add_row("instruction set", _cpu_kernels())
    facts.add_row("custom call target", jax_moe.ffi.TARGET)
    devices, failure = _devices()
    facts.add_row("JAX devices", failure or ", ".join(map(str, devices)))
    facts.add_row("XLA_FLAGS", os.environ.get("XLA_FLAGS", "(not set)"))
    facts.add_row("command buffers", _command_buffers())
    folder = cache.cache_folder()
    facts.add_row("kernel cache", f"{folder}: {len(list(folder.glob('*.json')))} kernels, of this and other versions")
    for setting in SETTINGS:
        if (value := setting.value()) is not None:
            facts.add_row(setting.name, value)
    console.print(facts)

    table = Table("target", "runs here", "why", title="What this machine can run")
    for target, (runs, why) in _targets(devices).items():
        table.add_row(target, Text("yes", "green") if runs else Text("no", "red"), why)
    console.print(table)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _library() -> str:
    try:
        return str(jax_moe.ffi.library_path())
    except ImportError as error:
        return str(error)


def _wheel() -> str:
    """Which wheel is installed, and whether it is what runs."""
    try:
        installed = importlib.metadata.distribution("jax_moe")
    except importlib.metadata.PackageNotFoundError:
        return f"none installed; this is {pathlib.Path(jax_moe.__file__).parent}"
    tags = ", ".join(re.findall(r"^Tag: *(\S+)", installed.read_text("WHEEL") or "", re.MULTILINE)) or "unknown tag"
    if pathlib.Path(str(installed.locate_file("jax_moe"))).resolve() == pathlib.Path(jax_moe.__file__).resolve().parent:
        return tags
    return f"{tags}, hidden by {pathlib.Path(jax_moe.__file__).parent}"


def _ffi() -> str:
    """The version that our library was built for, and jaxlib's, which must not be older."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        theirs = tuple(int(n) for n in re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header.read_text()))
    except OSError:
        theirs = ()
    ours = _library_ffi()
    text = " and ".join(
        f"{'.'.join(map(str, version)) or 'an unknown version'} in {place}"
        for version, place in ((ours, "the library"), (theirs, "jaxlib"))
    )
    return f"{text}: jaxlib is too old" if ours and theirs and theirs < ours else text


def _library_ffi() -> tuple[int, ...]:
    """The major and minor version; empty where there is no library, or one that does not say."""
    version = (ctypes.c_int32 * 2)()
    try:
        jax_moe.ffi.library().JaxMoeFfiVersion(version)
    except (ImportError, OSError, AttributeError):
        return ()
    return tuple(version)


def _cpu_kernels() -> str:
    """Which of the library's CPU kernels this process runs."""
    try:
        name = jax_moe.ffi.library().JaxMoeCpuKernels
        name.restype = ctypes.c_char_p
        return name().decode()
    except (ImportError, OSError, AttributeError):
        return "unknown"


def _cudnn() -> str:
    """Of the package that JAX's CUDA plugin needs, or else of the system's library."""
    for package in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        if (version := _version(package)) != "not installed":
            return version
    try:
        number = ctypes.CDLL("libcudnn.so.9").cudnnGetVersion()  # 92801 is 9.28.1
    except (OSError, AttributeError):
        return "not installed"
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _command_buffers() -> str:
    """Whether XLA may capture the op on a GPU, as far as XLA_FLAGS tells."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    enabled = [flag.split("=", 1)[1] for flag in flags if flag.startswith("--xla_gpu_enable_command_buffer=")]
    if enabled and "CUSTOM_CALL" not in enabled[-1].upper():
        return f"custom calls are not captured: --xla_gpu_enable_command_buffer={enabled[-1] or '(empty)'}"
    minimum = [flag.split("=", 1)[1] for flag in flags if flag.startswith("--xla_gpu_graph_min_graph_size=")]
    size = minimum[-1] if minimum else "5 (XLA's default)"
    return f"GPU only: captured in runs of at least {size} capturable operations"


def _devices() -> tuple[list[Any], str | None]:
    """What JAX runs on, or why it does not start: an installation that is broken is what a doctor is asked about."""
    try:
        return jax.devices(), None
    except RuntimeError as error:
        return [], f"JAX does not start: {error}"


def _targets(devices: list[Any]) -> dict[str, tuple[bool, str]]:
    """For each target whether it runs here, and the reason."""
    why = f"{os.cpu_count()} cores, {platform.machine()}" if devices else "JAX does not start"
    rows = {"CPU": (bool(devices), why)}
    capabilities = [device.compute_capability for device in devices if device.platform == "gpu"]
    for target in targets.TARGETS.values():
        wanted = " or ".join(target.compute_capabilities)
        count = sum(capability in target.compute_capabilities for capability in capabilities)
        if count and _version(compiler.PACKAGE) == "not installed":
            why = f"{count} device(s), but only kernels compiled before: pip install {compiler.PACKAGE}"
        elif count:
            why = f"{count} device(s) of compute capability {wanted}"
        elif capabilities:
            why = f"needs compute capability {wanted}, JAX sees {', '.join(sorted(set(capabilities)))}"
        else:
            why = _why_no_gpu(devices)
        if not records.runs_of(target.name):
            why += f"; its kernels: {records.NEVER_RUN}"
        rows[f"{target.generation} ({target.name})"] = (count > 0, why)
    return rows


def _why_no_gpu(devices: list[Any]) -> str:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver on this machine (libcuda.so.1 does not load)"
    if _version("jax-cuda13-plugin") == _version("jax-cuda12-plugin") == "not installed":
        return "a driver is here, but JAX has no CUDA plugin: pip install '.[cuda13]' in a checkout of jax_moe"
    running = f"runs on {devices[0].platform}" if devices else "does not start"
    return f"a driver and a plugin are here, but JAX {running}: see JAX_PLATFORMS"
