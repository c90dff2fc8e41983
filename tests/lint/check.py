"""``check(kernel)``: all findings of the lint in one kernel."""

import copy
import dataclasses
import functools
import itertools

from ptx.parser import Address, Immediate, Kernel

from lint import flow, rules
from lint.sites import ASYNC_READERS, Graph, RANK, Site
from lint.values import Slice

_USERS = ("try_wait", "arrive", "expect", "commit", "bulk")
"""Kinds of instructions that use an mbarrier."""

_ALL_LANES = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is wrong with a kernel.

    Attributes:
      kernel: its name.
      rule: that does not hold.
      message: what is missing.
      first, second: lines of the two instructions, and their text; ``first`` is None where it is the kernel's start, or
        nothing in particular.
      threads: of which this was seen.
    """

    kernel: str
    rule: str
    message: str
    first: tuple[int, str] | None
    second: tuple[int, str] | None
    threads: tuple[int, ...] = ()

    def __str__(self) -> str:
        ends = [f"line {line} `{text[:90]}`" for line, text in (each for each in (self.first, self.second) if each)]
        seen = f" (thread {self.threads[0]})" if self.threads else ""
        return f"{self.kernel[:60]}: {self.rule}: {' .. '.join(ends)}: {self.message}{seen}"


def check(kernel: Kernel, overlap: bool = False, cluster: int = 1) -> list[Finding]:
    """All findings, in the order of lines.

    Args:
      kernel: from ``ptx.parser.parse``.
      overlap: whether it is launched before the kernel in front of it has ended (``Spec.overlap``).
      cluster: CTAs that are launched together (``Spec.cluster``).

    Raises:
      UnknownInstructionError: an operation that the lint should know and does not.
    """
    return Lint(kernel, overlap, cluster).findings()


class Lint:
    """The lint of one kernel; arguments are those of :func:`check`.

    Attributes:
      graph: the kernel's instructions as the rules see them.
    """

    def __init__(self, kernel: Kernel, overlap: bool = False, cluster: int = 1):
        self.kernel, self.overlap = kernel, overlap
        self.graph = Graph(kernel, cluster)
        self._slice = Slice(self.graph)
        self._groups = self._threads_by_reach()
        self._breaches: dict[int, frozenset[flow.Breach]] = {}  # of the group that begins with a thread

    def findings(self) -> list[Finding]:
        """All of them, in the order of lines."""
        found: dict[flow.Breach, list[int]] = {}
        waiting = set()  # CTAs of the cluster of which a thread has no way to the end without griddepcontrol.wait
        waits = {site.index for site in self.graph.kinds("grid_wait")}
        for (reached, _), threads in self._groups.items():
            if threads[0] not in self._breaches:
                self._breaches[threads[0]] = self._walk(threads[0], not waits.isdisjoint(reached))
            breaches = self._breaches[threads[0]]
            no_wait = {breach for breach in breaches if breach.rule == rules.GridWait.name}
            if not no_wait and not waits.isdisjoint(reached):
                waiting |= {thread // RANK for thread in threads}
            for breach in breaches - no_wait:
                found.setdefault(breach, []).extend(threads)
        findings = [
            Finding(self.kernel.name, b.rule, b.message, self._line(b.first), self._line(b.second), tuple(threads))
            for b, threads in found.items()
        ]
        if self.overlap and len(waiting) < self.graph.cluster:
            message = "every thread of a CTA has a way to the end without it"
            findings.append(self._finding(rules.GridWait.name, message))
        findings += [*self._roles(), *self._pairs(), *self._counts(), *self._cta_groups()]
        return sorted(findings, key=lambda each: (each.second or each.first or (0,), each.first or (0,), each.rule))

    def without(self, index: int) -> list[Finding]:
        """The findings if an instruction, no branch, were not there. Only threads that reach it are walked again."""
        self.findings()
        other = copy.copy(self)
        other.graph = self.graph.without(index)
        other.__dict__.pop("_starts", None)
        again = [threads[0] for (reached, _), threads in self._groups.items() if index in reached]
        other._breaches = {first: breaches for first, breaches in self._breaches.items() if first not in again}
        return other.findings()

    def _walk(self, thread: int, may_wait: bool) -> frozenset[flow.Breach]:
        announces = functools.cache(self._announces)
        wanted = rules.rules_for(self.graph, self.overlap, announces, self._is_operand, thread % 32 == 0)
        wanted = tuple(rule for rule in wanted if may_wait or not isinstance(rule, rules.GridWait))
        return frozenset(flow.Walk(self.graph, self._slice, thread, wanted).breaches)

    def _line(self, index: int) -> tuple[int, str] | None:
        if index == flow.ENTRY:
            return None
        instruction = self.kernel.instructions[index]
        return instruction.line, instruction.text

    def _finding(self, rule: str, message: str, *sites: Site) -> Finding:
        first, second = [*[self._line(site.index) for site in sites[:2]], None, None][:2]
        return Finding(self.kernel.name, rule, message, first, second)

    def _threads_by_reach(self) -> dict[tuple[frozenset[int], bool], list[int]]:
        """Two threads of each warp, its first and another, of each CTA of a cluster, by what they can reach."""
        groups: dict[tuple, list[int]] = {}
        total = self.kernel.threads or 32
        for rank, warp in itertools.product(range(self.graph.cluster), range(0, total, 32)):
            for thread in (rank * RANK + warp, rank * RANK + warp + 1):
                walk = flow.Walk(self.graph, self._slice, thread)
                groups.setdefault((frozenset(walk.reached), thread % 32 == 0), []).append(thread)
        return groups

    def _threads_of(self, *sites: Site) -> set[int]:
        """Of the threads that were looked at, those that can reach one of these."""
        indices = {site.index for site in sites}
        return {thread for (reached, _), threads in self._groups.items() if indices & reached for thread in threads}

    def _announces(self, site: Site) -> bool:
        """Whether an arrival tells threads that read shared memory through the async proxy."""
        if site.kind == "arrive":
            waits = [each for each in self.graph.kinds("try_wait") if self._same_array(each, site)]
            listeners = self._threads_of(*waits) if waits else None
        elif site.is_meeting(self.kernel.threads) or site.kind == "cluster_arrive":
            return True
        else:
            numbers = set(self._numbers(site).values())
            listeners = {
                thread
                for each in self.graph.kinds("bar", "bar_arrive")
                for thread, number in self._numbers(each).items()
                if number in numbers or None in numbers or number is None
            }
        readers = self._threads_of(*self.graph.kinds(*ASYNC_READERS))
        return listeners is None or bool(listeners & readers)

    def _numbers(self, barrier: Site) -> dict[int, int | None]:
        """Which named barrier it is for the threads that can reach it; None: cannot tell."""
        operand = self.kernel.instructions[barrier.index].operands[0]
        return {thread: self.graph.offsets.constant(operand, thread) for thread in self._threads_of(barrier)}

    def _is_operand(self, site: Site) -> bool:
        """Whether a store to shared memory is taken to write what products read.

        Our kernels allocate operand buffers first and barriers behind them; what is stored behind the first barrier is
        bookkeeping. A store whose place cannot be told counts as an operand.
        """
        barriers = [each.offset for each in self.graph.kinds("init") if each.offset is not None]
        address = self.kernel.instructions[site.index].operands[0]
        assert isinstance(address, Address)
        for thread in self._threads_of(site):
            place = self.graph.offsets.of(address, thread)
            if not barriers or place is None or place < min(barriers):
                return True
        return False

    # -- what is no matter of one path --------------------------------------------------------------------------------

    def _roles(self) -> list[Finding]:
        """One thread issues all products, copies of scales and commits; whole warps do what is ``.sync.aligned``
        of tcgen05, and what waits for all lanes.
        """
        findings = []
        issue = self.graph.kinds("mma", "cp", "commit")
        issuers = self._threads_of(*issue)
        if len(issuers) > 1 or any(thread % 32 for thread in issuers):
            message = f"threads {sorted(issuers)} issue products, scale copies or commits; one thread has to"
            findings.append(self._finding("one issuer", message, issue[0], issue[-1]))
        aligned = self.graph.kinds("alloc", "relinquish", "dealloc", "ld", "st", "wait_ld", "wait_st")
        for site in [*aligned, *filter(self._waits_for_a_warp, self.graph.kinds("warp", "warp_sync"))]:
            threads = self._threads_of(site)
            alone = {thread for thread in threads if thread ^ 1 not in threads}
            if alone:
                message = f"only one of threads {min(alone) & ~1} and {min(alone) | 1} comes here"
                findings.append(self._finding("whole warps", message, site))
        owners = [self._threads_of(*self.graph.kinds(kind)) for kind in ("alloc", "dealloc", "relinquish")]
        if any(owner != owners[0] or len(owner) > 2 * self.graph.cluster for owner in owners):
            sites = self.graph.kinds("alloc", "dealloc", "relinquish")
            findings.append(self._finding("one allocator", "one warp has to allocate and to free", sites[0], sites[-1]))
        return findings

    def _waits_for_a_warp(self, site: Site) -> bool:
        """Whether its mask has all lanes; one that is in a register cannot be told, and passes."""
        mask = self.kernel.instructions[site.index].operands[-1]
        return isinstance(mask, Immediate) and mask.bits & _ALL_LANES == _ALL_LANES

    def _cta_groups(self) -> list[Finding]:
        sites = self.graph.kinds("alloc", "relinquish", "dealloc", "cp", "mma", "commit")
        groups = {}
        for site in sites:
            groups.setdefault(self.kernel.instructions[site.index].operation.split("cta_group::")[1][0], site)
        return [self._finding("cta_group", "both in one kernel", *groups.values())] if len(groups) > 1 else []

    def _pairs(self) -> list[Finding]:
        """What is waited for arrives somewhere, and what arrives is waited for; bytes are announced and copied."""
        findings = []
        for waits, arrivals, message in (
            (("try_wait",), ("arrive", "expect", "commit"), "nothing arrives at this barrier"),
            (("arrive", "expect", "commit"), ("try_wait",), "nothing waits for this barrier"),
            (("bulk",), ("expect",), "no bytes are announced at this barrier"),
            (("expect",), ("bulk",), "no bytes are copied to this barrier"),
            (_USERS, ("init",), "this barrier is not initialised"),
        ):
            others = self.graph.kinds(*arrivals)
            for site in self.graph.kinds(*waits):
                if not any(self._same_array(site, other) for other in others):
                    findings.append(self._finding("barriers", message, site))
        for arrival in self.graph.kinds("arrive"):
            for wait in self.graph.kinds("try_wait"):
                operations = [self.kernel.instructions[site.index].operation for site in (arrival, wait)]
                if "shared::cluster" not in operations[0] or not self._same_array(arrival, wait):
                    continue
                if ".release.cluster" not in operations[0] or ".acquire.cluster" not in operations[1]:
                    message = "an arrival from another CTA needs .release.cluster, and its wait .acquire.cluster"
                    findings.append(self._finding("cluster", message, arrival, wait))
        return findings

    def _counts(self) -> list[Finding]:
        """As many threads can arrive at a barrier as its phase counts, and the first of an array is initialised."""
        findings = []
        inits = {site.offset: site for site in self.graph.kinds("init")}
        for start in sorted(self._starts) if None not in inits else ():
            users = [site for site in self.graph.kinds(*_USERS) if site.offset == start]
            arrivals = [site for site in users if site.kind in ("arrive", "expect", "commit")]
            if start not in inits:
                findings.append(self._finding("barriers", f"the barrier at {start} is not initialised", users[0]))
                continue
            count = self.graph.initial_count(inits[start])
            # Of each warp two threads were looked at; the second stands for 31. A thread may arrive at several places.
            able = sum(31 if thread % 32 else 1 for site in arrivals for thread in self._threads_of(site))
            if arrivals and count is not None and able < count:
                message = f"a phase counts {count} arrivals, and no more than {able} can come"
                findings.append(self._finding("barriers", message, inits[start], arrivals[0]))
        holes = sorted(inits) if None not in inits else []
        for before, after in itertools.pairwise(holes):
            if before % 8 == after % 8 and 8 < after - before <= 64:
                message = f"{(after - before) // 8 - 1} barriers between them are not initialised"
                findings.append(self._finding("barriers", message, inits[before], inits[after]))
        return findings

    def _same_array(self, a: Site, b: Site) -> bool:
        """Whether two instructions may use barriers of one array; True where that cannot be told."""
        if a.offset is None or b.offset is None:
            return True
        return self._array_of(a) == self._array_of(b)

    def _array_of(self, site: Site) -> int:
        """Where an array starts: the offset that is used, or, of a barrier that is initialised, the last one below."""
        below = [start for start in self._starts if start <= site.offset]
        return max(below, default=site.offset) if site.kind == "init" else site.offset

    @functools.cached_property
    def _starts(self) -> set[int]:
        return {site.offset for site in self.graph.kinds(*_USERS) if site.offset is not None}
