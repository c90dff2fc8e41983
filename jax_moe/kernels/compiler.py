"""CuTe DSL kernels to cubins: what imports the DSL, with the device code itself.

Compiling needs the DSL but no GPU. What comes out needs neither: the handler loads the cubin with the CUDA driver.
"""

import dataclasses
import importlib
import pathlib
import re
import tempfile
from typing import Any

from jax_moe.kernels import cubin
from jax_moe.kernels.specs import Spec

PACKAGE = "nvidia-cutlass-dsl"
"""What compiles kernels: CuTe DSL."""

MOST_STACK_BYTES = 32
"""Of a thread of our kernels: a unit's start and end may keep a few words there; a loop that spills needs far more."""


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A cubin with one kernel, and what a launch needs to know of it.

    Attributes:
      image: the cubin.
      symbol: the kernel's name in it.
      threads: of a CTA; the kernel was compiled for just that many.
      shared_bytes: dynamic shared memory of a CTA.
      parameter_bytes: sizes of the parameters, in order.
      registers: of a thread, as the CTA starts.
      stack_bytes: of a thread; more than 0 means local arrays or spilled registers.
      tensor_core_instructions: how often ``spec.tensor_core_ptx`` stands in the PTX.
    """

    image: bytes = dataclasses.field(repr=False)
    symbol: str
    threads: int
    shared_bytes: int
    parameter_bytes: tuple[int, ...]
    registers: int
    stack_bytes: int
    tensor_core_instructions: int


def compile(spec: Spec, target: str) -> CompiledKernel:
    """Compiles the kernel of ``spec`` for the architecture ``target``."""
    return compile_with_ptx(spec, target)[0]


def ptx(spec: Spec, target: str) -> str:
    """The PTX of the kernel that :func:`compile` makes."""
    return _compile(spec, target)[1]


def compile_with_ptx(spec: Spec, target: str) -> tuple[CompiledKernel, str]:
    """The kernel of ``spec``, and the PTX that it was made of."""
    result, text = _compile(spec, target)
    image = result.__cubin__
    (symbol,) = result.kernel_info
    host_code = result.ir_module.operation.get_asm()
    kernel = CompiledKernel(
        image=image,
        symbol=symbol,
        shared_bytes=_dynamic_shared_bytes(host_code, spec.name),
        tensor_core_instructions=text.count(spec.tensor_core_ptx) if spec.tensor_core_ptx else 0,
        **cubin.facts(image, symbol),
    )
    return kernel, text


def _compile(spec: Spec, target: str) -> tuple[Any, str]:
    """What the DSL makes of ``spec``, and the PTX that it went through."""
    import cutlass.cute as cute

    from jax_moe.kernels.device import entry

    module, _, name = spec.implementation.partition(":")
    kernel = getattr(importlib.import_module(module), name)(spec)
    with tempfile.TemporaryDirectory() as dump:
        options = f"--gpu-arch {target} --keep-cubin --keep-ptx --dump-dir {dump}"
        result = cute.compile(kernel.launch, *entry.example_arguments(spec), options=options)
        return result, "".join(p.read_text() for p in pathlib.Path(dump).glob("*.ptx"))


def _dynamic_shared_bytes(host_code: str, name: str) -> int:
    """What the entry passes to the launch as shared memory: the cubin does not say.

    Read from the entry's LLVM code, where the launch configuration is a struct whose third field it is.
    """
    config = re.escape("!llvm.struct<(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32)>")
    field = re.search(rf"(%\d+) = llvm\.getelementptr %\d+\[0, 2\] : \(!llvm\.ptr\) -> !llvm\.ptr, {config}", host_code)
    store = field and re.compile(rf"llvm\.store (%\d+), {field[1]} : i64").search(host_code, field.end())
    constants = []
    if store:  # names are those of a function: of the constants of that name the last one before the store is meant
        constant = rf"{store[1]} = llvm\.mlir\.constant\((\d+) : i64\)"
        constants = re.findall(constant, host_code[: store.start()])
    if not constants:
        raise RuntimeError(
            f"jax_moe: cannot tell how much shared memory {name} is launched with; this {PACKAGE} is new"
        )
    return int(constants[-1])
