"""Operands of each copy of scales and each product, ours against those of CuTe DSL's atoms, for every width.

Both are issued by kernels of ``dsl_atoms.py``. In their PTX every such instruction becomes stores of its operands, and
the emulator runs that: what is compared is what the tensor cores would be given, bit for bit.
"""

import functools
import importlib.util
import re
import shutil

import emulator
import numpy as np
import pytest

from jax_moe.kernels import compiler

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here"),
]

BASE = 32  # first column: any
_ENTRY = 8  # words of 64 bits that an instruction may log
_BITS = {"cp": (32, 64), "mxf4nvf4": (32, 64, 64, 32, 32, 32, 1), "f16": (32, 32, 64, 32, 1)}
_ISSUE = re.compile(r"tcgen05\.(?:(cp)|mma)\.cta_group::([12])\.(?:kind::(\w+))?(\S*)\s+([^;]*);")


def logged(text: str) -> tuple[str, list[tuple[str, ...]]]:
    """PTX that stores what its copies and products are given, and of each of these what it is."""
    issues = []

    def place(operand: int) -> str:
        return f"[%log+{8 * ((len(issues) - 1) * _ENTRY + operand)}]"

    def log(match):
        copy, group, kind, form, operands = match.groups()
        kind = copy or kind
        form = form.removesuffix(".collector::a::discard")  # the default
        issues.append((kind, group, form))
        lines = []
        if masked := re.search(r"\{(%r\d+)(?:, \1){3,7}\}, ", operands):  # f16: a mask of lanes that are left out
            operands = operands.replace(masked[0], "")
            lines = [f"cvt.u64.u32 %log64, {masked[1]};", f"st.global.b64 {place(_ENTRY - 1)}, %log64;"]
        for i, (operand, bits) in enumerate(zip(operands.split(", "), _BITS[kind], strict=True)):
            register, _, offset = operand.strip("[]").partition("+")
            if bits == 1:
                lines += [f"selp.b32 %log32, 1, 0, {register};", "cvt.u64.u32 %log64, %log32;"]
            elif bits == 32:
                lines += [f"add.s32 %log32, {register}, {offset or 0};", "cvt.u64.u32 %log64, %log32;"]
            else:
                lines += [f"mov.b64 %log64, {register};"]
            lines += [f"st.global.b64 {place(i)}, %log64;"]
        return "\n\t".join(lines)

    return with_log(_ISSUE.sub(log, text)), issues


def with_log(text: str) -> str:
    """Adds what the stores to the log need."""
    assert "tcgen05" not in text
    parameter = re.search(r"\.param \.u64 \S+ \S+ \S+ \S+ (\w+_param_0)", text)[1]
    text = re.sub(r"(?<=[{ ])_(?=[,}])", "%sink", text)  # which the emulator does not know: ours has none
    start = f"\t.reg .b32 %log32, %sink;\n\t.reg .b64 %log, %log64;\n\n\tld.param.b64 %log, [{parameter}];\n"
    return re.sub(r"\n\n(?=\tld\.param)", f"\n{start}", text, count=1)


def accesses_logged(text: str) -> tuple[str, list[tuple[str, ...]]]:
    """The same for its loads from and stores to tensor memory: their addresses. What is loaded becomes 0."""
    issues = []

    def log(match):
        kind, form, operands = match.groups()
        address = re.search(r"\[(%r\d+)\+?(\d*)\]", operands)
        lines = [f"add.s32 %log32, {address[1]}, {address[2] or 0};", "cvt.u64.u32 %log64, %log32;"]
        lines += [f"st.global.b64 [%log+{8 * _ENTRY * len(issues)}], %log64;"]
        if kind == "ld":
            lines += [f"mov.b32 {register}, 0;" for register in re.findall(r"%\w+", operands.partition("}")[0])]
        issues.append((kind, form))
        return "\n\t".join(lines)

    return with_log(re.sub(r"tcgen05\.(ld|st)\.sync\.aligned\.(\S+)\s+([^;]*);", log, text)), issues


@functools.cache
def compiled(spec, logged=logged):
    text, issues = logged(compiler.ptx(spec, "sm_100f"))
    return emulator.Kernel(text), issues


@pytest.fixture(autouse=True, scope="module")
def no_kernel_outlives_the_tests():
    yield
    compiled.cache_clear()


def run(spec, width: int):
    """Of each instruction in turn: kind, group and form, and the operands' values."""
    kernel, issues = compiled(spec)
    memory = emulator.Memory()
    log = memory.array(np.zeros((len(issues), _ENTRY), np.uint64))
    arguments = [log, BASE, width]
    emulator.run([emulator.Launch(kernel, 1, arguments, 32, shared_bytes=200_000)], memory)
    values = log.read()
    assert not values[:, -1].any()  # no lane is left out
    return [(*issue, *map(int, row[: len(_BITS[issue[0]])])) for issue, row in zip(issues, values, strict=True)]


def of_dsl(fp4: bool, group: int, widths):
    """By width."""
    import dsl_atoms

    found = run(dsl_atoms.Spec("Dsl", fp4, group, tuple(widths)), 0)
    products = [i + 1 for i, issue in enumerate(found) if issue[0] != "cp"][3::4]  # a block's last
    assert len(products) == len(widths)
    return {w: found[i:j] for w, i, j in zip(widths, [0, *products], products, strict=False)}


def of_ours(fp4: bool, group: int, width: int):
    import dsl_atoms

    return run(dsl_atoms.Spec("Ours", fp4, group, (128 if width <= 128 else 256,)), width)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("fp4", [True, False], ids=["fp4", "bf16"])
def test_every_product_and_copy_is_given_what_the_atoms_give_it(fp4, group):
    widths = range(8 * group, 257, 8 * group)
    for width, wanted in of_dsl(fp4, group, widths).items():
        got = of_ours(fp4, group, width)
        if width == 8 * group:  # one group of 8 rows: the distance to a next one is not used, and the DSL leaves it 0
            wanted = [i if i[0] == "cp" else (*i[:5], i[5] | 64 << 32, *i[6:]) for i in wanted]
        kinds = [issue[0] for issue in wanted]
        copies = kinds.count("cp")
        assert len(got) == len(wanted) == 4 + (4 + 4 * -(-width // 128)) * fp4
        # Copies in any order, for each its columns; then the products in theirs.
        assert sorted(got[:copies]) == sorted(wanted[:copies]), width
        assert got[copies:] == wanted[copies:], width


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("warp", range(4))
def test_loads_and_stores_of_tensor_memory_are_those_of_the_dsl(blocks, warp):
    import dsl_atoms

    found = []
    for issue in ("DslAccess", "OursAccess"):
        kernel, issues = compiled(dsl_atoms.AccessSpec(issue, blocks), accesses_logged)
        memory = emulator.Memory()
        log = memory.array(np.zeros((len(issues), _ENTRY), np.uint64))
        # All lanes log, and what each writes is the same.
        emulator.run([emulator.Launch(kernel, 1, [log, BASE, warp], 32)], memory, check=False)
        found.append([(*access, int(row[0])) for access, row in zip(issues, log.read(), strict=True)])
    assert found[0] == found[1]
    assert [access[:2] for access in found[0]] == 2 * [("ld", f"16x256b.x{blocks}.b32")] + [("st", "32x32b.x32.b32")]
