"""Pairs of CTAs: what the emulator makes of ``cta_group::2`` and clusters, and kernels of sm_100f that have them."""

import dataclasses
import functools
import importlib.util
import shutil

import cuda_call
import emulated_call
import emulator
from emulator import EmulatorError, Kernel, Launch, Memory, ORDERS
from helpers import assert_bit_equal, make_exact_case
import jax.numpy as jnp
import numpy as np
import pytest
import small_ptx

from jax_moe import activations, shapes
from jax_moe.kernels.sm100 import program, specs
from jax_moe.kernels.sm100.target import SM100

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
needs_dsl = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"
)

# --- The emulator -------------------------------------------------------------------------------------------------

RANK = "mov.u32 %r1, %cluster_ctarank; setp.eq.s32 %p0, %r1, 0; setp.eq.s32 %p1, %r0, 0; mov.b32 %r2, dynamic;"
TOGETHER = "barrier.cluster.arrive; barrier.cluster.wait;\n"
BARRIER = "@%p1 mbarrier.init.shared.b64 [%r2], 1; @%p1 fence.mbarrier_init.release.cluster;\n"
TELL = """
  and.pred %p2, %p0, %p1;
  add.s32 %r3, %r2, 64;
  mapa.shared::cluster.u32 %r4, %r3, 1; mapa.shared::cluster.u32 %r5, %r2, 1;
  @%p2 st.shared::cluster.b32 [%r4], 42;
  @%p2 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r5];
"""
HEAR = """
  @%p0 bra END;
  AGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r2], 0; @!%p3 bra AGAIN;
  ld.shared.b32 %r6, [%r3]; st.global.b32 [%rd0], %r6;
  END:
"""
MESSAGE = RANK + BARRIER + TOGETHER + TELL + HEAR + TOGETHER


def run_pair(body, *, order="random", seed=0, cluster=2):
    memory = Memory()
    out = memory.poisoned((1,), np.uint32, "out")
    launch = Launch(Kernel(small_ptx.text(body), "small"), 2, [out], cluster=cluster, shared_bytes=4096)
    emulator.run([launch], memory, order=order, seed=seed, most_instructions=200_000)
    return out


def fails(message, body, **options):
    with pytest.raises(EmulatorError, match=message):
        run_pair(body, **options)


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
def test_a_word_for_the_other_cta(order):
    for seed in range(4):
        assert run_pair(MESSAGE, order=order, seed=seed).read()[0] == 42
        fails("not ordered", MESSAGE.replace("acquire.cluster", "acquire.cta"), order=order, seed=seed)
        fails("not ordered", MESSAGE.replace("arrive.release.cluster.shared", "arrive.shared"), order=order, seed=seed)
        fails("no mbarrier|not ordered", MESSAGE.replace(TOGETHER, "", 1), order=order, seed=seed)


@needs_compiler
def test_a_cta_that_does_not_stay():
    """Its shared memory is gone, or goes while an arrival is on its way to it."""
    early = RANK + BARRIER + TOGETHER + "@!%p0 exit;\n" + TELL
    fails("CTA 1 of the cluster has ended", early, order="starved")
    late = RANK + BARRIER + TOGETHER + TELL
    run_pair(late + TOGETHER, order="starved")
    relaxed = TOGETHER.replace("arrive", "arrive.relaxed")  # releases nothing: the arrival may still be on its way
    fails(
        "ends, and its shared memory with it, before this is complete.*mbarrier.arrive", late + relaxed, order="starved"
    )


ALLOCATE = "tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r2], {columns};\n"
RELEASE = """
  tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;
  bar.warp.sync -1; ld.shared.b32 %r9, [%r2];
"""
FREE = "tcgen05.dealloc.cta_group::2.sync.aligned.b32 %r9, 64;\n"
ALLOCATED = RANK + ALLOCATE.format(columns=64) + RELEASE


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
def test_columns_of_a_pair(order):
    tell = "mapa.shared::cluster.u32 %r4, %r2, 1; and.pred %p2, %p0, %p1; @%p2 st.shared::cluster.b32 [%r4 + 64], %r9;"
    hear = "@%p0 bra END; ld.shared.b32 %r6, [%r2 + 64]; xor.b32 %r6, %r6, %r9; st.global.b32 [%rd0], %r6; END:"
    for seed in range(4):
        difference = run_pair(ALLOCATED + TOGETHER + tell + TOGETHER + hear + TOGETHER + FREE, order=order, seed=seed)
        assert difference.read()[0] == 0  # the same in both
    fails("columns of tensor memory that it never freed", ALLOCATED + TOGETHER, order=order)
    fails("not the .cta_group", ALLOCATED + TOGETHER + FREE.replace("::2", "::1"), order=order)
    fails("in no pair", ALLOCATED + FREE, order=order, cluster=1)


@needs_compiler
def test_columns_that_one_cta_alone_asks_for_or_frees():
    part = "@!%p0 bra OTHER;\n{one} bra END; OTHER: {other} END:"
    alone = RANK + part.format(one=ALLOCATE.format(columns=64) + TOGETHER, other=TOGETHER)
    fails("deadlock", alone)
    # PTX ISA 9.1, table 48: a dealloc may wait for the other CTA's.
    fails("deadlock", ALLOCATED + part.format(one=TOGETHER + FREE, other=FREE + TOGETHER))
    both = part.format(one=ALLOCATE.format(columns=64), other=ALLOCATE.format(columns=128))
    fails("different numbers of columns", RANK + both)


PRODUCT = """
  mov.b64 %rd1, 0x4000404000010000; shr.u32 %r10, %r2, 4; cvt.u64.u32 %rd2, %r10; or.b64 %rd1, %rd1, %rd2;
  setp.ne.b32 %p3, %r2, %r2; and.pred %p2, %p0, %p1; mov.b32 %r11, {instruction};
  @%p2 tcgen05.mma.cta_group::2.kind::f16 [%r9], %rd1, %rd1, %r11, %p3;
"""


@needs_compiler
def test_products_of_a_pair_have_256_rows_and_sixteens_of_columns():
    def body(rows, columns):
        return ALLOCATED + PRODUCT.format(instruction=0x490 | rows // 16 << 24 | columns // 8 << 17) + TOGETHER + FREE

    fails("multiple of 16, not 24", body(256, 24))
    fails("bits 24 to 28 .M. are 8", body(128, 32))
    fails("ends|outside|not allocated|frees|not ordered", body(256, 32))  # nobody waits for it


# --- The kernels --------------------------------------------------------------------------------------------------

CHOSEN = next(config for config in program.CONFIGS["w4a4"] if config.pair)  # test_sm100_calls.py runs it
NARROW = {  # that no call chooses, but whose tiles are soon full
    "w4a4": specs.with_most_stages("w4a4", 32, 1, pair=True),
    "w4a16": specs.with_most_stages("w4a16", 32, 1, stage_blocks=2, dequantisers=2, pair=True),
}


def exact_case(precision, tokens, hidden, intermediate, **options):
    return make_exact_case(
        tokens, tokens=tokens, precision=precision, hidden=hidden, intermediate=intermediate, num_experts=3, top_k=2,
        out_dtype=jnp.float32, **options,
    )  # fmt: skip


@needs_dsl
@needs_compiler
@pytest.mark.parametrize("precision", NARROW)
def test_exact_calls(precision):
    """Weight blocks that leave half of the last pair idle, one tile and several, on one pair and on two."""
    for tokens, hidden, intermediate in ((9, 144, 96), (70, 320, 160)):
        case = exact_case(precision, tokens, hidden, intermediate)
        expected = case.run()
        for seed, order in enumerate(ORDERS):
            call = emulated_call.prepare(case, "sm_100f", multiprocessors=2 + 2 * (seed % 2), config=NARROW[precision])
            assert_bit_equal(call.run(order=order, seed=seed), expected)


MUTANTS = {
    "waits learn nothing of the other CTA": (".acquire.cluster.", ".acquire.cta."),
    "arrivals tell the other CTA nothing": ("arrive.release.cluster.", "arrive.release.cta."),
    "commits arrive at the leader only": ("mov.b16 both, 3", "mov.b16 both, 1"),
    "no barrier of the cluster": ("barrier.cluster.", "// "),
    "the peer gets no units": ("st.shared::cluster.b32", "// "),
}


@needs_dsl
@needs_compiler
@pytest.mark.parametrize("launch", ["gemm1", "gemm2"])
def test_mutants(launch):
    case = exact_case("w4a4", 5, 320, 640)
    expected = case.run()
    prepare = functools.partial(emulated_call.prepare, case, "sm_100f", multiprocessors=2, config=NARROW["w4a4"])
    spec = next(each.spec for each in prepare().program.launches if each.name == launch)
    text, _ = emulated_call.ptx(spec, "sm_100f")

    def passes(kernel):
        for seed, order in enumerate(ORDERS):
            call = prepare()
            given = {launch: kernel}
            try:
                assert_bit_equal(call.run(kernels=given, order=order, seed=seed, most_instructions=3_000_000), expected)
            except (EmulatorError, AssertionError):
                return False
        return True

    assert passes(Kernel(text))
    survivors = []
    for name, (old, new) in MUTANTS.items():
        changed = text.replace(old, new)
        assert changed != text, name
        if passes(Kernel(changed)):
            survivors.append(name)
    assert not survivors


# --- The program --------------------------------------------------------------------------------------------------


def program_of(tokens, precision, multiprocessors=148):
    layer = shapes.MODELS["qwen3-235b-a22b"]
    call = cuda_call.problem(
        num_tokens=tokens, local_experts=layer.num_experts, top_k=layer.top_k, hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size, activation=activations.SwiGLU(), precision=precision,
        combine="atomic", out_dtype=jnp.dtype(jnp.bfloat16), layout=SM100.layouts[precision],
    )  # fmt: skip
    card = dataclasses.replace(SM100.cards[0], multiprocessors=multiprocessors)
    return {launch.name: launch for launch in program.build(call, card).launches}


def test_pairs_are_for_many_tokens_of_w4a4():
    for tokens in (1, 64, 512):
        assert not program_of(tokens, "w4a4")["gemm1"].spec.config.pair
    for tokens in (2048, 16384):
        launches = program_of(tokens, "w4a4", multiprocessors=147)
        assert launches["gemm1"].spec.config == launches["gemm2"].spec.config == CHOSEN
        assert launches["gemm1"].spec.cluster == 2
        assert launches["gemm1"].grid % 2 == 0
        assert not program_of(tokens, "w4a16")["gemm1"].spec.config.pair


def test_tiles_are_balanced_where_experts_have_several():
    for precision, tokens, granule in (("w4a4", 1, 0), ("w4a4", 8192, 16), ("w4a16", 8192, 16), ("w4a16", 2048, 0)):
        assert program_of(tokens, precision)["sort"].spec.granule == granule


def test_tensor_memory_has_room_for_every_config():
    for precision, configs in program.CONFIGS.items():
        for config in configs:
            scales = 2 * 16 * (1 + -(-config.token_tile // 128))
            columns = 2 * config.token_tile + (scales if precision == "w4a4" else 64)
            assert columns <= 512 // config.ctas_per_sm
            assert config.stages >= 3
