"""Machine code as nvdisasm reads it, as far as the lint compares it with the PTX that it was made of.

nvdisasm needs no GPU; pip has it (``nvidia-cuda-nvdisasm``, the extra ``lint``).
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import tempfile

from lint.sites import Graph, successors

PACKAGE = "nvidia-cuda-nvdisasm"

OPCODES = {
    "ld": "LDTM", "st": "STTM", "cp": "UTCCP", "commit": "UTCBAR", "bulk": "UBLKCP", "copy": "LDGSTS",
    "init": "SYNCS.EXCH", "launch_dependents": "PREEXIT", "grid_wait": "ACQBULK",
}  # fmt: skip
"""The machine instruction of each kind (:mod:`lint.sites`) that has just one. For products there are several."""

PRODUCTS = {"kind::mxf4nvf4": "UTCOMMA", "kind::f16": "UTCHMMA"}


def nvdisasm() -> str | None:
    """Where it is: on the path, or where pip has put it; None: nowhere."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(path.locate()) for path in files if path.name == "nvdisasm"), None)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One machine instruction: ``guard`` is its predicate, ``target`` the index of what its label stands for."""

    opcode: str
    operands: str
    guard: str
    target: int | None


_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


@functools.cache
def disassemble(image: bytes) -> tuple[Instruction, ...]:
    """The instructions of a cubin's kernel, and of the subroutines behind it."""
    tool = nvdisasm()
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(image)
        text = subprocess.run([tool, "-c", path], check=True, capture_output=True, text=True).stdout
    rows, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+|\$?[\w$]+):", line):
            labels[label[1]] = len(rows)
        elif found := _LINE.match(line):
            rows.append(found.groups())
    instructions = []
    for guard, opcode, operands in rows:
        label = re.search(r"`\(([^)]+)\)", operands)
        target = labels.get(label[1]) if label else None
        instructions.append(Instruction(opcode, operands, guard or "", target))
    return tuple(instructions)


def _after(instructions: Sequence[Instruction], index: int) -> Iterable[int]:
    """Where execution may go on; a subroutine returns behind its call."""
    each = instructions[index]
    if each.opcode.startswith(("BRA", "WARPSYNC.COLLECTIVE")) and each.target is not None:
        yield each.target
        if each.opcode == "BRA" and not each.guard and each.operands.startswith("`"):
            return
    if each.opcode.startswith(("EXIT", "RET")) and not each.guard:
        return
    if index + 1 < len(instructions):
        yield index + 1


Last = str | int
"""What was waited for last: "bar", "start", or the offset of the mbarrier in shared memory."""


def last_waits(instructions: Sequence[Instruction]) -> list[set[Last]]:
    """Before each instruction, what may have been waited for last."""

    def wait(index: int) -> Last | None:
        each = instructions[index]
        if each.opcode.startswith("SYNCS.PHASECHK"):
            offset = re.search(r"\[[^]]*?\+?(0x[0-9a-f]+)?\]", each.operands)
            return int(offset[1], 16) if offset and offset[1] else 0
        return "bar" if each.opcode.startswith("BAR.SYNC") else None

    return _reach(len(instructions), lambda index: _after(instructions, index), wait)


def last_waits_of_ptx(graph: Graph) -> list[set[Last]]:
    """The same for PTX: over all edges, whether or not a thread can take them."""

    def wait(index: int) -> Last | None:
        site = graph.sites[index]
        return {"try_wait": site.offset, "bar": "bar"}.get(site.kind or "")

    ends = {end - 1 for end in graph.block_of.values()}

    def after(index: int) -> Iterable[int]:
        return [block for block, _ in successors(graph, index)] if index in ends else [index + 1]

    return _reach(len(graph.sites), after, wait)


def _reach(count: int, after, wait) -> list[set[Last]]:
    states: list[set[Last]] = [set() for _ in range(count)]
    states[0] = {"start"}
    todo = [0]
    while todo:
        index = todo.pop()
        passed = wait(index)
        state = states[index] if passed is None else {passed}
        for successor in after(index):
            if successor < count and not state <= states[successor]:
                states[successor] |= state
                todo.append(successor)
    return states
