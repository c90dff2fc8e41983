"""The rules that one thread's path must keep, as automata (:mod:`lint.flow`). Sections are those of PTX ISA 9.1.

A state is a tuple whose first item says what is still missing.
"""

from typing import ClassVar

from lint.flow import Rule
from lint.sites import ARRIVALS, ASYNC_READERS, Site, TENSOR_MEMORY, WAITS


class AfterSync(Rule):
    """tcgen05.fence::after_thread_sync between any wait or barrier and the next use of tensor memory or its dealloc
    (9.7.16.6.3).

    Also where what was waited for has nothing to do with tensor memory: the fence costs nothing.
    """

    name = "fence after"
    kinds = WAITS | TENSOR_MEMORY | {"fence_after", "dealloc"}

    def begin(self, site):
        return ("fence",) if site.kind in WAITS else None

    def step(self, state, site):
        if site.kind == "fence_after":
            return None, None
        if site.kind in TENSOR_MEMORY or site.kind == "dealloc":
            return None, "no tcgen05.fence::after_thread_sync between them"
        return state, None


class BeforeSync(Rule):
    """tcgen05.wait::ld or ::st, then tcgen05.fence::before_thread_sync, before other threads are told (9.7.16.6.2, .3).

    An allocation needs only the fence. The tensor cores' own work is announced by tcgen05.commit, which implies it.
    What is fenced has to be announced before the next load, store or product: by the first thread of a warp on an
    mbarrier, by others by meeting it.
    """

    name = "fence before"
    kinds = ARRIVALS | {"ld", "st", "mma", "alloc", "wait_ld", "wait_st", "fence_before", "ret"}
    _WAITS: ClassVar = {"ld": "wait_ld", "st": "wait_st"}

    def __init__(self, first_of_warp: bool):
        self._announcing = ARRIVALS - {"warp_sync"} if first_of_warp else ARRIVALS

    def begin(self, site):
        if site.kind in self._WAITS:
            return (self._WAITS[site.kind],)
        return ("fence",) if site.kind == "alloc" else None

    def step(self, state, site):
        (missing,) = state
        if missing == "arrival":
            if site.kind in self._announcing:
                return None, None
            return state, "nothing tells other threads between them" if site.kind in (
                "ld",
                "st",
                "mma",
                "ret",
            ) else None
        if site.kind == missing:
            return ("fence",), None
        if site.kind == "fence_before" and missing == "fence":
            return ("arrival",), None
        if site.kind in ARRIVALS or site.kind == "mma":
            wanted = "fence::before_thread_sync" if missing == "fence" else missing.replace("_", "::")
            return None, f"no tcgen05.{wanted} between them"
        return state, None


class Commit(Rule):
    """tcgen05.commit behind every mma and cp, before its thread waits, meets others, or ends."""

    name = "commit"
    kinds = WAITS | ARRIVALS | {"mma", "cp", "commit", "ret", "dealloc"}

    def begin(self, site):
        return ("commit",) if site.kind in ("mma", "cp") else None

    def step(self, state, site):
        if site.kind == "commit":
            return None, None
        if site.kind in WAITS | ARRIVALS | {"ret", "dealloc"}:
            return None, "no tcgen05.commit between them"
        return state, None


class Copies(Rule):
    """Copies of cp.async: commit_group, wait_group, fence.proxy.async, then the arrival that announces them.

    PTX ISA 9.7.16.6.5. States: ("issued",); ("flying", groups committed since, whether a wait_group has left it
    flying); ("fence",), which is complete, but the async proxy may not see it; ("arrival",). An arrival while a
    wait_group leaves some copies flying announces others, so it is no breach. Which ones is for the emulator to see.

    Args:
      announces: whether an arrival tells threads that multiply; a barrier of the producers alone does not.
      first_of_warp: the thread that arrives for its warp; for the others meeting it (bar.warp.sync) will do.
    """

    name = "copies"
    kinds = ARRIVALS | {"copy", "copy_commit", "copy_wait", "copy_wait_all", "proxy_fence", "ret"}

    def __init__(self, announces, first_of_warp: bool):
        self._announces, self._first_of_warp = announces, first_of_warp

    def begin(self, site):
        return ("issued",) if site.kind == "copy" else None

    def step(self, state, site):
        stage = state[0]
        told = site.kind in ARRIVALS - {"expect", "warp_sync"} and self._announces(site)
        if stage == "arrival":
            if told or (site.kind == "warp_sync" and not self._first_of_warp):
                return None, None
            return state, "nothing announces the copy between them" if site.kind in ("copy", "ret") else None
        if site.kind == "copy_commit":
            return ("flying", 0, False) if stage == "issued" else _older(state), None
        if site.kind == "copy_wait_all" or (site.kind == "copy_wait" and stage == "flying"):
            if site.kind == "copy_wait_all" or state[1] >= (site.number or 0):
                return ("fence",), None
            return ("flying", state[1], True), None
        if site.kind == "proxy_fence" and stage == "fence":
            return ("arrival",), None
        if site.kind == "ret":
            return None, "nothing announces the copy between them"
        if told:
            if stage == "issued":
                return None, "no cp.async.commit_group between them"
            if stage == "fence":
                return None, "no fence.proxy.async between cp.async.wait_group and the arrival"
            if not state[2]:
                return None, "no cp.async.wait_group between them"
        return state, None


def _older(state):
    return ("flying", min(state[1] + 1, 16), state[2]) if state[0] == "flying" else state


class Stores(Rule):
    """Operands that st.shared writes: fence.proxy.async before the arrival.

    Args:
      is_operand: which stores write operands.
    """

    name = "stores"
    kinds = ARRIVALS | {"store_shared", "proxy_fence"}

    def __init__(self, is_operand, announces):
        self._is_operand, self._announces = is_operand, announces

    def begin(self, site):
        return ("fence",) if site.kind == "store_shared" and self._is_operand(site) else None

    def step(self, state, site):
        if site.kind == "proxy_fence":
            return None, None
        if site.kind in ARRIVALS - {"warp_sync"} and self._announces(site):
            return None, "no fence.proxy.async between them"
        return state, None


class Allocation(Rule):
    """relinquish_alloc_permit and dealloc on every way from an alloc to the end; no use after (9.7.16.7.1)."""

    name = "allocation"
    kinds = TENSOR_MEMORY | {"alloc", "relinquish", "dealloc", "commit", "ret"}

    def begin(self, site):
        return {"alloc": ("held", False), "dealloc": ("freed",)}.get(site.kind)

    def step(self, state, site):
        if state[0] == "freed":
            used = site.kind in TENSOR_MEMORY | {"alloc", "dealloc", "commit"}
            return state, "tensor memory was given back" if used else None
        if site.kind == "dealloc":
            return None, None if state[1] else "no tcgen05.relinquish_alloc_permit between them"
        if site.kind == "relinquish":
            return ("held", True), None
        if site.kind == "alloc" and state[1]:
            return state, "an alloc behind relinquish_alloc_permit"
        if site.kind == "ret":
            return None, "no tcgen05.dealloc between them"
        return state, None


class LastBarrier(Rule):
    """A barrier of all threads between any use of tensor memory and its dealloc."""

    name = "dealloc"
    kinds = TENSOR_MEMORY | WAITS | {"commit", "alloc", "dealloc"}
    one_origin = True

    def __init__(self, threads):
        self._threads = threads

    def begin(self, site):
        return ("barrier",) if site.kind in TENSOR_MEMORY | {"commit", "alloc"} else None

    def step(self, state, site):
        if site.is_meeting(self._threads):
            return None, None
        if site.kind == "dealloc":
            return None, "no barrier of all threads between them"
        return state, None


class FirstBarrier(Rule):
    """Barriers in shared memory, and the address of tensor memory, are used behind a barrier of all threads."""

    name = "first barrier"
    kinds = TENSOR_MEMORY | WAITS | {"commit", "arrive", "expect", "bulk", "init", "alloc"}
    _USES = TENSOR_MEMORY | {"commit", "try_wait", "arrive", "expect", "bulk"}

    def __init__(self, threads):
        self._threads = threads

    def at_entry(self):
        return ("barrier",)

    def begin(self, site):
        return ("barrier",) if site.kind in ("init", "alloc") else None

    def step(self, state, site):
        if site.is_meeting(self._threads):
            return None, None
        if site.kind in self._USES:
            return None, "no barrier of all threads before it"
        return state, None


class ClusterBarrier(Rule):
    """barrier.cluster.arrive between any two barrier.cluster.wait, and before the first."""

    name = "cluster barrier"
    kinds = frozenset({"cluster_arrive", "cluster_wait"})

    def at_entry(self):
        return ("arrive",)

    def begin(self, site):
        return ("arrive",) if site.kind == "cluster_wait" else None

    def step(self, state, site):
        return None, "no barrier.cluster.arrive before it" if site.kind == "cluster_wait" else None


class Initialised(Rule):
    """fence.mbarrier_init behind mbarrier.init, before the barrier that others wait at."""

    name = "mbarrier.init"
    kinds = ARRIVALS | WAITS | {"init", "init_fence", "ret"}

    def begin(self, site):
        return ("fence",) if site.kind == "init" else None

    def step(self, state, site):
        if site.kind == "init_fence":
            return None, None
        if site.kind in ARRIVALS | WAITS | {"ret"}:
            return None, "no fence.mbarrier_init between them"
        return state, None


class LaunchDependents(Rule):
    """Dependents start when GEMM1 is behind its own griddepcontrol.wait, and holds its tensor memory.

    A CTA of the next kernel that allocates first would keep this one's from doing so until it ends, and it waits for
    this one.
    """

    name = "launch_dependents"
    kinds = WAITS | {"alloc", "grid_wait", "launch_dependents"}

    def __init__(self, threads, allocates: bool, overlap: bool):
        self._threads = threads
        self._missing = tuple(
            each for each, wanted in (("barrier", allocates), ("griddepcontrol.wait", overlap)) if wanted
        )

    def at_entry(self):
        return self._missing or None

    def begin(self, site):
        return ("barrier",) if site.kind == "alloc" else None

    def step(self, state, site):
        if site.is_meeting(self._threads):
            state = tuple(each for each in state if each != "barrier")
        if site.kind == "grid_wait":
            state = tuple(each for each in state if each != "griddepcontrol.wait")
        if site.kind == "launch_dependents" and state:
            return None, f"no {' and no '.join(state)} before it"
        return state or None, None


class GridWait(Rule):
    """A way to the end without griddepcontrol.wait: a breach for this thread; :mod:`lint.check` wants one without."""

    name = "griddepcontrol.wait"
    kinds = frozenset({"grid_wait", "ret"})

    def at_entry(self):
        return ("wait",)

    def step(self, state, site):
        if site.kind == "grid_wait":
            return None, None
        return state, "no griddepcontrol.wait on a way to the end" if site.kind == "ret" else None


class WgmmaFence(Rule):
    """wgmma.fence before the first product of each group (9.7.15.7.1): registers were written since the last."""

    name = "wgmma.fence"
    kinds = frozenset({"wgmma", "wgmma_fence", "wgmma_commit"})

    def at_entry(self):
        return ("fence",)

    def begin(self, site):
        return ("fence",) if site.kind == "wgmma_commit" else None

    def step(self, state, site):
        if site.kind == "wgmma_fence":
            return None, None
        if site.kind == "wgmma":
            return None, "no wgmma.fence between them"
        return state, None


class Wgmma(Rule):
    """A product's commit_group; then its wait_group before its registers are touched or its stage is given back.

    States: ("issued", ...), then ("flying", groups committed since, whether an mbarrier was waited for since, so that
    it is of an earlier stage, whether a wait_group has been passed).
    """

    name = "wgmma"
    kinds = WAITS | ARRIVALS | {"wgmma", "wgmma_commit", "wgmma_wait", "ret"}

    def __init__(self, graph):
        self._groups = _groups(graph)
        self.registers = frozenset().union(*(reads for _, reads in self._groups.values()))

    def begin(self, site):
        return ("issued", site.index) if site.index in self._groups else None

    def step(self, state, site):
        if state[0] == "issued":
            if site.kind == "wgmma_commit":
                return ("flying", state[1], 0, False, False), None
            if site.kind in WAITS | ARRIVALS | {"ret", "wgmma_wait"}:
                return None, "no wgmma.commit_group between them"
            return state, None
        _, first, age, earlier_stage, waited = state
        if site.kind == "wgmma_commit":
            return ("flying", first, min(age + 1, 8), earlier_stage, waited), None
        if site.kind == "wgmma_wait":
            return (None if age >= (site.number or 0) else ("flying", first, age, earlier_stage, True)), None
        if site.kind == "try_wait":
            return ("flying", first, age, True, waited), None
        if site.kind == "ret":
            return None, "no wgmma.wait_group between them"
        if site.kind in ("arrive", "bar", "bar_arrive") and (earlier_stage or not waited):
            return None, "no wgmma.wait_group that completes it between them"
        if site.kind != "wgmma" and self._touches(site, first):
            return None, "its registers are used before a wgmma.wait_group completes it"
        return state, None

    def _touches(self, site: Site, first: int) -> bool:
        writes, reads = self._groups[first]
        return not writes.isdisjoint(site.reads | site.writes) or not reads.isdisjoint(site.writes)


def _groups(graph) -> dict[int, tuple[frozenset[str], frozenset[str]]]:
    """First product of a group, or of its part in one block -> its accumulators, and its fragments of A."""
    groups, first = {}, None
    for site in graph.sites:
        if site.index in graph.block_of or site.kind in ("wgmma_fence", "wgmma_commit"):
            first = None
        if site.kind == "wgmma":
            first = site.index if first is None else first
            writes, reads = groups.get(first, (frozenset(), frozenset()))
            # Only the accumulators and the fragments of A must stay (PTX ISA, wgmma.wait_group): not a descriptor.
            fragments = {register for register in site.reads if not register.startswith("%rd")}
            groups[first] = writes | site.writes, reads | fragments
    return groups


def _is_reached_from_elsewhere(graph) -> bool:
    """Whether other CTAs of the cluster may arrive at a barrier of this one, which they must not before it is ready."""
    operations = (graph.kernel.instructions[site.index].operation for site in graph.kinds("arrive", "commit"))
    return graph.cluster > 1 and any("shared::cluster" in operation for operation in operations)


def rules_for(graph, overlap: bool, announces, is_operand, first_of_warp: bool) -> tuple[Rule, ...]:
    """The rules that a kernel's instructions call for."""
    kinds = {site.kind for site in graph.sites}
    threads = graph.kernel.threads if graph.cluster == 1 else None  # who has to meet: a CTA, or the cluster
    rules: list[Rule] = []
    if kinds & TENSOR_MEMORY or "alloc" in kinds:
        rules += [AfterSync(), BeforeSync(first_of_warp), Commit(), Allocation(), LastBarrier(threads)]
    if kinds & ASYNC_READERS:
        rules += [Copies(announces, first_of_warp), Stores(is_operand, announces)]
    if "init" in kinds:
        rules += [FirstBarrier(None if _is_reached_from_elsewhere(graph) else graph.kernel.threads), Initialised()]
    if "cluster_wait" in kinds:
        rules.append(ClusterBarrier())
    if "launch_dependents" in kinds:
        # What follows a GEMM reads what the sort wrote, without a wait. What follows another kernel waits for its end,
        # and that kernel waits before it ends (GridWait).
        rules.append(LaunchDependents(threads, "alloc" in kinds, overlap and not kinds.isdisjoint({"mma", "wgmma"})))
    if overlap:
        rules.append(GridWait())
    if "wgmma" in kinds:
        rules += [WgmmaFence(), Wgmma(graph)]
    return tuple(rules)
