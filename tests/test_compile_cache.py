"""The kernel cache: keys, damage, several processes, and what happens without the compiler. No GPU, no DSL needed."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import threading
import time

import helpers
import pytest

from jax_moe.kernels import cache, compiler as dsl, cubin, specs
from jax_moe.kernels.sm90.program import CONFIGS
from jax_moe.kernels.sm90.specs import Config, Gemm1Spec, Gemm2Spec, LinearSpec, ProductSpec

_HAS_COMPILER = pytest.mark.skipif(
    not any(d.name == "nvidia-cutlass-dsl" for d in importlib.metadata.distributions()),
    reason="nvidia-cutlass-dsl is not installed",
)


@dataclasses.dataclass(frozen=True)
class _Spec:
    width: int = 1

    implementation = "jax_moe.kernels.device.sort:Sort"

    @property
    def name(self) -> str:
        return f"test_{self.width}"


_KERNEL = dsl.CompiledKernel(b"\x7fELF\x00\xff" * 9, "symbol", 128, 4096, (8, 4), 40, 0, 2)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """An installed compiler that counts its calls; its version can be set to another, or None for "not installed"."""

    class Compiler:
        def __init__(self):
            self.calls = []
            self.version: str | None = "1.0"

    fake = Compiler()

    def compile_(spec, target):
        fake.calls.append((spec, target))
        return dataclasses.replace(_KERNEL, symbol=f"{spec.name} for {fake.version}")

    monkeypatch.setattr(dsl, "compile", compile_)
    monkeypatch.setattr(cache, "_compiler_version", lambda: fake.version)
    monkeypatch.setenv("JAX_MOE_CACHE_DIR", str(tmp_path))
    cache._compiled.cache_clear()
    yield fake
    cache._compiled.cache_clear()


def _again(spec=None):
    """As another process would ask: nothing in memory."""
    cache._compiled.cache_clear()
    return cache.compiled(spec or _Spec(), "sm_90a")


def test_a_kernel_is_compiled_once_and_read_back_whole(compiler):
    first = cache.compiled(_Spec(), "sm_90a")
    assert cache.compiled(_Spec(), "sm_90a") is first
    assert _again() == first
    assert _again().image == _KERNEL.image
    assert len(compiler.calls) == 1


def test_everything_that_matters_is_in_the_key(compiler, monkeypatch):
    _again()
    _again(_Spec(2))
    assert len(compiler.calls) == 2, "the spec"
    compiler.version = "1.1"
    assert _again().symbol == "test_1 for 1.1"
    assert len(compiler.calls) == 3, "the compiler's version"
    monkeypatch.setattr(cache, "_source_digest", lambda implementation: "other source")
    _again()
    assert len(compiler.calls) == 4, "the kernels' source"
    monkeypatch.setattr(cache, "_VERSION", "another")
    _again()
    assert len(compiler.calls) == 5, "the version of what the compiler is asked for"
    cache.compiled(_Spec(), "sm_100a")
    assert len(compiler.calls) == 6, "the target"


@dataclasses.dataclass(frozen=True)
class _Other(_Spec):
    pass


def test_two_kinds_of_kernel_do_not_share_a_key(compiler):
    assert _again(_Spec()).symbol
    assert _again(_Other())
    assert len(compiler.calls) == 2


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the kernels' sources, which :mod:`cache` takes for its own, and a device module beside it."""
    folder = tmp_path / "package"
    shutil.copytree(pathlib.Path(cache.__file__).parent, folder / "kernels")
    (folder / "elsewhere" / "device").mkdir(parents=True)
    for part in ("elsewhere", "elsewhere/device"):
        (folder / part / "__init__.py").touch()
    (folder / "elsewhere/device/kernel.py").write_text('"""Doc."""\nSTEP = 1  # why\n\n\ndef f():\n    """Doc."""\n')
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(cache, "__file__", str(folder / "kernels/cache.py"))

    def digest(implementation="elsewhere.device.kernel:Kernel"):
        cache._source_digest.cache_clear()
        return cache._source_digest(implementation)

    yield folder, digest
    cache._source_digest.cache_clear()
    for name in [name for name in sys.modules if name.startswith("elsewhere")]:
        del sys.modules[name]


@pytest.mark.parametrize("file", ["kernels/device/ptx.py", "kernels/device/constants.py", "elsewhere/device/kernel.py"])
def test_a_change_of_device_code_is_another_key(package, file):
    folder, digest = package
    before = digest()
    (folder / file).write_text((folder / file).read_text() + "\nONE_MORE = 1\n")
    assert digest() != before


def test_host_code_other_targets_and_documentation_are_not_in_the_key(package):
    folder, digest = package
    before = digest()
    for file in ("kernels/lowering.py", "kernels/specs.py", "kernels/sm90/program.py", "kernels/sm90/device/gemm1.py"):
        (folder / file).write_text((folder / file).read_text() + "\nONE_MORE = 1\n")
    (folder / "kernels/README.md").write_text("other")
    file = folder / "elsewhere/device/kernel.py"
    file.write_text('"""Other words,\n\nand more of them."""\nSTEP = 1\ndef f():\n    # why\n    """D."""\n')
    assert digest() == before
    file.write_text(file.read_text().replace("STEP = 1", "STEP = 2"))
    assert digest() != before


def test_a_hash_in_a_string_is_no_comment_and_a_string_that_is_used_no_documentation(package):
    folder, digest = package
    file = folder / "elsewhere/device/kernel.py"
    digests = set()
    for text in ('NAME = "a # b"', 'NAME = "a # c"', 'NAME = f"a # {1}"', 'NAME = (\n    "b"\n)', 'NAME = """b\n"""'):
        file.write_text(text + "\n")
        digests.add(digest())
    assert len(digests) == 5


def test_settings_of_the_compiler_are_part_of_its_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "4.8.1")
    monkeypatch.delenv("CUTE_DSL_ENABLE_ASSERTIONS", raising=False)
    plain = cache._compiler_version()
    monkeypatch.setenv("CUTE_DSL_ENABLE_ASSERTIONS", "1")
    assert plain == "4.8.1"
    assert cache._compiler_version() not in (None, plain)


@pytest.mark.parametrize("damage", ["", "{", "{}", '{"image": "AAAA", "sha256": "no"}', "[]", "\x00"])
def test_a_damaged_file_is_compiled_anew(compiler, damage):
    _again()
    (path,) = cache.cache_folder().iterdir()
    path.write_text(damage)
    assert _again().image == _KERNEL.image
    assert len(compiler.calls) == 2
    assert json.loads(path.read_text())["symbol"] == "test_1 for 1.0"


@pytest.mark.parametrize(("name", "value"), [("image", "AAAA"), ("shared_bytes", 0), ("parameter_bytes", [8, 8])])
def test_a_changed_field_is_noticed(compiler, name, value):
    _again()
    (path,) = cache.cache_folder().iterdir()
    fields = json.loads(path.read_text())
    assert fields[name] != value
    fields[name] = value
    path.write_text(json.dumps(fields))
    assert _again().image == _KERNEL.image
    assert len(compiler.calls) == 2


def test_a_failed_write_leaves_nothing_behind_and_the_kernel_is_used(compiler, monkeypatch):
    monkeypatch.setattr(cache.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.warns(UserWarning, match="kernel test_1 was compiled, but not kept: disk full"):
        assert _again().image == _KERNEL.image
    assert list(cache.cache_folder().iterdir()) == []


def test_a_folder_that_cannot_be_made_is_no_error(compiler, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_MOE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept"):
        _again()


def test_other_users_read_the_file_and_it_is_renamed_within_its_folder(compiler, monkeypatch):
    renamed, rename = [], os.replace
    monkeypatch.setattr(cache.os, "replace", lambda *paths: (renamed.append(paths), rename(*paths)))
    _again()
    ((source, target),) = renamed
    assert os.path.dirname(source) == os.path.dirname(target)
    assert os.stat(target).st_mode & 0o777 == 0o644


def test_without_a_compiler_any_version_will_do_and_the_newest_is_taken(compiler):
    """Released versions before others, such as one with settings, whose digest is no version."""
    for compiler.version in ("4.9.0", "4.10.1", "4.10.1-9a1b2c3d", "4.11.0.dev0"):
        _again()
    compiler.version = None
    assert _again().symbol == "test_1 for 4.10.1"


def test_a_missing_kernel_is_named(compiler):
    compiler.version = None
    with pytest.raises(cache.MissingKernelError, match=r"kernel test_1 for sm_90a is not in .*nvidia-cutlass-dsl"):
        cache.compiled(_Spec(), "sm_90a")


def test_threads_that_need_the_same_kernel_compile_it_once(compiler, monkeypatch):
    fake = dsl.compile

    def slow(spec, target):
        time.sleep(0.1)
        return fake(spec, target)

    monkeypatch.setattr(dsl, "compile", slow)
    start = threading.Barrier(4)

    def ask():
        start.wait()
        cache.compiled(_Spec(), "sm_90a")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiler.calls) == 1


def test_every_field_of_a_spec_is_in_the_key():
    config = CONFIGS[0]

    def another(value):
        if isinstance(value, bool):
            return not value
        return "other" if isinstance(value, str) else value + type(value)([8] if isinstance(value, tuple) else 1)

    for spec in (
        specs.SortSpec(8, 4, 8, 1, True), specs.XRowsSpec(True, False), specs.CombineSpec("float32"),
        Gemm1Spec(config, "w4a16", "swiglu", True, 1.0, 0.0, 7.0, False),
        Gemm2Spec(config, "w4a16", "atomic", "float32", False),
        specs.GroupsSpec(64, "float32", False), ProductSpec(config, "w4a16", "float32", False),
        LinearSpec(config, "w4a16", "float32", False, 2),
    ):  # fmt: skip
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            if value is config:
                for part in dataclasses.fields(config):
                    if isinstance(spec, LinearSpec) and part.name == "cluster":
                        continue  # it has clusters of its own, and refuses others
                    changed = dataclasses.replace(config, **{part.name: another(getattr(config, part.name))})
                    other = dataclasses.replace(spec, config=changed)
                    assert cache._prefix(other, "sm_90a") != cache._prefix(spec, "sm_90a"), part.name
                continue
            other = dataclasses.replace(spec, **{field.name: another(value)})
            assert cache._prefix(other, "sm_90a") != cache._prefix(spec, "sm_90a"), field.name


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        (specs.XRowsSpec, "threads", 128),
        (specs.XRowsSpec, "parameters", dict(reversed(specs.XRowsSpec(True, True).parameters.items()))),
        (specs.CombineSpec, "cluster", 2),
        (Gemm2Spec, "overlap", False),
        (Config, "reduction_bytes", 4),
        (Config, "threads", 128),
    ],
)
def test_constants_and_properties_of_a_spec_are_in_the_key(monkeypatch, kind, name, other):
    """Device code reads them as it reads fields: a kernel of 256 threads must not be launched as one of 128."""
    spec = {specs.XRowsSpec: specs.XRowsSpec(True, True), specs.CombineSpec: specs.CombineSpec("float32")}.get(
        kind, Gemm2Spec(CONFIGS[0], "w4a16", "atomic", "float32", False)
    )
    before = cache._prefix(spec, "sm_90a")
    monkeypatch.setattr(kind, name, other)
    assert cache._prefix(spec, "sm_90a") != before


def write_until(stop: pathlib.Path, file: pathlib.Path, number: int) -> None:
    """Writes kernels of growing size into ``file`` until ``stop`` exists; run by other processes."""
    size = 1000
    while not stop.exists():
        size += 1
        cache._write(file, dataclasses.replace(_KERNEL, image=bytes([number]) * size))


def test_processes_that_write_the_same_kernel_never_show_half_of_it(tmp_path):
    stop, file = tmp_path / "stop", tmp_path / "cache" / "shared.json"
    file.parent.mkdir()
    program = "import pathlib, sys, test_compile_cache as t; t.write_until(*map(pathlib.Path, sys.argv[1:3]), {})"
    path = [helpers.PACKAGE_FOLDER, pathlib.Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(map(str, path))
    environment = os.environ | {"PYTHONPATH": path}
    writers = [
        subprocess.Popen([sys.executable, "-c", program.format(number), stop, file], env=environment)
        for number in (1, 2)
    ]
    try:
        while not file.exists():
            assert all(writer.poll() is None for writer in writers)
            time.sleep(0.01)
        for _ in range(300):
            assert cache._read(file) is not None
    finally:
        stop.touch()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [path.name for path in file.parent.iterdir()] == ["shared.json"]


def test_what_is_no_cubin_is_refused():
    with pytest.raises(ValueError, match="ELF"):
        cubin.facts(b"not a cubin", "kernel")


def _cubin(name: str, **sections: bytes) -> bytes:
    """An ELF file with these sections, "_" for "."; ``name`` is appended to those that end in "_"."""
    contents = {"": b""} | {
        key.replace("_", ".") + (name if key.endswith("_") else ""): content for key, content in sections.items()
    }
    names = b"\0".join(key.encode() for key in (*contents, ".shstrtab")) + b"\0"
    contents[".shstrtab"] = names
    data, headers = b"", b""
    for key, content in contents.items():
        offset = names.index(key.encode() + b"\0")
        headers += struct.pack("<II8x8xQQ24x", offset, 1, 64 + len(data), len(content))
        data += content
    header = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", 64 + len(data))
    header = header.ljust(58, b"\0") + struct.pack("<HHH", 64, len(contents), len(contents) - 1)
    return header + data + headers


def test_the_digest_of_code_knows_instructions_and_no_names():
    sections = {"_text_": b"12345678", "_nv_constant0_": b"abc", "_nv_info": b"i", "_nv_info_": b"j", "_strtab": b"s"}

    def digest(name="kernel_a", **changes):
        return cubin.code_digest(_cubin(name, **sections | changes), name)

    assert digest() == digest("kernel_another_name") == digest(_strtab=b"other names")
    for changed in ("_text_", "_nv_constant0_", "_nv_info", "_nv_info_"):
        assert digest(**{changed: b"other"}) != digest(), changed
    assert digest(_nv_global_init=b"table") != digest()
    assert cubin.instructions(_cubin("k", **sections), "k") == b"12345678"


@_HAS_COMPILER
def test_a_moved_renamed_and_reworded_kernel_has_the_same_code(tmp_path, monkeypatch):
    import spilling_kernel

    source = pathlib.Path(spilling_kernel.__file__).read_text()
    moved = source.replace("Spilling", "Moved").replace("spilling_kernel:", "moved_kernel:").replace("given", "taken")
    (tmp_path / "moved_kernel.py").write_text(moved.replace('"""A kernel', '"""Another, said in\nother words,'))
    (tmp_path / "changed_kernel.py").write_text(
        source.replace("* 13", "* 11").replace("spilling_kernel:", "changed_kernel:")
    )
    monkeypatch.syspath_prepend(tmp_path)
    import changed_kernel
    import moved_kernel

    kernels = [dsl.compile(module.Spec(), "sm_90a") for module in (spilling_kernel, moved_kernel, changed_kernel)]
    original, renamed, other = (cubin.code_digest(kernel.image, kernel.symbol) for kernel in kernels)
    assert kernels[0].image != kernels[1].image
    assert original == renamed != other


def test_notes_of_a_cubin_are_read_by_format():
    sized = struct.pack("<BBH", 4, 0x10, 12) + struct.pack("<III", 128, 2, 1)
    plain = struct.pack("<BBH", 3, 0x50, 7)
    assert list(cubin._notes(plain + sized + plain)) == [(0x10, sized[4:])]


def test_what_a_cubin_notes_is_read(monkeypatch):
    def note(tag, layout, *values):
        return struct.pack("<BBH", 4, tag, struct.calcsize(layout)) + struct.pack(layout, *values)

    parameters = b"".join(note(0x17, "<IHHI", 0, i, 8 * i, size << 18 | 0x1F000) for i, size in ((1, 4), (0, 8)))
    of_all = note(0x2F, "<II", 7, 40) + note(0x11, "<II", 7, 16) + note(0x12, "<II", 7, 48)
    sections = {".nv.info.k": parameters + note(0x10, "<III", 32, 4, 2), ".nv.info": of_all}
    monkeypatch.setattr(cubin, "_sections", lambda _: sections)
    facts = {"threads": 256, "parameter_bytes": (8, 4), "registers": 40, "stack_bytes": 48}
    assert cubin.facts(b"", "k") == facts
    sections[".nv.info.k"] = parameters
    with pytest.raises(ValueError, match="fixed number of threads"):
        cubin.facts(b"", "k")


def test_shared_memory_is_read_from_the_entry_that_launches():
    config = "!llvm.struct<(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32)>"
    helper = "llvm.func @helper() {\n %9 = llvm.mlir.constant(4 : i64) : i64\n}\n"
    entry = (
        "llvm.func @entry() {\n %9 = llvm.mlir.constant(5672 : i64) : i64\n"
        f" %12 = llvm.getelementptr %3[0, 2] : (!llvm.ptr) -> !llvm.ptr, {config}\n"
        " llvm.store %9, %12 : i64, !llvm.ptr\n}\n"
    )
    assert dsl._dynamic_shared_bytes(helper + entry + helper, "k") == 5672
    with pytest.raises(RuntimeError, match="cannot tell how much shared memory k is launched with"):
        dsl._dynamic_shared_bytes(helper, "k")


@_HAS_COMPILER
def test_a_kernel_that_spills_says_so(tmp_path, monkeypatch):
    """An array with an index that is not known lies in local memory, on the stack."""
    import spilling_kernel

    monkeypatch.setenv("JAX_MOE_CACHE_DIR", str(tmp_path))
    assert cache.compiled(spilling_kernel.Spec(), "sm_90a").stack_bytes >= 4 * spilling_kernel.VALUES


@_HAS_COMPILER
def test_a_real_kernel(tmp_path, monkeypatch):
    """The sort, compiled without a GPU: what is read from the cubin is what the spec asks for."""
    monkeypatch.setenv("JAX_MOE_CACHE_DIR", str(tmp_path))
    spec = specs.sort_spec(8, 128, 8, weighted=True)
    kernel = cache.compiled(spec, "sm_90a")
    assert kernel.image[:4] == b"\x7fELF"
    assert kernel.threads == 32 * spec.warps
    assert kernel.parameter_bytes == (8,) * 8 + (4,)
    assert kernel.stack_bytes == 0
    assert kernel.registers > 0
    assert kernel.shared_bytes >= 4 * spec.warps * spec.local_experts
