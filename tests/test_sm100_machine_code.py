"""The machine code of sm_100f's kernels: resources, and what became of the PTX's tensor instructions and waits."""

import collections
import importlib.util
import os
import subprocess
import sys

from lint import machine_code
from lint.compiled import compiled, some_specs
from lint.machine_code import OPCODES, PRODUCTS
from lint.sites import Graph
import pytest

from jax_moe.kernels import compiler
from jax_moe.kernels.sm100 import specs as sm100_specs

TARGET = "sm_100f"
needs_dsl = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"
)
needs_nvdisasm = pytest.mark.skipif(machine_code.nvdisasm() is None, reason=f"{machine_code.PACKAGE} is not installed")

SPECS = some_specs(TARGET)
GEMMS = [spec for spec in SPECS if spec.tensor_core_ptx]
REGISTERS = 65_536  # of a multiprocessor


def by_name(specs):
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.name.removeprefix("jax_moe_")[:48])


@needs_dsl
@by_name(SPECS)
def test_a_cta_fits(spec):
    kernel, _ = compiled(spec, TARGET)
    assert kernel.stack_bytes <= compiler.MOST_STACK_BYTES
    assert kernel.threads == spec.threads
    ctas = spec.config.ctas_per_sm if spec.tensor_core_ptx else 1
    assert -(-kernel.registers // 8) * 8 * spec.threads * ctas <= REGISTERS
    assert ctas * (kernel.shared_bytes + 1024 * (ctas > 1)) <= sm100_specs.SHARED_MEMORY + 1024 * (ctas > 1)


@needs_dsl
@needs_nvdisasm
@by_name(GEMMS)
def test_every_instruction_of_the_tensor_cores_is_there_once(spec):
    kernel, ptx = compiled(spec, TARGET)
    graph, code = Graph(ptx), machine_code.disassemble(kernel.image)
    counts = collections.Counter({opcode: 0 for opcode in (*OPCODES.values(), *PRODUCTS.values())})
    for each in code:
        counts.update(opcode for opcode in counts if each.opcode.startswith(opcode))
    wanted = {opcode: len(graph.kinds(kind)) for kind, opcode in OPCODES.items()}
    for kind, opcode in PRODUCTS.items():
        wanted[opcode] = sum(kind in ptx.instructions[site.index].operation for site in graph.kinds("mma"))
    assert wanted == dict(counts)
    assert sum(wanted[opcode] for opcode in PRODUCTS.values()) == kernel.tensor_core_instructions > 0


def waited_before(graph, code):
    """Of each kind: what is waited for last before it, in PTX and in machine code."""
    in_ptx, in_code = machine_code.last_waits_of_ptx(graph), machine_code.last_waits(code)
    for kind, opcode in {**OPCODES, "mma": ("UTCOMMA", "UTCHMMA")}.items():
        sites = graph.kinds(kind)
        yield (
            kind,
            set().union(*(in_ptx[site.index] for site in sites)),
            set().union(*(in_code[i] for i, each in enumerate(code) if each.opcode.startswith(opcode))),
        )


@needs_dsl
@needs_nvdisasm
@by_name(GEMMS)
def test_nothing_was_moved_above_its_wait(spec):
    """A wait that the compiler had moved something across would no longer be the last before it.

    Of what touches tensor memory. For copies this cannot be said: machine code may come to a role from another's end.
    """
    kernel, ptx = compiled(spec, TARGET)
    for kind, in_ptx, in_code in waited_before(Graph(ptx), machine_code.disassemble(kernel.image)):
        if kind in ("ld", "st", "cp", "mma"):
            assert in_code <= in_ptx, (kind, in_ptx, in_code)
            assert bool(in_code) == bool(in_ptx), kind


@needs_dsl
@needs_nvdisasm
@by_name([spec for spec in GEMMS if "gemm1_n16" in spec.name])
def test_what_is_moved_above_its_wait_would_be_seen(spec):
    kernel, ptx = compiled(spec, TARGET)
    graph, code = Graph(ptx), list(machine_code.disassemble(kernel.image))
    load = next(i for i, each in enumerate(code) if each.opcode.startswith("LDTM"))
    wait = max(i for i, each in enumerate(code[:load]) if each.opcode.startswith("SYNCS.PHASECHK"))
    code[load], code[wait] = code[wait], code[load]
    ((_, in_ptx, in_code),) = (each for each in waited_before(graph, code) if each[0] == "ld")
    assert not in_code <= in_ptx


@needs_dsl
def test_the_assembler_has_no_remarks():
    """ptxas -v by way of the DSL: no spilled registers and no warnings; of the kernels that need most registers."""
    program = (
        "from jax_moe.kernels import compiler\n"
        "from lint.compiled import some_specs\n"
        "for spec in some_specs('sm_100f'):\n"
        "    if any(part in spec.name for part in ('gemm1_n192b1', 'gemm1_n128b2')): compiler.ptx(spec, 'sm_100f')\n"
    )
    environment = os.environ | {"CUTE_DSL_COMPILER_OPT": "remarks{ptx}", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (
        done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == done.stderr.count("bytes spill stores") == 2
    )
    assert "warning" not in done.stderr.lower()
