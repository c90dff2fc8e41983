"""Facts along the paths that one thread can take.

A rule is a small automaton. At some instructions it *begins* a fact ("this load is not waited for"), whose state the
instructions behind it change or end; where one must not be reached in that state, the rule says what is wrong. The
engine follows every fact over every path on which the thread's known values agree with the branches taken, loops
included, until nothing new turns up. What it reports is a path in the control-flow graph on which no known value
contradicts another; it may still be one that never happens.
"""

from collections.abc import Hashable
import dataclasses

from lint.sites import Graph, is_branch, Site, successors
from lint.values import evaluate, join, Slice, Values

State = Hashable
ENTRY = -1
"""The kernel's start, as where a fact began."""

_MOST_VARIANTS = 16  # of what is known about predicates, for one fact at one block
_JOINS_BEFORE_WIDENING = 12


class Rule:
    """What one rule looks for; states are anything hashable."""

    name = ""
    kinds: frozenset[str | None] = frozenset()
    """Of instructions that begin facts or change them."""
    registers: frozenset[str] = frozenset()
    """Whose use does, too."""
    one_origin = False
    """All facts count as begun by the first instruction that begins one: fewer to follow, where they live long."""

    def concerns(self, site: Site) -> bool:
        return site.kind in self.kinds or not self.registers.isdisjoint(site.reads | site.writes)

    def at_entry(self) -> State | None:
        """State of a fact that begins with the kernel."""
        return None

    def begin(self, site: Site) -> State | None:
        """State of a fact that begins here."""
        return None

    def step(self, state: State, site: Site) -> tuple[State | None, str | None]:
        """The state after an instruction (None: the fact ends), and what is wrong, if anything."""
        return state, None


@dataclasses.dataclass(frozen=True)
class Breach:
    """A rule that does not hold: the instruction that began the fact (``ENTRY``: none), and the one that it met."""

    rule: str
    message: str
    first: int
    second: int


class Walk:
    """All paths of one thread.

    Attributes:
      breaches: of the rules.
      reached: instructions that the thread can come to.
    """

    def __init__(self, graph: Graph, slice_: Slice, thread: int, rules: tuple[Rule, ...] = ()):
        self.graph, self.slice, self.thread, self.rules = graph, slice_, thread, rules
        self.breaches: set[Breach] = set()
        self.reached: set[int] = set()
        self._known: dict[int, dict[tuple, Values]] = {}
        self._joins: dict[tuple, int] = {}
        self._todo: list[tuple[int, tuple]] = []
        self._concerned = [{site.index for site in graph.sites if rule.concerns(site)} for rule in rules]
        self._beginning = [_first_of_runs(graph, indices) for indices in self._concerned]
        self._leading = [graph.leading_to(indices) for indices in self._concerned]
        interesting = slice_.indices.union(*self._concerned)
        self._interesting = {
            start: [i for i in range(start, end) if i in interesting or is_branch(graph.kernel.instructions[i])]
            for start, end in graph.block_of.items()
        }
        self._arrive(0, None, Values())
        for number, rule in enumerate(rules):
            if (state := rule.at_entry()) is not None:
                self._arrive(0, (number, ENTRY, state), Values())
        while self._todo:
            self._block(*self._todo.pop())

    def _arrive(self, block: int, fact, values: Values) -> None:
        if block not in self.graph.block_of or (fact is not None and block not in self._leading[fact[0]]):
            return
        live = self.slice.live[block]
        values.predicates = {name: known for name, known in values.predicates.items() if name in live}
        values.intervals = {name: interval for name, interval in values.intervals.items() if name in live}
        values.links = {}
        table = self._known.setdefault(block, {})
        key = fact, frozenset(values.predicates.items())
        if key not in table and sum(each[0] == fact for each in table) >= _MOST_VARIANTS:
            values.predicates = {}
            key = fact, frozenset()
        if key in table:
            place = block, key
            joined = join(table[key], values, widen=self._joins.get(place, 0) >= _JOINS_BEFORE_WIDENING)
            if joined is None:
                return
            self._joins[place] = self._joins.get(place, 0) + 1
            values = joined
        table[key] = values
        self._todo.append((block, key))

    def _block(self, block: int, key: tuple) -> None:
        instructions, sites = self.graph.kernel.instructions, self.graph.sites
        end = self.graph.block_of[block]
        ways = [(key[0], self._known[block][key].copy())]
        if key[0] is None:
            self.reached.update(range(block, end))
        for index in self._interesting[block]:
            instruction, site = instructions[index], sites[index]
            if is_branch(instruction):
                break
            if index in self.slice.indices:
                ways = [(fact, way) for fact, values in ways for way in evaluate(instruction, values, self.thread)]
                if len(ways) > _MOST_VARIANTS:
                    ways = _merged(ways)
            if self.rules:
                ways = [each for fact, values in ways for each in self._step(fact, values, site, instruction.guard)]
        for fact, values in ways:
            self._leave(end - 1, fact, values)

    def _step(self, fact, values: Values, site: Site, guard) -> list[tuple]:
        executes = True if guard is None else values.holds(guard)
        if executes is False:
            return [(fact, values)]
        after = []
        if fact is None:
            after.append((None, values))
            for number, rule in enumerate(self.rules):
                if site.index in self._beginning[number] and (state := rule.begin(site)) is not None:
                    first = min(self._beginning[number]) if rule.one_origin else site.index
                    after.append(((number, first, state), values.copy()))
            return after
        number, first, state = fact
        if site.index not in self._concerned[number]:
            return [(fact, values)]
        new, message = self.rules[number].step(state, site)
        if message is not None:
            self.breaches.add(Breach(self.rules[number].name, message, first, site.index))
        if new is not None:
            after.append(((number, first, new), values))
        if executes is None and new != state:
            after.append((fact, values.copy()))
        return after

    def _leave(self, last: int, fact, values: Values) -> None:
        guard = self.graph.kernel.instructions[last].guard
        for block, taken in successors(self.graph, last):
            if taken is None or guard is None:
                self._arrive(block, fact, values.copy())
                continue
            # That a branch was taken is not noted: six conditions of a loop would make 64 ways of one.
            if values.holds(guard) in (None, taken):
                self._arrive(block, fact, values.copy())


def _merged(ways: list[tuple]) -> list[tuple]:
    """One way for each fact, with what holds on all of its ways."""
    merged: dict = {}
    for fact, values in ways:
        if fact in merged:
            before = merged[fact]
            common = dict(before.predicates.items() & values.predicates.items())
            merged[fact] = join(before, values, widen=False) or before
            merged[fact].predicates, merged[fact].links = common, {}
        else:
            merged[fact] = values
    return list(merged.items())


def _first_of_runs(graph: Graph, indices: set[int]) -> set[int]:
    """Of instructions of one kind in a row, with no other that the rule looks at between, the first speaks for all."""
    firsts, previous = set(), None
    for index in sorted(indices):
        kind = graph.sites[index].kind
        if (
            previous is None
            or previous[0] != kind
            or any(i in graph.block_of for i in range(previous[1] + 1, index + 1))
        ):
            firsts.add(index)
        previous = kind, index
    return firsts
