"""The CUDA handler without a GPU: the real handler against a recording driver (ffi/tests/cuda), and its mutants.

Also what needs no driver at all: the library opens without CUDA and names its symbols.
"""

import ctypes
import os
import pathlib
import re
import shutil
import subprocess

import cuda_call
import helpers
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from raw_call import raw_call

from jax_moe import ffi, parcels
from jax_moe.kernels import lowering

_FFI = pathlib.Path(__file__).parents[1] / "ffi"
_COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(_COMPILER is None, reason="no C++ compiler to build the handler's test with")

# A mutant is a wrong handler: (file, what is there, what stands there instead). Every one must fail the test.
_MUTANTS = {
    "zeroing forgotten": ("cuda/stream_api.h", "driver_.cuMemsetD8Async(Address(destination), 0, bytes, stream)", "0"),
    "captured zeroing forgotten": (
        "launch_sequence.h",
        "if (!run(LaunchStep::kZero, api.AddZeroNode(entry, output, sequence.output_bytes, &zeroed))) return result;",
        "",
    ),
    "join forgotten": ("launch_sequence.h", "= api.AddDependency(stream, zeroed);", "= 0;"),
    "join replaces": ("cuda/stream_api.h", "&node, 1, kAddCaptureDependencies", "&node, 1, kSetCaptureDependencies"),
    "zeroing depends on nothing": ("cuda/stream_api.h", "entry.dependencies.size(), &params", "0, &params"),
    "zeroing depends on the first launch": (
        "launch_sequence.h",
        "typename Api::Node zeroed{};",
        "typename Api::Node zeroed{}; if (second > 0) api.IsCapturing(stream, &result.captured, &entry);",
    ),
    "another buffer zeroed": ("cuda/stream_api.h", "{Address(destination), 0, 0", "{Address(destination) + 16, 0, 0"),
    "another stream zeroed": ("cuda/stream_api.h", "0, bytes, stream)", "0, bytes, nullptr)"),
    "part of a short output zeroed": ("cuda/stream_api.h", "count = static_cast<unsigned>(bytes)", "count = 16"),
    "short outputs zeroed by a memset": ("cuda/stream_api.h", "bytes <= kShortBytes && zero_ != nullptr", "false"),
    "longer outputs zeroed by the kernel": ("cuda/stream_api.h", "bytes <= kShortBytes", "bytes <= 2 * kShortBytes"),
    "a kernel that is not there": ("cuda/stream_api.h", "&& zero_ != nullptr", ""),
    "no program without the kernel": (
        "cuda/program.cc",
        "if (LoadedKernels::Instance().Get(driver, context_id, kind_->name(), launch, &zero).failure())"
        " zero = nullptr;",
        "JAX_MOE_TRY(LoadedKernels::Instance().Get(driver, context_id, kind_->name(), launch, &zero));",
    ),
    "half zeroed": ("cuda/stream_api.h", "bytes / kWord, 1}", "bytes / kWord / 2, 1}"),
    "capture taken for eager": (
        "cuda/stream_api.h",
        "*capturing = status == kCaptureActive;",
        "*capturing = false;",
    ),
    "alignment unchecked": ("cuda/handler.cc", "% kAlignment == 0", "% 1 == 0"),
    "sizes unchecked": ("cuda/handler.cc", "if (sizes != program.sizes())", "if (false)"),
    "kernels not kept by context": ("cuda/program.cc", "driver.cuCtxGetId(kCurrent, id)", "(*id = 1, kSuccess)"),
    "launches without a kernel": (
        "cuda/program.cc",
        "if (!kernels.dictionary.contains(name)) return",
        "if (!kernels.dictionary.contains(name)) continue; if (false) return",
    ),
    "no launches unchecked": ("cuda/program.cc", "if (launches_.empty() != (sizes_[0] == 0))", "if (false)"),
    "output given to nobody": ("cuda/program.cc", "if (first == launches_.size()) return", "if (false) return"),
    "what adds unchecked": ("cuda/program.cc", "if (adds == first_name)", "if (true)"),
    "ordered adds": ("cuda/program.cc", "if (kind_->adds()) first", "first"),
    "joined a launch too late": ("cuda/program.cc", "first_that_adds_ = first,", "first_that_adds_ = first + 1,"),
    "another launch's function": ("cuda/stream_api.h", "functions[index]", "functions[0]"),
    "another launch named": ("cuda/handler.cc", "[launched.launch].name", "[0].name"),
    "version 1 decoded": (
        "cuda/handler.cc",
        "InstantiateV1(ffi::Dictionary) {",
        "InstantiateV1(ffi::Dictionary attributes) {\n  return Instantiate<FusedMoe>(attributes);",
    ),
    "arguments unchecked": ("cuda/program.cc", "if (!is_there)", "if (false)"),
    "first launch overlaps": ("cuda/program.cc", "if (!launches_.empty() && launches_[0].overlap)", "if (false)"),
    "checks in words": (
        "cuda/handler.cc",
        "if (!IsAligned(*results[i]))",
        "if (!std::string(99, ' ').empty() && !IsAligned(*results[i]))",
    ),
    "scales of w4a4 unchecked": ("cuda/kinds.h", "options_.precision == Precision::kW4A4", "false"),
    "scales of a product unchecked": ("cuda/kinds.h", " precision_ == Precision::kW4A4", " false"),
    "scale of a product not asked for": ("cuda/kinds.h", "results, precision_,", "results, Precision::kW4A16,"),
    "a product adds": ("cuda/kinds.h", "bool adds() const override { return false; }",
                       "bool adds() const override { return true; }"),
    "a product taken for fused_moe": ("cuda/handler.cc", "Instantiate<jax_moe::cuda::RaggedDot>",
                                      "Instantiate<jax_moe::cuda::FusedMoe>"),
    "width of parcels unchecked": ("decode.h", "{tokens, bytes}, &parcels",
                                   "{tokens, operands[kX].dimensions()[1]}, &parcels"),
    "scale of parcels not asked for": ("cuda/kinds.h", "input_scales() const override { return kScales; }",
                                       "input_scales() const override { return {}; }"),
    "kernels not told apart by image": ("cuda/program.cc", "shared_bytes, launch.image)", 'shared_bytes, "")'),
    "kernels not told apart by name": ("cuda/program.cc", "key(context_id, launch.kernel,", 'key(context_id, "",'),
    "last failure told": ("cuda/stream_api.h", "result != kSuccess && *failed_call_ == '\\0'", "result != kSuccess"),
    "too many arguments": ("cuda/program.cc", "launch->arguments.size() == kMostArguments ||", ""),
    "runs unloaded": ("cuda/program.cc", "(found == functions_.end()) {", "(false) {"),
}  # fmt: skip


_SOURCES = (
    "tests/cuda/handler_test.cc", "tests/cuda/product_test.cc", "tests/cuda/parcels_test.cc",
    "cuda/driver.cc", "cuda/program.cc", "cuda/handler.cc",
)  # fmt: skip
_TSAN = ("-fsanitize=thread", "-g1")

# Mutants that only the thread sanitizer sees.
_RACES = {
    "loading unlocked": (
        "const std::lock_guard<std::mutex> lock(mutex_);\n    const Key",
        "const Key",
    ),
    "loaded functions unlocked": (
        "const std::lock_guard<std::mutex> lock(mutex_);\n  if (functions_",
        "if (functions_",
    ),
}


def _compile(folder: pathlib.Path, source: str, include: pathlib.Path = _FFI, more: tuple = ()) -> pathlib.Path:
    path = include / source if (include / source).exists() else _FFI / source
    target = folder / (path.stem + ".o")
    includes = [f"-I{include}", f"-I{_FFI}", f"-I{_FFI / 'tests/cuda'}"]
    _build("-c", *more, *includes, path, "-o", target)
    return target


def _build(*arguments) -> None:
    include = f"-isystem{jax.ffi.include_dir()}"
    command = [_COMPILER, "-std=c++20", "-O0", "-fPIC", "-pthread", include, *arguments]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


def _run(folder: pathlib.Path, objects, sanitizer: tuple = ()) -> subprocess.CompletedProcess:
    program = folder / "handler_test"
    command = [_COMPILER, *sanitizer, *objects, "-ldl", "-pthread", "-o", program]
    linked = subprocess.run(command, capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    # A mutant may print what is no text: a message in memory that was freed.
    return subprocess.run([program], capture_output=True, text=True, errors="backslashreplace", timeout=60)


def _precompile(folder: pathlib.Path, *flags) -> tuple:
    """Flags that give all headers that are not ours ready compiled: reading them is half of what each mutant takes."""
    helpers.need_shipped_headers()
    sources = [path for pattern in ("*.h", "cuda/*.*", "tests/cuda/*.*") for path in _FFI.glob(pattern)]
    system = {name for path in sources for name in re.findall(r"^#include <([a-z_.]+)>$", path.read_text(), re.M)}
    header = folder / "headers.h"
    shipped = [f"#include <{name}>" for name in sorted(system - {"cuda.h"})]
    header.write_text("\n".join(['#include "xla/ffi/api/ffi.h"', *shipped]) + "\n")
    _build(*flags, "-x", "c++-header", header, "-o", f"{header}.gch")
    return (*flags, "-include", header)


@pytest.fixture(scope="module")
def precompiled(tmp_path_factory):
    return _precompile(tmp_path_factory.mktemp("headers"))


@pytest.fixture(scope="module")
def objects(precompiled, tmp_path_factory):
    """The objects of the unchanged handler and of its test, by source."""
    folder = tmp_path_factory.mktemp("handler")
    built = {}
    for source in _SOURCES:
        (folder / source).parent.mkdir(parents=True, exist_ok=True)
        built[source] = _compile((folder / source).parent, source, more=precompiled)
    return built


def test_handler_against_the_recording_driver(objects, tmp_path):
    ran = _run(tmp_path, objects.values())
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("name", _MUTANTS)
def test_a_mutant_of_the_handler_fails(name, objects, precompiled, tmp_path):
    source, original, replacement = _MUTANTS[name]
    text = (_FFI / source).read_text()
    assert text.count(original) >= 1, f"the mutant no longer applies to {source}"
    mutated = tmp_path / source
    mutated.parent.mkdir(parents=True, exist_ok=True)
    mutated.write_text(text.replace(original, replacement))
    unit = source if source.endswith(".cc") else "cuda/handler.cc"
    if unit != source:  # a header: compile its user where the changed one is found first
        (tmp_path / unit).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_FFI / unit, tmp_path / unit)
    built = _compile(tmp_path, unit, include=tmp_path, more=precompiled)
    ran = _run(tmp_path, {**objects, unit: built}.values())
    assert ran.returncode != 0, "the mutant survived"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Flags for the thread sanitizer, and the objects of all but program.cc."""
    folder = tmp_path_factory.mktemp("sanitized")
    flags = _precompile(folder, *_TSAN)
    return flags, [_compile(folder, source, more=flags) for source in _SOURCES if source != "cuda/program.cc"]


@pytest.mark.parametrize("name", [None, *_RACES])
def test_threads_under_the_thread_sanitizer(name, sanitized, tmp_path):
    """The handler has no data race, and a lock less would be one."""
    flags, objects = sanitized
    text = (_FFI / "cuda/program.cc").read_text()
    if name:
        original, replacement = _RACES[name]
        assert text.count(original) == 1, "the mutant no longer applies"
        text = text.replace(original, replacement)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/program.cc").write_text(text)
    program = _compile(tmp_path, "cuda/program.cc", include=tmp_path, more=flags)
    for _ in range(20 if name else 1):  # whether a race shows is a matter of luck
        ran = _run(tmp_path, [*objects, program], _TSAN)
        raced = "WARNING: ThreadSanitizer: data race" in ran.stderr
        if raced:
            break
    assert raced == (name is not None), ran.stdout + ran.stderr
    assert name or ran.returncode == 0


def test_the_drivers_interface_is_nvidias(tmp_path):
    """driver.h repeats structs and constants; compare them with cuda.h where that is installed."""
    roots = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr"]
    header = next((root for root in roots if (pathlib.Path(root) / "include/cuda.h").exists()), None)
    if header is None:
        pytest.skip("cuda.h is not installed (CUDA_HOME or /usr/local/cuda)")
    command = [_COMPILER, "-std=c++20", "-fsyntax-only", f"-I{_FFI}", f"-I{header}/include"]
    checked = subprocess.run([*command, _FFI / "tests/cuda/driver_abi_test.cc"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


_SIZES = {
    "num_tokens": 1, "top_k": 1, "local_experts": 1, "num_parts": 2, "hidden_size": 16, "intermediate_size": 64,
    "out_bytes": 2,
}  # fmt: skip
_WEIGHTS = ("gate_up.payload", "gate_up.block_scale", "down.payload", "down.block_scale")
_OPTIONS = {
    "precision": "w4a16", "combine": "atomic", "weight_on": "output", "activation": "swiglu",
    "alpha": np.float32(1), "beta": np.float32(0), "limit": np.float32(np.inf),
}  # fmt: skip


def _echo(target: str, image: bytes, **changes):
    """A function that returns ``image`` and some numbers, after they went through the attributes of a custom call."""
    kernel = {
        "image": image, "name": "kernel", "grid": np.int64(264), "threads": np.int64(384), "cluster": np.int64(2),
        "shared": np.int64(232448), "overlap": np.int64(1),
        "arguments": "operand:3 null result:1 result:0 i32:7 i32:-5",
    }  # fmt: skip
    kernels = {
        "sizes": {name: np.int64(size) for name, size in _SIZES.items()},
        "weight_bytes": {name: np.int64(0) for name in _WEIGHTS}, "workspace_bytes": np.zeros(1, np.int64),
        "launches": "first gemm", "adds": "gemm", "gemm": kernel | changes,
        "first": kernel | {"overlap": np.int64(0), "arguments": "null"},
    }  # fmt: skip
    types = jax.ShapeDtypeStruct((len(image),), jnp.uint8), jax.ShapeDtypeStruct((8,), jnp.int32)
    return jax.jit(lambda: raw_call(target, types, {"kernels": kernels, **_OPTIONS}))


@pytest.fixture(scope="module")
def echo_target(objects, precompiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("echo")
    library = folder / "echo.so"
    echo = _compile(folder, "tests/cuda/echo_image.cc", more=precompiled)
    _build("-shared", echo, objects["cuda/program.cc"], "-o", library)
    handlers = ctypes.CDLL(str(library))
    for target, handler in (
        ("jax_moe_test_echo_image", handlers.JaxMoeTestEchoImage),
        ("jax_moe_test_decode_parcels", handlers.JaxMoeTestDecodeParcels),
    ):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return "jax_moe_test_echo_image"


def test_attributes_arrive_as_they_were_written(echo_target):
    """Through XLA's text form and back: nested dictionaries, and an image of every byte value in 64 KB of noise."""
    noise = np.random.default_rng(0).integers(0, 256, 65536, np.uint8).tobytes()
    image = bytes(range(256)) + noise + b'\0\\"\n\xff'
    call = _echo(echo_target, image)
    got, numbers = call()
    assert got.tobytes() == image
    np.testing.assert_array_equal(numbers, [264, 384, 2, 232448, 1, 6, -5, 2])


def test_attributes_of_parcels_arrive(echo_target, monkeypatch):
    """They have no weights and no workspace: an empty dictionary, and an array of no numbers."""
    del echo_target
    cuda_call.stand_in_compiler(monkeypatch)
    made = parcels.Parcels(num_tokens=5, top_k=3, hidden_size=48, layout="wgmma_v1", command_buffer=True)
    attributes = lowering.cuda_call(made).attributes
    (sizes,) = jax.jit(
        lambda: raw_call("jax_moe_test_decode_parcels", (jax.ShapeDtypeStruct((3,), jnp.int32),), attributes)
    )()
    np.testing.assert_array_equal(sizes, [5, 3, 48])


def test_attributes_survive_export(echo_target):
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers to serialise")
    image = bytes(range(256))
    call = _echo(echo_target, image)
    checks = [jax.export.DisabledSafetyCheck.custom_call(echo_target)]
    exported = jax.export.deserialize(jax.export.export(call, disabled_checks=checks)().serialize())
    assert exported.call()[0].tobytes() == image


def test_the_same_call_lowers_to_the_same_bytes(echo_target):
    """Or the persistent compilation cache would never hit."""
    texts = {_echo(echo_target, b"image\xff").lower().as_text() for _ in range(2)}
    assert len(texts) == 1


def test_a_malformed_attribute_is_named(echo_target):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"kernels\.gemm\.threads: got 4096, needs 1\.\.1024"):
        _echo(echo_target, b"image", threads=np.int64(4096))()


def test_version_1_is_registered_to_be_refused(monkeypatch):
    """A program of version 1 is told to be exported again; XLA alone would find no implementation of its target."""
    stages = {}

    def register(target, handler, *, platform):
        stages[target, platform] = handler

    monkeypatch.setattr(jax.ffi, "pycapsule", lambda function: getattr(function, "__name__", None))
    monkeypatch.setattr(jax.ffi, "register_ffi_type", lambda *_, **__: None)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", register)
    ffi.register.__wrapped__()  # again, not only the first time
    for suffix in ("", "_no_capture"):
        new, old = (stages[f"jax_moe_fused_moe_v{version}{suffix}", "CUDA"] for version in (2, 1))
        assert new["instantiate"] == "JaxMoeFusedMoeCudaInstantiate"
        assert old == new | {"instantiate": "JaxMoeFusedMoeCudaV1Instantiate"}
    assert stages["jax_moe_fused_moe_v1", "cpu"] == stages["jax_moe_fused_moe_v2", "cpu"] == "JaxMoeFusedMoeCpu"


def test_the_counters_are_readable_without_a_gpu():
    """The library opens without CUDA; and nothing that ran on a CPU counts."""
    assert ffi.counters() == ffi.Counters(eager=0, captured=0, forked=0)
