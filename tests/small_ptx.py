"""Kernels of a few lines, for tests of the emulator."""

from typing import Any

import emulator
from emulator import Launch, Memory
import numpy as np

_HEAD = """.version 8.8
.target sm_100f
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry small({parameters})
.reqntid {threads}, 1, 1
{{
.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<140>; .reg .b64 %rd<20>;
{body}
ret;
}}
"""

TID = "mov.u32 %r0, %tid.x;"
WAIT = (
    "{{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared.b64 done, [{address}], {parity}; @!done bra AGAIN; }}"
)


def wait(address: str, parity: int = 0) -> str:
    """A loop until the phase of an mbarrier has ended."""
    return WAIT.format(address=address, parity=parity)


def text(body: str, pointers: int = 1, threads: int = 32) -> str:
    """PTX of a kernel that has its pointers in %rd0, %rd1, ... and %tid.x in %r0."""
    loads = [f"ld.param.b64 %rd{i}, [p{i}];" for i in range(pointers)]
    parameters = ", ".join(f".param .u64 p{i}" for i in range(pointers))
    return _HEAD.format(parameters=parameters, threads=threads, body="\n".join([*loads, TID, body]))


def run(body: str, *arrays: Any, threads: int = 32, grid: int = 1, shared_bytes: int = 32768, **options: Any) -> list:
    """Runs a kernel on arrays; what is no array yet becomes a shape of poison, f"{name}" of its place. All arrays."""
    memory = Memory()
    given = []
    for i, array in enumerate(arrays):
        if isinstance(array, tuple):
            given.append(memory.poisoned(array[:-1], array[-1], f"array {i}"))
        else:
            given.append(memory.array(np.asarray(array), f"array {i}"))
    kernel = emulator.Kernel(text(body, len(arrays), threads), "small")
    emulator.run([Launch(kernel, grid, given, shared_bytes=shared_bytes)], memory, most_instructions=200_000, **options)
    return given


def each_lane(body: str, *inputs: np.ndarray, result: type = np.uint32) -> np.ndarray:
    """What a body makes of 32-bit inputs in %r1, %r2, ...: its %r10, for each lane of a warp."""
    lines = ["mul.wide.u32 %rd10, %r0, 4;"]
    for i, _ in enumerate(inputs):
        lines += [f"add.s64 %rd11, %rd{i}, %rd10;", f"ld.global.b32 %r{i + 1}, [%rd11];"]
    lines += [body, f"add.s64 %rd11, %rd{len(inputs)}, %rd10;", "st.global.b32 [%rd11], %r10;"]
    values = [np.resize(np.asarray(value), 32) for value in inputs]
    assert all(value.dtype.itemsize == 4 for value in values)
    return run("\n".join(lines), *values, (32, result))[-1].read()
