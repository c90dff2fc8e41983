"""PTX text to instructions, as far as the compiler of our kernels writes PTX. What it does not know, it refuses.

``parse(text)`` gives a :class:`Kernel`. Names are unique in it: a register or label that an inline-assembly scope
``{ .reg .pred p; ... }`` declares is called ``p@line``, the line being that of the scope's brace. An instruction's
``operation`` is the whole string up to the operands, ``mbarrier.try_wait.parity.shared.b64`` say: whoever reads it
decides by the whole string, so that no modifier is ever overlooked.
"""

import dataclasses
import re
import struct
from typing import NamedTuple

TYPE_BYTES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
    "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
}  # fmt: skip

_SPECIAL = re.compile(
    r"%(?:(?:n?tid|n?ctaid|n?clusterid|cluster_n?ctaid)\.[xyz]|laneid|n?warpid|n?smid|cluster_n?ctarank|clock(?:64)?"
    r"|lanemask_(?:eq|le|lt|ge|gt)|dynamic_smem_size|total_smem_size|globaltimer)"
)


class PTXError(ValueError):
    """The text is not PTX as this parser knows it; the message has the line."""


@dataclasses.dataclass(frozen=True)
class Register:
    """A register; ``type`` is a key of :data:`TYPE_BYTES`. ``negated``: a predicate operand ``!p``."""

    name: str
    type: str
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Special:
    """A special register, ``%tid.x`` say."""

    name: str


@dataclasses.dataclass(frozen=True)
class Immediate:
    """A constant; ``kind`` is "int", "f32" or "f64", and ``bits`` an integer or the bits of the float."""

    bits: int
    kind: str = "int"


@dataclasses.dataclass(frozen=True)
class Symbol:
    """The address of a parameter or of a shared variable."""

    name: str


@dataclasses.dataclass(frozen=True)
class Label:
    """What a branch goes to: ``target`` is an index into ``Kernel.instructions`` (its length: the end)."""

    name: str
    target: int


@dataclasses.dataclass(frozen=True)
class Address:
    """``[base + offset]``; a base of None is an absolute address."""

    base: Register | Symbol | None
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    items: tuple["Operand", ...]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A result with a predicate, ``%r1|%p1``; a ``_`` is None, and one that stands alone a pair of two."""

    value: Register | None
    predicate: Register | None


Operand = Register | Special | Immediate | Symbol | Label | Address | Vector | Pair


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      operation: the whole string, without the predicate.
      guard: the predicate ``@p`` or ``@!p`` (then ``negated``).
      operands: in order, results first.
      line: in the text, from 1.
      text: as written, in one line.
    """

    operation: str
    guard: Register | None
    operands: tuple[Operand, ...]
    line: int
    text: str


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A kernel parameter: ``offset`` in the parameter table, ``type`` a key of :data:`TYPE_BYTES`."""

    name: str
    type: str
    offset: int


@dataclasses.dataclass(frozen=True)
class Shared:
    """A variable in shared memory. ``size`` 0: dynamic shared memory, which starts there."""

    name: str
    align: int
    size: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An entry and what the module declares around it.

    Attributes:
      name: of the entry.
      target: the architecture, ``sm_90a`` say.
      parameters: in order.
      registers: all, by unique name; the ones of scopes are in order of declaration.
      shared: of the module and of the entry.
      threads: of a CTA (``.reqntid``, multiplied); None: any number.
      directives: the other performance directives of the entry, with their arguments.
      instructions: in order.
      labels: by unique name, the index of the instruction after it.
    """

    name: str
    target: str
    parameters: tuple[Parameter, ...]
    registers: dict[str, Register]
    shared: tuple[Shared, ...]
    threads: int | None
    directives: dict[str, tuple[int, ...]]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> Kernel:
    """The one kernel of a PTX module.

    Raises:
      PTXError: there is not exactly one, or something that this parser does not know.
    """
    return _Parser(text).module()


# --- Words --------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<number>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|[0-9]+(?:\.[0-9]+)?U?(?!\w))
      | (?P<word>[%$_A-Za-z.][\w$.]*(?:::[\w$.]+)*)
      | (?P<string>"[^"\n]*")
      | (?P<mark>[-+{}\[\](),;:<>@!|=])""",
    re.VERBOSE | re.DOTALL,
)


class _Token(NamedTuple):
    kind: str
    text: str
    line: int
    start: int
    end: int


def _tokens(text: str) -> list[_Token]:
    tokens, at, line = [], 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise PTXError(f"line {line}: cannot read {text[at : at + 20]!r}")
        kind = match.lastgroup or ""
        if kind != "space":
            tokens.append(_Token(kind, match.group(), line, match.start(), match.end()))
        line += match.group().count("\n")
        at = match.end()
    return tokens


# --- Statements ---------------------------------------------------------------------------------------------------


class _Parser:
    def __init__(self, text: str):
        self.text = text
        self.tokens = _tokens(text)
        self.at = 0
        self.shared: list[Shared] = []
        self.parameters: list[Parameter] = []
        self.registers: dict[str, Register] = {}
        self.scopes: list[dict[str, Register | str]] = []  # names as written -> register, or unique name of a label
        self.suffixes: set[str] = set()
        self.labels: dict[str, int] = {}
        self.instructions: list[tuple] = []

    # What is next.

    def peek(self, ahead: int = 0) -> str:
        index = self.at + ahead
        return self.tokens[index].text if index < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        if token is None or (expected and token.text not in expected):
            line, found = (token.line, token.text) if token else (self.text.count("\n"), "the end")
            wanted = f" instead of {' or '.join(expected)}" if expected else ""
            raise PTXError(f"line {line}: found {found!r}{wanted}")
        self.at += 1
        return token.text

    def error(self, message: str) -> PTXError:
        return PTXError(f"line {self.tokens[min(self.at, len(self.tokens) - 1)].line}: {message}")

    def integer(self) -> int:
        negative = self.peek() == "-" and bool(self.take())
        text = self.take()
        try:
            value = int(text.rstrip("U"), 0)
        except ValueError:
            raise self.error(f"{text!r} is no integer") from None
        return -value if negative else value

    # The module.

    def module(self) -> Kernel:
        target, kernels = "", []
        while self.at < len(self.tokens):
            word = self.take()
            if word == ".version":
                self.take()
            elif word == ".target":
                target = self.take()
                while self.peek() == ",":
                    self.take(), self.take()
            elif word == ".address_size":
                self.take("64")
            elif word in (".extern", ".visible", ".weak"):
                continue
            elif word == ".shared":
                self.shared_variable()
            elif word == ".entry":
                kernels.append(self.entry(target))
            else:
                self.at -= 1
                raise self.error(f"{word!r} in a module")
        if len(kernels) != 1:
            raise PTXError(f"line 1: {len(kernels)} kernels in a module; one is wanted")
        return kernels[0]

    def shared_variable(self) -> None:
        align = self.integer() if self.peek() == ".align" and self.take() else 1
        element = TYPE_BYTES[self.type()]
        name, size = self.take(), element
        if self.peek() == "[":
            self.take()
            size = element * self.integer() if self.peek() != "]" else 0
            self.take("]")
        self.take(";")
        self.shared.append(Shared(name, max(align, element), size))

    def type(self) -> str:
        word = self.take()
        if word.lstrip(".") not in TYPE_BYTES:
            raise self.error(f"{word!r} is no type known here")
        return word.lstrip(".")

    def entry(self, target: str) -> Kernel:
        name = self.take()
        self.take("(")
        offset = 0
        while self.peek() != ")":
            self.take(".param")
            kind = self.type()
            while self.peek() in (".ptr", ".global", ".align"):  # what a pointer points to: no matter here
                if self.take() == ".align":
                    self.integer()
            size = TYPE_BYTES[kind]
            offset = -(-offset // size) * size
            self.parameters.append(Parameter(self.take(), kind, offset))
            offset += size
            if self.peek() == ",":
                self.take()
        self.take(")")
        directives: dict[str, tuple[int, ...]] = {}
        while self.peek() != "{":
            directive = self.take()
            if not directive.startswith("."):
                raise self.error(f"{directive!r} before the body")
            values = []
            while self.tokens[self.at].kind == "number":
                values.append(self.integer())
                if self.peek() == ",":
                    self.take()
            directives[directive] = tuple(values)
        self.body()
        threads = directives.pop(".reqntid", None)
        return Kernel(
            name, target, tuple(self.parameters), self.registers, tuple(self.shared),
            None if threads is None else _product(threads), directives, self.resolved(), self.labels,
        )  # fmt: skip

    def body(self) -> None:
        self.take("{")
        self.open_scope(suffix="")
        while self.scopes:
            word = self.peek()
            if word == "{":
                suffix = f"@{self.tokens[self.at].line}"
                self.take()
                self.open_scope(suffix)
            elif word == "}":
                self.take()
                self.scopes.pop()
            elif word == ".reg":
                self.take()
                self.register_declaration()
            elif word == ".shared":
                self.take()
                self.shared_variable()
            elif word == ".pragma":
                while self.take() != ";":
                    pass
            elif word == ".loc":
                line = self.tokens[self.at].line
                while self.tokens[self.at].line == line:
                    self.take()
            elif word.startswith("."):
                raise self.error(f"{word!r} in a body")
            elif self.peek(1) == ":":
                self.take(), self.take()
                self.labels[str(self.scopes[-1][word])] = len(self.instructions)
            else:
                self.instruction()

    def open_scope(self, suffix: str) -> None:
        """Notes the scope's labels at once: a branch may stand before its label."""
        while suffix in self.suffixes:
            suffix += "'"  # two scopes in one line
        self.suffixes.add(suffix)
        scope: dict[str, Register | str] = {"{": suffix}
        depth, index = 1, self.at
        while depth and index < len(self.tokens):
            token = self.tokens[index]
            depth += {"{": 1, "}": -1}.get(token.text, 0)
            following = self.tokens[index + 1].text if index + 1 < len(self.tokens) else ""
            if depth == 1 and token.kind == "word" and following == ":":
                scope[token.text] = token.text + suffix
            index += 1
        if depth:
            raise self.error("a scope has no end")
        self.scopes.append(scope)

    def register_declaration(self) -> None:
        kind = self.type()
        scope = self.scopes[-1]
        while True:
            name = self.take()
            names = [name]
            if self.peek() == "<":
                self.take()
                names = [f"{name}{i}" for i in range(self.integer())]
                self.take(">")
            for each in names:
                register = Register(f"{each}{scope['{']}", kind)
                scope[each] = self.registers[register.name] = register
            if self.take(",", ";") == ";":
                return

    # Instructions.

    def instruction(self) -> None:
        first = self.tokens[self.at]
        guard = None
        if self.peek() == "@":
            self.take()
            negated = self.peek() == "!" and bool(self.take())
            found = self.named(self.take())
            if not isinstance(found, Register) or found.type != "pred":
                raise self.error("a guard that is no predicate")
            guard = dataclasses.replace(found, negated=negated)
        if self.tokens[self.at].kind != "word":
            raise self.error(f"found {self.peek()!r} instead of an instruction")
        operation = self.take()
        operands = []
        if self.peek() != ";":
            operands.append(self.operand())
            while self.peek() == ",":
                self.take()
                operands.append(self.operand())
        self.take(";")
        text = " ".join(self.text[first.start : self.tokens[self.at - 1].end].split())
        self.instructions.append((operation, guard, tuple(operands), first.line, text))

    def operand(self) -> Operand | str:
        token = self.tokens[self.at]
        if token.text == "{":
            self.take()
            items = [self.operand()]
            while self.take(",", "}") == ",":
                items.append(self.operand())
            return Vector(tuple(items))  # type: ignore[arg-type]
        if token.text == "[":
            return self.address()
        if token.text == "!":
            self.take()
            found = self.named(self.take())
            if not isinstance(found, Register):
                raise self.error("only a predicate is negated")
            return dataclasses.replace(found, negated=True)
        if token.kind == "number" or token.text == "-":
            return self.immediate()
        name = self.take()
        if self.peek() == "|":
            self.take()
            both = [None if each == "_" else self.named(each) for each in (name, self.take())]
            if not all(each is None or isinstance(each, Register) for each in both):
                raise self.error("a pair of what are no registers")
            return Pair(*both)  # type: ignore[arg-type]
        return Pair(None, None) if name == "_" else self.named(name)

    def address(self) -> Address:
        self.take("[")
        base = None
        if self.tokens[self.at].kind == "word":
            found = self.named(self.take())
            if not isinstance(found, Register | Symbol):
                raise self.error("an address whose base is neither a register nor a variable")
            base = found
            if self.peek() == "+":
                self.take()
        offset = self.integer() if self.peek() != "]" else 0
        self.take("]")
        return Address(base, offset)

    def immediate(self) -> Immediate:
        text = self.peek()
        if text[:2] in ("0f", "0F"):
            return Immediate(int(self.take()[2:], 16), "f32")
        if text[:2] in ("0d", "0D"):
            return Immediate(int(self.take()[2:], 16), "f64")
        return Immediate(self.integer())

    def named(self, name: str) -> Register | Special | Symbol | str:
        """A register, special register or variable; a label as its unique name, which :meth:`resolved` looks up."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        if any(name == each.name for each in (*self.parameters, *self.shared)):
            return Symbol(name)
        if _SPECIAL.fullmatch(name):
            return Special(name)
        self.at -= 1
        raise self.error(f"{name!r} was not declared")

    def resolved(self) -> tuple[Instruction, ...]:
        """Instructions, with labels in place of their names."""
        done = []
        for operation, guard, operands, line, text in self.instructions:
            operands = tuple(Label(each, self.labels[each]) if isinstance(each, str) else each for each in operands)
            done.append(Instruction(operation, guard, operands, line, text))
        return tuple(done)


def _product(values: tuple[int, ...]) -> int:
    product = 1
    for value in values:
        product *= value
    return product


def float_of(immediate: Immediate) -> float:
    """The value of a float constant."""
    if immediate.kind == "f32":
        return struct.unpack("<f", struct.pack("<I", immediate.bits))[0]
    if immediate.kind == "f64":
        return struct.unpack("<d", struct.pack("<Q", immediate.bits))[0]
    return float(immediate.bits)
