"""What one thread knows of its registers on its way through a kernel: enough to tell which branches it can take.

A thread's index is a number here, so that ``if warp == 4`` is decided. Other registers are intervals of signed 32-bit
integers (anything that was loaded: any), and a comparison that both outcomes are possible for makes two ways of one,
each with what it has learnt. Only what branches depend on is kept. Counters are taken not to overflow.
"""

import dataclasses
import math

from ptx.parser import Immediate, Instruction, Pair, Register, Special

from lint import arithmetic
from lint.sites import Graph, is_branch, RANK, registers_of, successors

Interval = tuple[float, float]
ANY: Interval = (-math.inf, math.inf)

_KNOWN = ("%tid.x", "%laneid", "%cluster_ctarank", "%cluster_ctaid.x")
_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_SWAPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}


@dataclasses.dataclass
class Values:
    """Intervals of registers (absent: any), known predicates, and which register is another plus a constant."""

    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
    predicates: dict[str, bool] = dataclasses.field(default_factory=dict)
    links: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)

    def copy(self) -> "Values":
        return Values(dict(self.intervals), dict(self.predicates), dict(self.links))

    def get(self, operand) -> Interval:
        if isinstance(operand, Immediate):
            return (operand.bits, operand.bits) if operand.kind == "int" else ANY
        if isinstance(operand, Register):
            return self.intervals.get(operand.name, ANY)
        return ANY

    def set(self, name: str, interval: Interval) -> None:
        if interval == ANY:
            self.intervals.pop(name, None)
        else:
            self.intervals[name] = interval

    def forget_links(self, name: str) -> None:
        if self.links:
            self.links = {to: link for to, link in self.links.items() if to != name and link[0] != name}

    def narrow(self, operand, interval: Interval) -> bool:
        """Learns that an operand lies in an interval; False if it cannot."""
        low, high = self.get(operand)
        low, high = max(low, interval[0]), min(high, interval[1])
        if low > high:
            return False
        if isinstance(operand, Register):
            self.set(operand.name, (low, high))
            if operand.name in self.links:
                source, delta = self.links[operand.name]
                return self.narrow(Register(source, operand.type), (low - delta, high - delta))
        return True

    def holds(self, predicate: Register) -> bool | None:
        known = self.predicates.get(predicate.name)
        return known if known is None else known != predicate.negated


class Slice:
    """The part of a kernel that decides on branches, and how it computes.

    Attributes:
      indices: of the instructions in it.
      live: start of a block -> what of it is used later, before it is written again.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        writers: dict[str, list[int]] = {}
        for site in graph.sites:
            for name in site.writes:
                writers.setdefault(name, []).append(site.index)
        self._writers, self._knowable = writers, {}
        wanted = {each.guard.name for each in graph.kernel.instructions if each.guard is not None}
        self.indices: set[int] = set()
        todo = [name for name in wanted if self._is_knowable(name)]
        while todo:
            for index in writers.get(todo.pop(), []):
                if index in self.indices:
                    continue
                self.indices.add(index)
                for name in graph.sites[index].reads if _computes(graph.kernel.instructions[index]) else ():
                    if name not in wanted and self._is_knowable(name):
                        wanted.add(name)
                        todo.append(name)
        self.wanted = wanted
        self.live = self._live()

    def _is_knowable(self, name: str) -> bool:
        """Whether anything but what was loaded goes into a register: a constant, or the thread's index."""
        if name not in self._knowable:
            self._knowable[name] = False  # while it is being found out
            self._knowable[name] = any(self._gives_something(index) for index in self._writers.get(name, ()))
        return self._knowable[name]

    def _gives_something(self, index: int) -> bool:
        instruction, site = self.graph.kernel.instructions[index], self.graph.sites[index]
        if instruction.operation.startswith("elect.sync"):
            return True
        if not _computes(instruction):
            return False
        sources = instruction.operands[1:]
        if instruction.operation.startswith(("mov.", "selp.")) and any(isinstance(s, Immediate) for s in sources):
            return True
        if any(isinstance(s, Special) and s.name in _KNOWN for s in sources):
            return True
        return any(self._is_knowable(name) for name in site.reads)

    def _live(self) -> dict[int, frozenset[str]]:
        kernel = self.graph.kernel
        use, define = {}, {}
        for start, end in self.graph.block_of.items():
            used, defined = set(), set()
            for index in range(start, end):
                site, guard = self.graph.sites[index], kernel.instructions[index].guard
                reads = site.reads if index in self.indices else frozenset()
                used |= ((reads | ({guard.name} if guard else set())) & self.wanted) - defined
                if guard is None:
                    defined |= site.writes & self.wanted
            use[start], define[start] = used, defined
        live = {start: frozenset(use[start]) for start in use}
        changed = True
        while changed:
            changed = False
            for start in reversed(list(live)):
                after = [live[b] for b, _ in successors(self.graph, self.graph.block_of[start] - 1) if b in live]
                new = frozenset(use[start] | (set().union(*after) - define[start]))
                if new != live[start]:
                    live[start], changed = new, True
        return live


def _computes(instruction: Instruction) -> bool:
    return instruction.operation.split(".")[0] in (
        "mov", "add", "sub", "neg", "min", "max", "selp", "shl", "shr", "and", "or", "xor", "not", "setp", "shfl",
        "cvt", "mul", "mad",
    )  # fmt: skip


def evaluate(instruction: Instruction, values: Values, thread: int) -> list[Values]:
    """Executes an instruction of the slice; two ways out where a comparison is open. ``values`` may be changed."""
    if not instruction.operands or is_branch(instruction):
        return [values]
    result = instruction.operands[0]
    if instruction.operation.startswith("elect.sync"):
        # Which thread is elected is not said, but it is always the same: let it be a warp's first.
        if isinstance(result, Pair) and result.predicate is not None:
            values.predicates[result.predicate.name] = thread % 32 == 0
        return [values]
    if isinstance(result, Pair):
        result = result.predicate
    if not isinstance(result, Register):
        for name in _names(result):
            values.forget_links(name)
            values.set(name, ANY)
        return [values]
    operation, sources = instruction.operation.split("."), instruction.operands[1:]
    if result.type == "pred":
        if instruction.guard is not None:
            _decide(values, result.name, None)
            return [values]
        return _predicate(operation, result, sources, values)
    interval = _interval(operation, sources, values, thread)
    link = _link(operation, sources)
    if instruction.guard is not None and values.holds(instruction.guard) is None:
        low, high = values.get(result)
        interval, link = (min(low, interval[0]), max(high, interval[1])), None
    values.forget_links(result.name)
    values.set(result.name, interval)
    if link is not None and link[0] != result.name:
        values.links[result.name] = link
    return [values]


def _names(operand) -> list[str]:
    return list(registers_of(operand))


def _link(operation, sources) -> tuple[str, int] | None:
    if operation[0] == "mov" and isinstance(sources[0], Register):
        return sources[0].name, 0
    if operation[0] == "add" and isinstance(sources[0], Register) and isinstance(sources[1], Immediate):
        return sources[0].name, sources[1].bits
    return None


def _interval(operation, sources, values: Values, thread: int) -> Interval:
    name = operation[0]
    if name == "mov" and isinstance(sources[0], Special):
        special = sources[0].name
        known = {"%tid.x": thread % RANK, "%laneid": thread % 32, "%cluster_ctarank": thread // RANK}
        known["%cluster_ctaid.x"] = thread // RANK
        return (known[special], known[special]) if special in known else ANY
    if name in ("mov", "cvt"):
        return values.get(sources[0])
    if name == "shfl":
        # From lane 0: that is how the compiler is told that a value is the same in all the warp.
        return values.get(sources[0]) if operation[2] == "idx" and sources[1] == Immediate(0) else ANY
    if name == "selp":
        chosen = values.holds(sources[2])
        if chosen is None:
            (a, b), (c, d) = values.get(sources[0]), values.get(sources[1])
            return min(a, c), max(b, d)
        return values.get(sources[0] if chosen else sources[1])
    ranges = [values.get(source) for source in sources]
    if ANY in ranges and name != "and":
        return ANY
    if all(low == high for low, high in ranges):
        result = arithmetic.exact(operation, [int(low) for low, _ in ranges])
        return ANY if result is None else (result, result)
    (a, b), (c, d) = ranges[0], ranges[-1]
    if name == "add":
        return a + c, b + d
    if name == "sub":
        return a - d, b - c
    if name == "neg":
        return -b, -a
    if name == "min":
        return min(a, c), min(b, d)
    if name == "max":
        return max(a, c), max(b, d)
    if name == "and" and c == d and c >= 0:
        return 0, c
    if name in ("or", "xor") and min(a, c) >= 0 and max(b, d) < math.inf:
        return 0, (1 << int(max(b, d)).bit_length()) - 1
    if name == "shr" and a >= 0 and c == d and b < math.inf:
        return int(a) >> int(c), int(b) >> int(c)
    if name == "shl" and c == d and -math.inf < a and b < math.inf:
        return int(a) << int(c), int(b) << int(c)
    return ANY


def _predicate(operation, result: Register, sources, values: Values) -> list[Values]:
    name, known = operation[0], None
    if name in ("and", "or", "xor", "not", "mov") and all(isinstance(s, Register) for s in sources):
        inputs = [values.holds(source) for source in sources]
        known = _logic(name, inputs)
    elif name == "mov" and isinstance(sources[0], Immediate):
        known = bool(sources[0].bits)
    elif (
        name == "setp"
        and operation[1] in _COMPARISONS
        and operation[2] in ("s32", "u32", "b32")
        and len(operation) == 3
    ):
        return _compare(operation, result, sources, values)
    _decide(values, result.name, known)
    return [values]


def _logic(name, inputs) -> bool | None:
    if name == "and":
        return False if False in inputs else None if None in inputs else True
    if name == "or":
        return True if True in inputs else None if None in inputs else False
    if None in inputs:
        return None
    return {"xor": lambda: inputs[0] != inputs[-1], "not": lambda: not inputs[0], "mov": lambda: inputs[0]}[name]()


def _decide(values: Values, name: str, known: bool | None) -> None:
    if known is None:
        values.predicates.pop(name, None)
    else:
        values.predicates[name] = known


def _compare(operation, result, sources, values: Values) -> list[Values]:
    comparison, (a, b) = operation[1], sources
    ranges = [values.get(a), values.get(b)]
    unsigned = operation[2] == "u32" and comparison not in ("eq", "ne")
    if unsigned and min(low for low, _ in ranges) < 0:
        _decide(values, result.name, None)
        return [values]
    ways = []
    for outcome in (True, False):
        way = values.copy()
        if _assume(way, comparison if outcome else _OPPOSITE[comparison], a, b):
            way.predicates[result.name] = outcome
            ways.append(way)
    if len(ways) == 2 and ANY in ranges:  # nothing that is known becomes better known
        _decide(values, result.name, None)
        return [values]
    return ways


def _assume(values: Values, comparison: str, a, b) -> bool:
    """Learns what a comparison says; False if it cannot be."""
    for left, right, relation in ((a, b, comparison), (b, a, _SWAPPED[comparison])):
        low, high = values.get(right)
        if relation == "ne":
            if low == high:
                own = values.get(left)
                if own == (low, low):
                    return False
                if own[0] == low:
                    own = low + 1, own[1]
                if own[1] == low:
                    own = own[0], low - 1
                if not values.narrow(left, own):
                    return False
            continue
        bound = {"eq": (low, high), "lt": (-math.inf, high - 1), "le": (-math.inf, high),
                 "gt": (low + 1, math.inf), "ge": (low, math.inf)}[relation]  # fmt: skip
        if not values.narrow(left, bound):
            return False
    return True


def join(a: Values, b: Values, widen: bool) -> Values | None:
    """What holds in ``a`` and in ``b``; None if that is ``a``. ``widen``: bounds that move go to infinity."""
    changed = False
    intervals = {}
    for name, (low, high) in a.intervals.items():
        other = b.intervals.get(name, ANY)
        new = min(low, other[0]), max(high, other[1])
        if new != (low, high):
            changed = True
            if widen:
                new = (low if new[0] == low else -math.inf), (high if new[1] == high else math.inf)
        if new != ANY:
            intervals[name] = new
    return Values(intervals, dict(a.predicates)) if changed else None
