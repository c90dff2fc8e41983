"""A parsed kernel as the words that ``machine/program.cc`` reads."""

import struct

import numpy as np
from ptx import parser
from ptx.parser import Address, Immediate, Label, Pair, Register, Special, Symbol, Vector

SHARED_BASE = 1024  # as machine/memory.h has it

# OperandKind of machine/program.h.
_REGISTER, _IMMEDIATE, _SPECIAL, _LABEL, _ADDRESS, _PARAMETER, _VECTOR, _NONE = range(8)

# Numbers of SpecialValue in machine/control.cc. Grids and CTAs have one dimension.
_SPECIALS = {
    "%tid.x": 0, "%ntid.x": 1, "%ctaid.x": 2, "%nctaid.x": 3, "%laneid": 4, "%warpid": 5, "%cluster_ctarank": 6,
    "%cluster_nctarank": 7, "%smid": 8, "%lanemask_eq": 11, "%lanemask_lt": 12, "%lanemask_le": 13, "%lanemask_gt": 14,
    "%lanemask_ge": 15, "%clusterid.x": 16, "%nclusterid.x": 17,
} | {f"%{name}.{axis}": 9 for name in ("tid", "ctaid", "clusterid", "cluster_ctaid") for axis in "yz"} | {
    f"%{name}.{axis}": 10 for name in ("ntid", "nctaid", "nclusterid", "cluster_nctaid") for axis in "yz"
} | {"%cluster_ctaid.x": 6, "%cluster_nctaid.x": 7}  # fmt: skip


class Encoder:
    """The words and texts of one kernel."""

    def __init__(self, kernel: parser.Kernel):
        self.kernel = kernel
        self.texts: dict[str, int] = {}
        self.registers = {name: i for i, name in enumerate(kernel.registers)}
        self.shared, end = {}, SHARED_BASE
        for variable in sorted(kernel.shared, key=lambda v: v.size == 0):  # dynamic shared memory comes last
            end = -(-end // variable.align) * variable.align
            self.shared[variable.name] = end
            end += variable.size
        self.parameters = {p.name: p.offset for p in kernel.parameters}
        last = kernel.parameters[-1] if kernel.parameters else None
        self.parameter_bytes = last.offset + parser.TYPE_BYTES[last.type] if last else 0
        words = [self.text(kernel.name), self.parameter_bytes, end, len(self.registers)]
        words += [_width(register.type) for register in kernel.registers.values()]
        words.append(len(kernel.instructions))
        for instruction in kernel.instructions:
            guard = instruction.guard
            words += [self.text(instruction.operation), self.text(instruction.text), instruction.line]
            words += [self.registers[guard.name], guard.negated] if guard else [-1, 0]
            words.append(len(instruction.operands))
            for operand in instruction.operands:
                words += self.operand(operand)
        self.words = np.array(words, np.int64)

    def text(self, value: str) -> int:
        return self.texts.setdefault(value, len(self.texts))

    def operand(self, operand: parser.Operand | None) -> list[int]:
        def words(kind, negated=0, size=0, register=-1, value=0, items=()):
            result = [kind, int(negated), size, register, value, len(items)]
            for item in items:
                result += self.operand(item)
            return result

        match operand:
            case None:
                return words(_NONE)
            case Register(name, kind, negated):
                return words(_REGISTER, negated, _width(kind), self.registers[name])
            case Immediate(bits, kind):
                return words(_IMMEDIATE, value=_signed(bits, 32 if kind == "f32" else 64))
            case Special(name):
                if name not in _SPECIALS:
                    raise parser.PTXError(f"the emulator does not know {name}")
                return words(_SPECIAL, value=_SPECIALS[name])
            case Label(_, target):
                return words(_LABEL, value=target)
            case Symbol(name) if name in self.shared:
                return words(_IMMEDIATE, value=self.shared[name])
            case Address(Register(name, kind), offset):
                return words(_ADDRESS, 0, _width(kind), self.registers[name], offset)
            case Address(Symbol(name), offset) if name in self.shared:
                return words(_ADDRESS, value=self.shared[name] + offset)
            case Address(Symbol(name), offset):
                return words(_PARAMETER, value=self.parameters[name] + offset)
            case Address(None, offset):
                return words(_ADDRESS, value=offset)
            case Vector(items):
                return words(_VECTOR, items=items)
            case Pair(value, predicate):
                return words(_VECTOR, items=(value, predicate))
        raise parser.PTXError(f"the emulator does not know an operand like {operand}")


def _width(kind: str) -> int:
    """A predicate is 1, as Operand::bytes has it; 8-bit registers lie in 16 bits."""
    return 1 if kind == "pred" else max(2, parser.TYPE_BYTES[kind])


def _signed(bits: int, width: int) -> int:
    bits &= (1 << width) - 1
    return struct.unpack("<q", struct.pack("<Q", bits))[0]
