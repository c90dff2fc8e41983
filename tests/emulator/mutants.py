"""Kernels with one thing wrong: a wait, an arrival, a fence or a copy left out, or a parity or an address altered."""

from collections.abc import Iterator
import dataclasses
import re

# What is left out, each time that it stands in a kernel: by operation.
_DROPPED = re.compile(
    r"bar\.sync|bar\.arrive|bar\.warp\.sync|barrier\.cluster\.(arrive|wait)"
    r"|mbarrier\.(init|arrive).*|fence\..*|tcgen05\.fence.*"
    r"|cp\.async\..*|wgmma\.(fence|commit_group|wait_group|mma_async).*"
    r"|tcgen05\.(cp|mma|commit|wait|st|dealloc|relinquish_alloc_permit).*"
    r"|griddepcontrol\.wait|red\..*|st\.(shared|global).*"
)
_WAIT = re.compile(r"mbarrier\.try_wait\.parity\S*\s+(\S+), (\[\S+\]), (\S+?)(,[^;]*)?;")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A kernel's PTX with one line changed; ``what`` names the change and its operation."""

    text: str
    what: str
    operation: str
    line: int


def mutants(text: str) -> Iterator[Mutant]:
    """All mutants of a kernel, in the order of its lines."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        for what, operation, changed in _changes(line):
            yield Mutant("\n".join([*lines[:index], changed, *lines[index + 1 :]]), what, operation, index + 1)


def _changes(line: str) -> Iterator[tuple[str, str, str]]:
    wait = _WAIT.search(line)
    if wait:
        operation = wait.group().split()[0]
        yield "no wait", operation, line[: wait.start()] + f"setp.eq.b32 {wait[1]}, 0, 0;" + line[wait.end() :]
        again = f"{operation} {wait[1]}, {wait[2]}, other{wait[4] or ''};"
        flipped = f"{{ .reg .b32 other; xor.b32 other, {wait[3]}, 1; {again} }}"
        yield "other parity", operation, line[: wait.start()] + flipped + line[wait.end() :]
        return
    # Statements of one line; each of our scopes of inline assembly in one line is made of several.
    for match in re.finditer(r"(?:@!?%?\w+\s+)?([a-z][\w.:]*)[^;{}]*(?:\{[^}]*\}[^;{}]*)*;", line):
        if _DROPPED.fullmatch(match[1]):
            yield "dropped", match[1], line[: match.start()] + line[match.end() :]
