"""The lint of PTX (tests/lint): our kernels keep its rules, and no fence or wait can be dropped without a finding."""

import collections
import importlib.util
import re

from lint import snippets
from lint.check import check, Lint
from lint.compiled import compiled, some_specs
from lint.sites import UnknownInstructionError
from ptx import parser
import pytest

HAS_DSL = importlib.util.find_spec("cutlass") is not None
needs_dsl = pytest.mark.skipif(not HAS_DSL, reason="nvidia-cutlass-dsl is not installed")

ORDERING = (
    "alloc", "relinquish", "dealloc", "commit", "wait_ld", "wait_st", "fence_before", "fence_after", "init",
    "init_fence", "bar", "copy_commit", "copy_wait", "proxy_fence", "grid_wait", "wgmma_fence",
    "wgmma_commit", "wgmma_wait",
)  # fmt: skip
"""Kinds of instructions that are dropped, one at a time, and must be missed: fences, waits, and what pairs with them.

What a dropped copy, product, wait at an mbarrier or arrival does is for the emulator to see.
"""


def findings(text, overlap=False):
    return check(parser.parse(text), overlap)


def rules_broken(text, overlap=False):
    return {finding.rule for finding in findings(text, overlap)}


def without(text, line, count=1):
    """The snippet without the ``count``-th line that begins so."""
    places = [match for match in re.finditer(rf"^ *{re.escape(line)}.*\n", text, re.MULTILINE)]
    return text[: places[count - 1].start()] + text[places[count - 1].end() :]


def survivors(lint, init=False):
    """Instructions of ORDERING that nobody misses, as "kind@line", and how often each kind was dropped."""
    kinds = ORDERING if init else [kind for kind in ORDERING if kind != "init"]
    dropped = lint.graph.kinds(*kinds)
    lines = lint.kernel.instructions
    missed = [f"{site.kind}@{lines[site.index].line}" for site in dropped if not lint.without(site.index)]
    return missed, collections.Counter(site.kind for site in dropped)


SNIPPETS = {"tensor memory": (snippets.TENSOR_MEMORY, True), "stores": (snippets.STORES, False),
            "wgmma": (snippets.WGMMA, True)}  # fmt: skip


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_snippets_keep_the_rules(name):
    text, overlap = SNIPPETS[name]
    assert [str(finding) for finding in findings(text, overlap)] == []


@pytest.mark.parametrize(
    ("name", "redundant"),
    [
        # The products come behind another wait with its fence, the last barrier behind another arrival with its.
        ("tensor memory", ["fence_after", "fence_after", "fence_before"]),
        ("stores", ["fence_before"]),
        ("wgmma", []),
    ],
)
def test_whatever_is_dropped_from_a_snippet_is_missed(name, redundant):
    text, overlap = SNIPPETS[name]
    missed, dropped = survivors(Lint(parser.parse(text), overlap), init=True)
    assert [each.split("@")[0] for each in missed] == redundant, missed
    assert sum(dropped.values()) >= 10


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("tcgen05.wait::ld", "fence before"),
        ("tcgen05.relinquish", "allocation"),
        ("tcgen05.dealloc", "allocation"),
        ("griddepcontrol.wait", "launch_dependents"),
        ("fence.mbarrier_init", "mbarrier.init"),
        ("fence.proxy.async", "copies"),
        ("bar.sync 0;", "first barrier"),
        ("mbarrier.init.shared.b64 [%r4+40968]", "barriers"),
        ("mbarrier.arrive.shared.b64 %rd7", "barriers"),
    ],
)
def test_a_finding_says_which_rule_and_where(line, rule):
    text = without(snippets.TENSOR_MEMORY, line)
    found = [finding for finding in findings(text, overlap=True) if finding.rule == rule]
    assert found
    for finding in found:
        for end in (finding.first, finding.second):
            assert end is None or " ".join(text.splitlines()[end[0] - 1].split()).startswith(end[1].split()[0])
        assert finding.kernel == "snippet"
        assert rule in str(finding)


def changed(old, new, text=snippets.TENSOR_MEMORY, count=1):
    assert text.count(old) >= count, old
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        # In the wrong order.
        (changed("griddepcontrol.wait;\n griddepcontrol.launch_dependents;",
                 "griddepcontrol.launch_dependents;\n griddepcontrol.wait;"), "launch_dependents"),
        (changed("cp.async.wait_group 0;\n fence.proxy.async.shared::cta;",
                 "fence.proxy.async.shared::cta;\n cp.async.wait_group 0;"), "copies"),
        (changed("tcgen05.wait::ld.sync.aligned;\n tcgen05.fence::before_thread_sync;",
                 "tcgen05.fence::before_thread_sync;\n tcgen05.wait::ld.sync.aligned;"), "fence before"),
        # In the wrong hands.
        (changed(" @%p8 bra FINISH;\n", ""), "one issuer"),
        (changed("tcgen05.wait::ld.sync.aligned;", "@%p30 tcgen05.wait::ld.sync.aligned;")
         .replace("%p<30>", "%p<31>"), "fence before"),
        (changed(" @%p2 bra END;\n", " setp.ne.s32 %p20, %r2, 3;\n @%p20 bra END;\n"), "one allocator"),
        (changed(" @%p2 bra END;\n", " setp.ne.s32 %p20, %r1, 128;\n @%p20 bra END;\n"), "whole warps"),
        (changed(" bar.warp.sync -1;\n setp.ne.s32 %p5, %r3, 0;\n @%p5 bra GATHERED;\n",
                 " setp.ne.s32 %p5, %r3, 0;\n @%p5 bra GATHERED;\n bar.warp.sync -1;\n"), "whole warps"),
        (changed(" mbarrier.arrive.shared.b64 %rd3, [%r4+40960], %r6;\nGATHERED:",
                 " mbarrier.arrive.shared.b64 %rd3, [%r4+40960], %r6;\n shfl.sync.idx.b32 %r12, %r10, 0, 31, -1;\n"
                 "GATHERED:"), "whole warps"),
        (changed("tcgen05.commit.cta_group::1", "tcgen05.commit.cta_group::2"), "cta_group"),
        # Too late, too early, too often, too few.
        (changed(" tcgen05.dealloc", " tcgen05.ld.sync.aligned.16x256b.x1.b32 {%r20, %r21, %r22, %r23}, [%r9];\n"
                 " tcgen05.dealloc"), "dealloc"),
        (changed("%r9, %r30;\n", "%r9, %r30;\n tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r9, %r30;\n"),
         "allocation"),
        (changed("mov.b32 %r7, 4;", "mov.b32 %r7, 5;"), "barriers"),
        (changed("[%r4+40976], %r6", "[%r4+41200], %r6"), "barriers"),
        (changed("[%r4+40984], 1,", "[%r4+40992], 1,"), "barriers"),
        (changed("bar.sync 0;", "barrier.cluster.wait;"), "cluster barrier"),
        # A count that lets one group fly, where there is one.
        (changed("wait_group 0;", "wait_group 1;"), "copies"),
        (changed("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", snippets.WGMMA), "wgmma"),
        (changed("commit_group.sync.aligned;", "commit_group.sync.aligned; mov.b32 %r21, 0;", snippets.WGMMA), "wgmma"),
        (changed("cp.async.wait_group 0;\n", "", snippets.WGMMA), "copies"),
    ],
)  # fmt: skip
def test_what_is_moved_or_changed_is_missed(text, rule):
    assert rule in rules_broken(text, overlap=True)


def test_an_arrival_from_another_cta_has_the_scope_of_the_cluster():
    arrival = "mbarrier.arrive.shared.b64 %rd7, [%r4+40984], %r6"
    remote = changed(arrival, "mbarrier.arrive.shared::cluster.b64 _, [%r4+40984]")
    assert "cluster" in rules_broken(remote, overlap=True)
    released = remote.replace("arrive.shared::cluster", "arrive.release.cluster.shared::cluster")
    assert "cluster" in rules_broken(released, overlap=True)
    acquired = released.replace("try_wait.parity.shared", "try_wait.parity.acquire.cluster.shared")
    assert not rules_broken(acquired, overlap=True)


def test_barriers_that_another_cta_arrives_at_are_used_when_the_cluster_has_met():
    """Those that only their own CTA arrives at, when that has."""

    def is_early(text):
        return "first barrier" in {finding.rule for finding in check(parser.parse(text), True, cluster=2)}

    arrival = "mbarrier.arrive.shared.b64 %rd3, [%r4+40960], 1;"
    remote = changed(arrival, "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4+40960];", snippets.WGMMA)
    assert not is_early(snippets.WGMMA)
    assert is_early(without(snippets.WGMMA, "bar.sync 0;"))
    assert is_early(remote)
    met = "barrier.cluster.arrive; barrier.cluster.wait;"
    assert not is_early(changed("bar.sync 0;", met, remote))
    assert is_early(snippets.TENSOR_MEMORY)  # a commit may arrive elsewhere


def test_a_descriptor_may_be_overwritten_while_its_product_flies():
    after = "wgmma.commit_group.sync.aligned;"
    assert not rules_broken(changed(after, f"{after} mov.b64 %rd5, 0;", snippets.WGMMA), overlap=True)


def test_only_paths_that_can_be_are_followed():
    """A drain that is skipped where nothing is in flight is no finding; elsewhere, or where one cannot tell, it is."""
    assert not findings(snippets.WGMMA, overlap=True)
    counted_wrongly = changed(" setp.lt.s32 %p6, %r11, 1;", " setp.lt.s32 %p6, %r11, 2;", snippets.WGMMA)
    assert rules_broken(counted_wrongly, overlap=True) == {"copies"}
    loaded = changed(" setp.lt.s32 %p6, %r11, 1;", " setp.lt.s32 %p6, %r5, 1;", snippets.WGMMA)
    assert rules_broken(loaded, overlap=True) == {"copies"}


@pytest.mark.parametrize(
    "instruction", ["fence.proxy.alias;", "tcgen05.shift.cta_group::1.down [%r9];", "bar.red.popc;"]
)
def test_what_the_lint_does_not_know_is_refused(instruction):
    with pytest.raises(UnknownInstructionError, match=instruction.split()[0].rstrip(";")):
        findings(changed("ret;", f"{instruction}\n ret;"))


def parameters(wanted):
    """Of each target the kernels with these in their names."""
    return [
        pytest.param(target, spec, id=f"{target}-{spec.name.removeprefix('jax_moe_')[:48]}")
        for target, pattern in wanted.items()
        for spec in some_specs(target)
        if re.search(pattern, spec.name)
    ]


@needs_dsl
@pytest.mark.parametrize(
    ("target", "spec"),
    parameters(
        {
            "sm_90a": "gemm._n(16|48)m.*w4a4|gemm1_n112.*w4a16|(product|linear).*w4a16|groups_e128.*rows|_maps"
            "|dynamic|h_rows",
            "sm_100f": "",
        }
    ),
)
def test_our_kernels_keep_the_rules(target, spec):
    assert [str(finding) for finding in check(compiled(spec, target)[1], spec.overlap, spec.cluster)] == []


@needs_dsl
def test_the_number_of_a_barrier_follows_from_the_thread():
    """Epilogues of three m warpgroups have a barrier each, by one instruction."""
    from jax_moe.kernels.sm90.device.mainloop import EPILOGUE

    (spec,) = [spec for spec in some_specs("sm_90a") if re.match("jax_moe_gemm1_n32m3.*dynamic", spec.name)]
    lint = Lint(compiled(spec, "sm_90a")[1], spec.overlap)
    met = collections.defaultdict(set)
    for barrier in lint.graph.kinds("bar"):
        if isinstance(lint.kernel.instructions[barrier.index].operands[0], parser.Register):
            for thread, number in lint._numbers(barrier).items():
                met[thread // 128].add(number)
    assert met == {warpgroup: {EPILOGUE + warpgroup - 1} for warpgroup in (1, 2, 3)}


SURVIVORS = {
    # sm_100f: the first and the last barrier of the kernel, SUMS_EMPTY in front of FULL, and FULL in front of EMPTY.
    "fence_after": "the next use of tensor memory comes behind another wait and its fence",
    "fence_before": "at the last barrier everything has been handed over already",
    "commit": "of a stage's last block: the stage's own commit follows; dequantisers wait for ever (emulator)",
    "bar": "threads of one role meet: bookkeeping in shared memory (emulator: races)",
    # sm_90a.
    "wgmma_wait": "a later wait_group completes the group before its registers are touched or its stage is given back",
    "proxy_fence": "before the sentinel, when everything in flight has been announced",
}
"""What may be dropped from our kernels without a finding, and why."""

_MUTATED = {"sm_90a": "gemm1_n16m.*w4a4", "sm_100f": "gemm1_n16b"}


@needs_dsl
@pytest.mark.parametrize(("target", "spec"), parameters(_MUTATED))
def test_whatever_is_dropped_from_our_kernels_is_missed(target, spec):
    missed, dropped = survivors(Lint(compiled(spec, target)[1], spec.overlap, spec.cluster))
    missed = collections.Counter(each.split("@")[0] for each in missed)
    print(spec.name, "dropped", dict(dropped), "survived", dict(missed))
    assert set(missed) <= set(SURVIVORS)
    allowed = {"fence_after": 3, "fence_before": 1, "commit": 0 if spec.precision == "w4a4" else 1}
    if target == "sm_90a":
        allowed = {"wgmma_wait": 7, "proxy_fence": 1, "bar": 3}
    assert missed <= collections.Counter(allowed)
