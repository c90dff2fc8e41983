"""The kernel that zeroes short outputs (``ffi/cuda/zero_kernel.h``), on the emulator of PTX."""

import pathlib
import re
import shutil
import subprocess

import emulator
from lint.check import check
import numpy as np
from ptx import parser
import pytest

HEADER = pathlib.Path(__file__).parents[1] / "ffi" / "cuda" / "zero_kernel.h"
PTX = re.findall(r'R"ptx\((.*?)\)ptx"', HEADER.read_text(), re.S)[0]
THREADS = 256


def zero(text: str, size: int) -> bool:
    """Whether the kernel writes zeros to ``size`` bytes, and to no other, all of them aligned."""
    memory = emulator.Memory()
    out = memory.poisoned((4096 + 64,), np.uint8, "out", strict=True)
    try:
        emulator.run([emulator.Launch(emulator.Kernel(text), 1, [out, size], threads=THREADS)], memory)
    except emulator.EmulatorError:
        return False
    values, written = out.read(partial=True), out.written
    return not values[:size].any() and written[:size].all() and not written[size:].any()


@pytest.mark.parametrize("size", [32, 64, 2048, 4064, 4096])
def test_it_writes_so_many_zeros_and_nothing_else(size):
    assert zero(PTX, size)


@pytest.mark.parametrize(
    "change",
    [("mov.b32 %r4, 0;", "mov.b32 %r4, 1;"), ("setp.ge", "setp.gt"), ("shl.b32 %r3, %r2, 4", "shl.b32 %r3, %r2, 3"),
     ("@%p1 bra DONE;", ""), ("{%r4, %r4, %r4, %r4}", "{%r4, %r4, %r4, %r3}")],
)  # fmt: skip
def test_a_mutant_of_it_is_seen(change):
    assert PTX.count(change[0]) == 1
    assert not zero(PTX.replace(*change), 2048)


def test_the_lint_has_nothing_to_say():
    assert check(parser.parse(PTX)) == []


def test_the_assembler_takes_it(tmp_path):
    """As the driver's compiler would, for the oldest and the newest GPU that the library has kernels for."""
    ptxas = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"
    if not pathlib.Path(ptxas).exists():
        pytest.skip("needs ptxas, which comes with CUDA")
    (tmp_path / "zero.ptx").write_text(PTX)
    for target in ("sm_90a", "sm_100f"):
        command = [ptxas, f"-arch={target}", tmp_path / "zero.ptx", "-o", tmp_path / "zero.cubin"]
        assembled = subprocess.run(command, capture_output=True, text=True)
        assert assembled.returncode == 0, assembled.stderr
