"""What the lint needs to know of each instruction, and of the paths between them.

Every instruction that synchronises, copies or multiplies gets a ``kind``. One of these families with an operation that
has no kind here is refused: a lint that overlooks an instruction is worse than none.
"""

from collections.abc import Iterable, Iterator
import copy
import dataclasses
import re

from ptx.parser import Address, Immediate, Instruction, Kernel, Label, Pair, Register, Special, Symbol, Vector

from lint import arithmetic

_KINDS = (
    ("alloc", r"tcgen05\.alloc\.cta_group::[12]\.sync\.aligned\.shared::cta\.b32"),
    ("relinquish", r"tcgen05\.relinquish_alloc_permit\.cta_group::[12]\.sync\.aligned"),
    ("dealloc", r"tcgen05\.dealloc\.cta_group::[12]\.sync\.aligned\.b32"),
    ("ld", r"tcgen05\.ld\.sync\.aligned\.\w+\.x\d+(\.pack::16b)?\.b32"),
    ("st", r"tcgen05\.st\.sync\.aligned\.\w+\.x\d+(\.unpack::16b)?\.b32"),
    ("wait_ld", r"tcgen05\.wait::ld\.sync\.aligned"),
    ("wait_st", r"tcgen05\.wait::st\.sync\.aligned"),
    ("cp", r"tcgen05\.cp\.cta_group::[12]\.\w+(\.warpx4)?"),
    ("mma", r"tcgen05\.mma\.cta_group::[12]\.kind::\w+(\.block_scale\.\w+)?(\.collector::a::\w+)?"),
    ("commit", r"tcgen05\.commit\.cta_group::[12]\.mbarrier::arrive::one\.shared::cluster(\.multicast::cluster)?\.b64"),
    ("fence_before", r"tcgen05\.fence::before_thread_sync"),
    ("fence_after", r"tcgen05\.fence::after_thread_sync"),
    ("init", r"mbarrier\.init\.shared(::cta)?\.b64"),
    ("init_fence", r"fence\.mbarrier_init\.release\.cluster"),
    ("expect", r"mbarrier\.(arrive\.)?expect_tx(\.\w+)*(\.shared(::cta|::cluster)?)\.b64"),
    ("arrive", r"mbarrier\.arrive(\.release\.\w+)?\.shared(::cta|::cluster)?\.b64"),
    ("try_wait", r"mbarrier\.(try|test)_wait(\.parity)?(\.acquire\.\w+)?\.shared(::cta)?\.b64"),
    ("bar", r"(bar|barrier(\.cta)?)\.sync(\.aligned)?"),
    ("bar_arrive", r"(bar|barrier(\.cta)?)\.arrive(\.aligned)?"),
    ("warp_sync", r"bar\.warp\.sync"),
    ("warp", r"(shfl|vote|match|redux|elect)\.[\w.]+"),
    ("cluster_arrive", r"barrier\.cluster\.arrive(\.release|\.relaxed)?(\.aligned)?"),
    ("cluster_wait", r"barrier\.cluster\.wait(\.acquire)?(\.aligned)?"),
    ("copy", r"cp\.async\.c[ag]\.shared(::cta)?\.global(\.L2::\d+B)?"),
    ("copy_commit", r"cp\.async\.commit_group"),
    ("copy_wait", r"cp\.async\.wait_group"),
    ("copy_wait_all", r"cp\.async\.wait_all"),
    ("bulk", r"cp\.async\.bulk\.shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes(\.multicast::cluster)?"),
    ("proxy_fence", r"fence\.proxy\.async(\.shared::cta)?"),
    ("memory_fence", r"fence\.(acq_rel|sc)\.\w+"),
    ("wgmma", r"wgmma\.mma_async\.sync\.aligned\.[\w.]+"),
    ("wgmma_fence", r"wgmma\.fence\.sync\.aligned"),
    ("wgmma_commit", r"wgmma\.commit_group\.sync\.aligned"),
    ("wgmma_wait", r"wgmma\.wait_group\.sync\.aligned"),
    ("grid_wait", r"griddepcontrol\.wait"),
    ("launch_dependents", r"griddepcontrol\.launch_dependents"),
    ("store_shared", r"st\.shared(::cta|::cluster)?[\w.]*"),
    ("ret", r"ret|exit"),
)  # fmt: skip
_KINDS = tuple((kind, re.compile(pattern)) for kind, pattern in _KINDS)
_FAMILIES = ("tcgen05.", "mbarrier.", "bar.", "barrier.", "cp.async", "cp.reduce", "fence", "membar", "wgmma.",
             "griddepcontrol.", "st.async", "st.shared", "red.async", "ret", "exit", "trap", "call")  # fmt: skip

TENSOR_MEMORY = frozenset({"ld", "st", "cp", "mma"})
"""What reads or writes tensor memory."""

ASYNC_READERS = frozenset({"mma", "cp", "wgmma"})
"""What reads shared memory through the async proxy."""

ARRIVALS = frozenset({"arrive", "expect", "bar", "bar_arrive", "warp_sync", "cluster_arrive"})
"""What tells other threads that this one has come so far; tcgen05.commit tells it of the tensor cores' work."""

RANK = 1 << 16
"""The lint counts threads on through a cluster: thread t of CTA r is ``r * RANK + t``."""

WAITS = frozenset({"try_wait", "bar", "cluster_wait"})
"""After what other threads' work may be relied on."""


class UnknownInstructionError(ValueError):
    """An operation of a family that the lint looks at, but which it does not know."""


@dataclasses.dataclass(frozen=True)
class Site:
    """An instruction as the rules see it.

    Attributes:
      index: in ``Kernel.instructions``.
      kind: see ``_KINDS``; None: of no interest, but for the registers.
      number: of a wait_group, the groups that may stay in flight.
      count: threads of a named barrier; None: all of the CTA.
      offset: of the mbarrier that is used, in shared memory, without what is not constant: where an array starts, if it
        is indexed in one. None: cannot tell.
      writes, reads: names of registers.
    """

    index: int
    kind: str | None
    number: int | None
    count: int | None
    offset: int | None
    writes: frozenset[str]
    reads: frozenset[str]

    def is_meeting(self, threads: int | None) -> bool:
        """Whether all meet here: the ``threads`` of a CTA, or, if that is None, those of a cluster."""
        return self.kind == "cluster_wait" or (
            self.kind == "bar" and threads is not None and self.count in (None, threads)
        )


class Graph:
    """A kernel as sites and blocks.

    Attributes:
      kernel: what was parsed.
      sites: one for each instruction.
      block_of: start of a block -> index behind its last instruction.
      cluster: CTAs of a cluster.
    """

    def __init__(self, kernel: Kernel, cluster: int = 1):
        self.kernel, self.cluster = kernel, cluster
        self.offsets = offsets = Offsets(kernel)
        self.sites = tuple(_site(i, instruction, offsets) for i, instruction in enumerate(kernel.instructions))
        starts = {0, *kernel.labels.values()}
        starts |= {
            i + 1 for i, each in enumerate(kernel.instructions) if is_branch(each) or self.sites[i].kind == "ret"
        }
        ordered = sorted(start for start in starts if start < len(kernel.instructions))
        self.block_of = dict(zip(ordered, [*ordered[1:], len(kernel.instructions)], strict=True))

        self._by_kind = _by_kind(self.sites)

    def without(self, index: int) -> "Graph":
        """The same, but for an instruction, no branch, that does nothing."""
        other = copy.copy(self)
        nothing = dataclasses.replace(self.sites[index], kind=None, writes=frozenset(), reads=frozenset())
        other.sites = (*self.sites[:index], nothing, *self.sites[index + 1 :])
        other._by_kind = _by_kind(other.sites)
        return other

    def kinds(self, *kinds: str) -> list[Site]:
        """Sites of these kinds, in order."""
        found = [site for kind in kinds for site in self._by_kind.get(kind, ())]
        return sorted(found, key=lambda site: site.index)

    def initial_count(self, site: Site) -> int | None:
        """Arrivals of one phase, where an mbarrier.init has a constant."""
        return self.offsets.constant(self.kernel.instructions[site.index].operands[1])

    def leading_to(self, indices: Iterable[int]) -> frozenset[int]:
        """Starts of the blocks from which one of these instructions can be reached."""
        indices = set(indices)
        before: dict[int, set[int]] = {}
        for start, end in self.block_of.items():
            for after, _ in successors(self, end - 1):
                before.setdefault(after, set()).add(start)
        todo = [start for start, end in self.block_of.items() if not indices.isdisjoint(range(start, end))]
        found = set(todo)
        while todo:
            more = before.get(todo.pop(), set()) - found
            found |= more
            todo += more
        return frozenset(found)


def _by_kind(sites: tuple[Site, ...]) -> dict[str | None, list[Site]]:
    found: dict[str | None, list[Site]] = {}
    for site in sites:
        found.setdefault(site.kind, []).append(site)
    return found


def is_branch(instruction: Instruction) -> bool:
    return instruction.operation in ("bra", "bra.uni")


def kind(operation: str) -> str | None:
    """What the rules call an operation; None if none looks at it.

    Raises:
      UnknownInstructionError: one should, probably.
    """
    for name, pattern in _KINDS:
        if pattern.fullmatch(operation):
            return name
    if operation.startswith(_FAMILIES):
        raise UnknownInstructionError(f"{operation}: not known to the lint")
    return None


_WITH_OFFSET = ("init", "expect", "arrive", "try_wait", "bulk", "commit")  # of their last address


def _site(index: int, instruction: Instruction, offsets: "Offsets") -> Site:
    operands = instruction.operands
    name = kind(instruction.operation)
    number = count = offset = None
    if name in ("copy_wait", "wgmma_wait"):
        number = operands[0].bits if isinstance(operands[0], Immediate) else None
    if name in ("bar", "bar_arrive") and len(operands) > 1:
        count = operands[1].bits if isinstance(operands[1], Immediate) else -1
    if name in _WITH_OFFSET:
        found = [operand for operand in operands if isinstance(operand, Address)]
        offset = offsets.of(found[-1])
    results = _results(instruction)
    named = [set(registers_of(operand)) for operand in operands]
    writes = set().union(*named[:results])
    reads = set().union(*named[results:])
    for operand in operands[:results]:
        if isinstance(operand, Address):
            reads |= set(registers_of(operand))
            writes -= set(registers_of(operand))
    if name == "wgmma":
        reads |= writes  # it adds to what is there
    return Site(index, name, number, count, offset, frozenset(writes), frozenset(reads))


_NO_RESULT = ("st.", "red.", "bra", "ret", "exit", "bar", "fence", "cp.", "tcgen05.st", "tcgen05.mma", "tcgen05.cp",
              "tcgen05.alloc", "tcgen05.dealloc", "tcgen05.commit", "tcgen05.wait", "tcgen05.fence", "mbarrier.init",
              "tcgen05.relinquish", "griddepcontrol", "setmaxnreg", "nanosleep", "membar", "prefetch")  # fmt: skip


def _results(instruction: Instruction) -> int:
    """How many operands an instruction writes."""
    if instruction.operation.startswith(_NO_RESULT) or not instruction.operands:
        return 0
    return 1


def registers_of(operand) -> Iterator[str]:
    """Names of all registers in an operand."""
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers_of(item)
    elif isinstance(operand, Pair):
        yield from (each.name for each in (operand.value, operand.predicate) if each is not None)
    elif isinstance(operand, Address) and isinstance(operand.base, Register):
        yield operand.base.name


class Offsets:
    """Where in shared memory addresses lie: what is known of them, with everything else taken as 0."""

    def __init__(self, kernel: Kernel):
        self._definitions: dict[str, list[Instruction]] = {}
        for instruction in kernel.instructions:
            for operand in instruction.operands[: _results(instruction)]:
                if isinstance(operand, Register) and not _advances(instruction):
                    self._definitions.setdefault(operand.name, []).append(instruction)

    def of(self, address: Address, thread: int | None = None) -> int | None:
        """The constant part, with what follows from the thread's index, if that is given. None: no telling."""
        base, _ = self._operand(address.base, thread, 0) if isinstance(address.base, Register) else (0, True)
        return None if base is None else base + address.offset

    def constant(self, operand, thread: int | None = None) -> int | None:
        """The value of an operand that is constant, or that follows from the thread's index, if that is given."""
        value, whole = self._operand(operand, thread, 0)
        return value if whole else None

    def _operand(self, operand, thread: int | None, depth: int) -> tuple[int | None, bool]:
        """(constant part, whether that is all)."""
        if isinstance(operand, Immediate):
            return operand.bits, True
        if isinstance(operand, Symbol):
            return 0, True
        if isinstance(operand, Special) and operand.name == "%tid.x" and thread is not None:
            return thread % RANK, True
        if not isinstance(operand, Register):
            return 0, False
        definitions = self._definitions.get(operand.name, [])
        if not definitions or depth > 32:
            return None, False
        if len(definitions) > 1:  # an index that starts anew
            return 0, False
        operation, sources = definitions[0].operation.split("."), definitions[0].operands[1:]
        if operation[0] in ("mov", "cvt", "mapa") or operation[:3] == ["shfl", "sync", "idx"]:
            return self._operand(sources[0], thread, depth + 1)
        parts = [self._operand(source, thread, depth + 1) for source in sources]
        numbers = [number for number, _ in parts]
        if None in numbers:
            return None, False
        if all(whole for _, whole in parts):
            result = arithmetic.exact(operation, numbers)
            if result is not None:
                return result, True
        if operation[0] in ("add", "or"):
            return sum(numbers), False
        return (numbers[2] if operation[:2] == ["mad", "lo"] else 0), False


def _advances(instruction: Instruction) -> bool:
    """Whether it adds to a register what is in it: an address that is counted up in a loop."""
    result, *sources = instruction.operands
    return instruction.operation.startswith("add.") and result in sources


def successors(graph: Graph, last: int) -> list[tuple[int, bool | None]]:
    """Blocks after the one that ends with instruction ``last``: (start, value of its guard that goes there or None)."""
    instruction = graph.kernel.instructions[last]
    if not is_branch(instruction):
        if graph.sites[last].kind == "ret" and instruction.guard is None:
            return []
        return [(last + 1, None)]
    target = next(operand for operand in instruction.operands if isinstance(operand, Label)).target
    if instruction.guard is None:
        return [(target, None)]
    return [(target, True), (last + 1, False)]
