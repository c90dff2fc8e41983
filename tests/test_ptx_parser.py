"""The parser of PTX: what the compiler writes, scopes of inline assembly, and what it must refuse."""

from ptx import parser
from ptx.parser import Address, Immediate, Label, Pair, Register, Special, Symbol, Vector
import pytest

HEAD = """//
.version 8.8
.target sm_100f
.address_size 64

\t// .globl\tk
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry k(
\t.param .u64 .ptr .global .align 16 k_param_0,
\t.param .u32 k_param_1,
\t.param .u64 k_param_2
)
.reqntid 128, 2, 1
.minnctapersm 1
{
\t.reg .pred \t%p<3>;
\t.reg .b32 \t%r<5>;
\t.reg .b64 \t%rd<3>;
"""


def kernel(*body):
    return parser.parse(HEAD + "\n".join(body) + "\n}\n")


def operands(text):
    (instruction,) = kernel(text).instructions
    return instruction.operands


def test_declarations():
    parsed = kernel("ret;")
    assert (parsed.name, parsed.target, parsed.threads) == ("k", "sm_100f", 256)
    assert [(p.name, p.type, p.offset) for p in parsed.parameters] == [
        ("k_param_0", "u64", 0), ("k_param_1", "u32", 8), ("k_param_2", "u64", 16),
    ]  # fmt: skip
    assert parsed.shared == (parser.Shared("dynamic", 1024, 0),)
    assert parsed.directives == {".minnctapersm": (1,)}
    assert parsed.registers["%r4"] == Register("%r4", "b32")
    assert "%r5" not in parsed.registers


def test_operands():
    r1, p1 = Register("%r1", "b32"), Register("%p1", "pred")
    assert operands("mov.b32 %r1, dynamic;") == (r1, Symbol("dynamic"))
    assert operands("mov.u32 %r1, %tid.x;") == (r1, Special("%tid.x"))
    assert operands("ld.shared.v2.b32 {%r1, %r2}, [dynamic+8];") == (
        Vector((r1, Register("%r2", "b32"))), Address(Symbol("dynamic"), 8),
    )  # fmt: skip
    assert operands("st.b32 [%rd1 + -4], -7;") == (Address(Register("%rd1", "b64"), -4), Immediate(-7))
    assert operands("add.f32 %r1, %r1, 0fBF800000;")[2] == Immediate(0xBF800000, "f32")
    assert parser.float_of(Immediate(0xBF800000, "f32")) == -1
    assert operands("and.b32 %r1, %r1, 0xFF;")[2] == Immediate(255)
    assert operands("elect.sync %r1|%p1, -1;")[0] == Pair(r1, p1)
    assert operands("elect.sync _|%p1, -1;")[0] == Pair(None, p1)
    assert operands("tcgen05.mma [%r1], p, !%p1;".replace("p,", "%p1,"))[2] == Register("%p1", "pred", negated=True)


def test_instructions_keep_their_operation_guard_line_and_text():
    (instruction,) = kernel(
        "  // comment", "@!%p2\tmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p1,\n[%r1], 0;"
    ).instructions
    assert instruction.operation == "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64"
    assert instruction.guard == Register("%p2", "pred", negated=True)
    assert instruction.line == HEAD.count("\n") + 2
    assert instruction.text == "@!%p2 mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p1, [%r1], 0;"


def test_a_scope_has_registers_and_labels_of_its_own():
    wait = "{\n.reg .pred P1;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 P1, [%r1], 0;\n"
    wait += "@P1 bra.uni DONE;\nbra.uni AGAIN;\nDONE:\n}"
    parsed = kernel(
        "OUTER:", wait, wait, "{ .reg .b32 t; mov.b32 t, %r1; } { .reg .b64 t; mov.b64 t, %rd1; }", "bra OUTER;"
    )
    first, second = (f"P1@{HEAD.count(chr(10)) + line}" for line in (2, 10))
    assert {first, second} <= parsed.registers.keys()
    names = [i.operands[0].name for i in parsed.instructions if isinstance(i.operands[0], Register)]
    assert names[:2] == [first, second]
    assert names[2].removesuffix("'") == names[3].removesuffix("'")
    assert names[2] != names[3]
    branches = [i.operands[0].target for i in parsed.instructions if isinstance(i.operands[0], Label)]
    assert branches == [3, 0, 6, 3, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mov.b32 %r9, 0;", "line 19: '%r9' was not declared"),
        ("bra NOWHERE;", "'NOWHERE' was not declared"),
        ("{ .reg .b32 t; } mov.b32 t, 0;", "'t' was not declared"),
        ("mov.b32 %r1 0;", "found '0' instead of ;"),
        ("@%r1 bra X; X:", "a guard that is no predicate"),
        (".reg .b128 %q;", "'.b128' is no type known here"),
        (".global .b32 x;", "'.global' in a body"),
        ("mov.b32 %r1, #;", "cannot read"),
    ],
)
def test_what_is_not_known_is_refused_with_its_line(text, message):
    with pytest.raises(parser.PTXError, match=message.replace(".", r"\.")):
        kernel(text)


def test_a_module_has_one_kernel():
    with pytest.raises(parser.PTXError, match="0 kernels"):
        parser.parse(".version 8.8\n.target sm_90a\n.address_size 64\n")
