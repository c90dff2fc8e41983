"""What the emulator notices: poison, accesses outside of buffers, deadlocks and accesses that are not ordered."""

import shutil

import emulator
from emulator import EmulatorError, Kernel, Launch, Memory, ORDERS
import numpy as np
import pytest
import small_ptx
from small_ptx import wait

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")

ZEROS = np.zeros(64, np.uint32)
ADDRESS = "mul.wide.u32 %rd10, %r0, 4; add.s64 %rd10, %rd10, %rd0;"  # of a thread's word of the first array


def fails(message, body, *arrays, **options):
    with pytest.raises(EmulatorError, match=message) as raised:
        small_ptx.run(body, *arrays, **options)
    return str(raised.value)


# --- Global memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r1, [%rd0 + 256];", "4 bytes at 256 are outside of array 0, which has 256 bytes"),
        ("ld.global.b32 %r1, [%rd0 + -4];", "4 bytes at -4 are outside of array 0"),
        ("st.global.v4.b32 [%rd0 + 244], {%r0, %r0, %r0, %r0};", "16 bytes at 244 are outside"),
        ("ld.global.b32 %r1, [%rd0 + 2];", "not a multiple of 4"),
        ("mov.b64 %rd1, 0; ld.global.b32 %r1, [%rd1];", "in no buffer .a null pointer"),
        ("ld.shared.b32 %r1, [dynamic + 32768];", "outside of shared memory"),
        ("ld.shared.b32 %r1, [16];", "outside of shared memory"),
    ],
)
def test_accesses_outside(body, message):
    text = fails(message, body, ZEROS)
    assert text.startswith("small: CTA 0, warp 0, line 11: ")


def test_poison_may_be_copied_but_decides_nothing():
    poison = "ld.shared.b32 %r1, [dynamic];"
    (out,) = small_ptx.run(ADDRESS + poison + "add.s32 %r2, %r1, 1; st.global.b32 [%rd10], %r2;", ZEROS)
    assert not out.written[:32].any()
    assert out.written[32:].all()
    with pytest.raises(EmulatorError, match=r"array 0\[0\] of \(64,\) was never written"):
        out.read()
    np.testing.assert_array_equal(out.read(partial=True)[32:], 0)
    fails("the predicate of the instruction is poison", poison + "setp.eq.b32 %p0, %r1, 0; @%p0 bra END; END:", ZEROS)
    fails("an address is poison", poison + "ld.shared.b32 %r2, [%r1];", ZEROS)
    fails("the predicate of the instruction is poison", "@%p3 mov.b32 %r1, 0;", ZEROS)
    fails("the lane of a shuffle is poison", poison + "shfl.sync.idx.b32 %r2, %r0, %r1, 31, -1;", ZEROS)


def test_what_one_side_decides_is_no_poison():
    body = "ld.shared.b32 %r1, [dynamic]; setp.eq.b32 %p0, %r1, 0; setp.gt.u32 %p1, %r0, 99;"
    small_ptx.run(body + "and.pred %p2, %p0, %p1; @%p2 bra END; END:", ZEROS)
    small_ptx.run(body + "not.pred %p1, %p1; or.pred %p2, %p0, %p1; @%p2 bra END; END:", ZEROS)
    fails("is poison", body + "or.pred %p2, %p0, %p1; @%p2 bra END; END:", ZEROS)


def test_strict_buffers_take_no_poison():
    memory = Memory()
    out = memory.poisoned((32,), np.uint32, "out", strict=True)
    kernel = Kernel(small_ptx.text("ld.shared.b32 %r1, [dynamic]; st.global.b32 [%rd0], %r1;"))
    with pytest.raises(EmulatorError, match="stores poison to out at 0"):
        emulator.run([Launch(kernel, 1, [out], shared_bytes=64)], memory)


def test_reading_what_nobody_wrote_names_the_first_element():
    out = Memory().poisoned((2, 3), np.float32, "out")
    with pytest.raises(EmulatorError, match=r"out\[0, 0\] of \(2, 3\) was never written"):
        out.read()


# --- Threads of a CTA ---------------------------------------------------------------------------------------------

EXCHANGE = """
  shl.b32 %r1, %r0, 2; mov.b32 %r2, dynamic; add.s32 %r1, %r1, %r2;
  st.shared.b32 [%r1], %r0;
  {barrier}
  xor.b32 %r3, %r0, 32; shl.b32 %r3, %r3, 2; add.s32 %r3, %r3, %r2;
  ld.shared.b32 %r4, [%r3];
"""


def test_a_barrier_orders_the_threads_of_a_cta():
    body = ADDRESS + EXCHANGE.format(barrier="bar.sync 0;") + "st.global.b32 [%rd10], %r4;"
    for order in ORDERS:
        (out,) = small_ptx.run(body, (64, np.uint32), threads=64, order=order, seed=1)
        np.testing.assert_array_equal(out.read(), np.arange(64) ^ 32)


@pytest.mark.parametrize("order", ORDERS)
def test_a_race_is_found_in_any_order(order):
    text = fails("not ordered", EXCHANGE.format(barrier=""), ZEROS, threads=64, order=order)
    assert "st.shared.b32 [%r1], %r0" in text
    assert "ld.shared.b32 %r4, [%r3]" in text


def test_stores_of_neighbouring_bytes_are_no_race():
    body = "mov.b32 %r2, dynamic; add.s32 %r2, %r2, %r0; st.shared.b8 [%r2], %rs0;"
    small_ptx.run(body, ZEROS, threads=64)
    fails("not ordered", body.replace("%r2, %r2, %r0", "%r2, %r2, 1"), ZEROS, threads=64)


def test_barriers_of_some_warps():
    part = "setp.ge.u32 %p0, %r0, 64; @%p0 bra END;"
    small_ptx.run(part + EXCHANGE.format(barrier="bar.sync 3, 64;") + "END:", ZEROS, threads=96)
    text = fails("deadlock", "setp.ge.u32 %p0, %r0, 64; @%p0 bra END; bar.sync 3, 96; END:", ZEROS, threads=96)
    assert "a barrier where" in text
    assert "line 11: bar.sync 3, 96" in text
    fails("is used for 96 and for 64 threads", "setp.lt.u32 %p0, %r0, 32; @%p0 bar.sync 3, 96; @!%p0 bar.sync 3, 64;",
          ZEROS, threads=96, order="eager")  # fmt: skip


def test_lanes_that_never_meet_are_a_deadlock():
    text = fails("deadlock", "setp.eq.b32 %p0, %r0, 0; @!%p0 bra END; bar.warp.sync -1; END: bar.warp.sync -1;", ZEROS)
    assert "the other lanes of its warp" in text


def test_endless_kernels_end():
    fails("does it end", "AGAIN: bra AGAIN;", ZEROS)


# --- Mbarriers and copies -----------------------------------------------------------------------------------------

ARRIVED = wait("%r21")
BARRIER = """
  mov.b32 %r20, dynamic; add.s32 %r21, %r20, 16384;
  setp.ne.b32 %p0, %r0, 0;
  @%p0 bra READY;
  mbarrier.init.shared.b64 [%r21], 1;
  fence.mbarrier_init.release.cluster;
  READY: bar.sync 0;
"""
EXPECT = "@!%p0 mbarrier.arrive.expect_tx.shared.b64 %rd9, [%r21], {size};"
BULK = "@!%p0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r20], [%rd0], {size}, [%r21];"
READ_BACK = """
  shl.b32 %r5, %r0, 2; add.s32 %r5, %r5, %r20; ld.shared.b32 %r6, [%r5];
  mul.wide.u32 %rd11, %r0, 4; add.s64 %rd11, %rd11, %rd1; st.global.b32 [%rd11], %r6;
"""
VALUES = np.arange(64, dtype=np.uint32)


def bulk(*, expect=256, size=256, waits=ARRIVED):
    return BARRIER + EXPECT.format(size=expect) + BULK.format(size=size) + waits + READ_BACK


@pytest.mark.parametrize("order", ORDERS)
def test_bulk_copies(order):
    for seed in range(4):
        out = small_ptx.run(bulk(), VALUES, (64, np.uint32), threads=64, order=order, seed=seed)[1]
        np.testing.assert_array_equal(out.read(), VALUES)


@pytest.mark.parametrize("order", ORDERS)
def test_a_bulk_copy_that_nobody_waits_for(order):
    fails("not ordered|ends, and its shared", bulk(waits=""), VALUES, (64, np.uint32), threads=64, order=order)


def test_bytes_that_never_come():
    text = fails("deadlock", bulk(expect=272), VALUES, (64, np.uint32), threads=64)
    assert "0 arrivals and 16 bytes to come" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (bulk(size=24, expect=24), "multiples of 16 bytes"),
        (bulk(size=272, expect=272), "outside of array 0"),
        (bulk().replace("[%r20], [%rd0]", "[%r20 + 8], [%rd0]"), "not a multiple of 16"),
        (bulk(waits=wait("%r20")), "no mbarrier at"),
        (BARRIER + "@!%p0 mbarrier.arrive.shared.b64 %rd9, [%r21], 2;", "more arrivals than"),
        (BARRIER + "@!%p0 mbarrier.init.shared.b64 [%r21], 1;", "initialised twice"),
        (BARRIER + "st.shared.b32 [%r21], %r0;", "writes over the mbarrier"),
        (BARRIER + "ld.shared.b32 %r1, [%r21];", "reads an mbarrier"),
        (BARRIER.replace("bar.sync 0;", "") + wait("%r21"), "no mbarrier at|not ordered"),
    ],
)
def test_misuse_of_mbarriers_and_copies(body, message):
    fails(message, body, VALUES, (64, np.uint32), threads=64)


def test_a_parity_waits_for_its_own_phase():
    arrive = "@!%p0 mbarrier.arrive.shared.b64 %rd9, [%r21];"
    small_ptx.run(BARRIER + wait("%r21", 1) + arrive + wait("%r21", 0) + arrive + wait("%r21", 1), VALUES)
    fails("deadlock", BARRIER + arrive + wait("%r21", 1), VALUES)


def test_a_lane_arrives_for_its_warp_after_a_sync_of_the_warp():
    """Warp 0 writes, and one lane of it tells warp 1, which reads."""
    body = (
        BARRIER
        + """
      shl.b32 %r5, %r0, 2; add.s32 %r5, %r5, %r20;
      setp.ge.u32 %p1, %r0, 32; @%p1 bra READS;
      st.shared.b32 [%r5], %r0;
      {sync}
      @!%p0 mbarrier.arrive.shared.b64 _, [%r21];
      bra END;
    READS:
      {wait}
      ld.shared.b32 %r6, [%r5 + -128];
    END:
    """.replace("{wait}", ARRIVED)
    )
    synchronised = body.replace("{sync}", "bar.warp.sync -1;")
    for order in ORDERS:
        small_ptx.run(synchronised, ZEROS, threads=64, order=order)
        small_ptx.run(body.replace("{sync}", ""), ZEROS, threads=64, order=order, lanes=False)
        fails("not ordered", body.replace("{sync}", ""), ZEROS, threads=64, order=order)


GATHER = "mov.b32 %r20, dynamic; shl.b32 %r1, %r0, 4; add.s32 %r1, %r1, %r20; "
GATHER += "mul.wide.u32 %rd5, %r0, 16; add.s64 %rd5, %rd5, %rd0;"
GATHER += "{copy} cp.async.commit_group; {wait} ld.shared.b32 %r6, [%r1]; "
GATHER += "mul.wide.u32 %rd6, %r0, 4; add.s64 %rd6, %rd6, %rd1; st.global.b32 [%rd6], %r6;"
COPY = "cp.async.cg.shared.global [%r1], [%rd5], 16;"


@pytest.mark.parametrize("order", ORDERS)
def test_cp_async(order):
    rows = np.arange(128, dtype=np.uint32)
    out = small_ptx.run(GATHER.format(copy=COPY, wait="cp.async.wait_group 0;"), rows, (32, np.uint32), order=order)[1]
    np.testing.assert_array_equal(out.read(), rows[::4])
    skip = "setp.gt.u32 %p1, %r0, 7; " + COPY.replace("16;", "16, %p1;")
    out = small_ptx.run(GATHER.format(copy=skip, wait="cp.async.wait_all;"), rows[:32], (32, np.uint32), order=order)[1]
    np.testing.assert_array_equal(out.read(), np.where(np.arange(32) < 8, rows[::4], 0))
    for waits in ("", "cp.async.wait_group 1;"):
        message = "not ordered" if order == "eager" else "not ordered|ends, and its shared"
        fails(message, GATHER.format(copy=COPY, wait=waits), rows, (32, np.uint32), order=order)


# --- Grids --------------------------------------------------------------------------------------------------------

FIRST = "griddepcontrol.launch_dependents; " + ADDRESS + "add.s32 %r1, %r0, 7; st.global.b32 [%rd10], %r1;"
SECOND = ADDRESS + "{wait} ld.global.b32 %r1, [%rd10]; add.s64 %rd11, %rd10, %rd1; sub.s64 %rd11, %rd11, %rd0; "
SECOND += "st.global.b32 [%rd11], %r1; {end}"


def two_grids(second, **options):
    memory = Memory()
    middle, out = (memory.poisoned((32,), np.uint32, name) for name in ("middle", "out"))
    first = Launch(Kernel(small_ptx.text(FIRST)), 1, [middle])
    emulator.run([first, Launch(Kernel(small_ptx.text(second, 2)), 1, [middle, out], overlap=True)], memory, **options)
    return out.read()


@pytest.mark.parametrize("order", ORDERS)
def test_a_grid_that_overlaps_waits_for_the_one_in_front(order):
    wait_first = SECOND.format(wait="griddepcontrol.wait;", end="")
    np.testing.assert_array_equal(two_grids(wait_first, order=order, seed=2), np.arange(32) + 7)
    with pytest.raises(EmulatorError, match="without having waited"):
        two_grids(SECOND.format(wait="", end=""), order=order, check=False)
    with pytest.raises(EmulatorError, match="not ordered"):
        two_grids(SECOND.format(wait="", end="griddepcontrol.wait;"), order=order)


def test_seeds_choose_other_orders_and_the_same_seed_the_same():
    """The order in which atomics of several CTAs take their turns."""
    body = (
        "setp.ne.b32 %p0, %r0, 0; @%p0 bra END; atom.relaxed.gpu.global.add.s32 %r1, [%rd0], 1; mov.u32 %r2, %ctaid.x; "
    )
    body += "mul.wide.u32 %rd5, %r2, 4; add.s64 %rd5, %rd5, %rd1; st.global.b32 [%rd5], %r1; END:"

    def ticket(seed):
        return tuple(small_ptx.run(body, np.zeros(1, np.uint32), (8, np.uint32), grid=8, seed=seed)[1].read())

    tickets = [ticket(seed) for seed in range(6)]
    assert all(sorted(each) == list(range(8)) for each in tickets)
    assert len(set(tickets)) > 1
    assert tickets == [ticket(seed) for seed in range(6)]


def test_reductions_of_several_ctas():
    body = ADDRESS + "mov.b32 %r1, 0f3F800000; red.relaxed.gpu.global.add.v2.f32 [%rd0], {%r1, %r1};"
    for order in ORDERS:
        (out,) = small_ptx.run(body, np.zeros(2, np.float32), threads=64, grid=3, order=order)
        np.testing.assert_array_equal(out.read(), [192, 192])
    fails("not ordered", body + "ld.global.b32 %r2, [%rd0];", np.zeros(2, np.float32), threads=64)


def test_what_a_grid_wrote_that_nobody_waited_for_is_read_past_l1():
    """Two grids after the one that writes: the last starts when the middle one has waited."""
    middle = "griddepcontrol.wait; griddepcontrol.launch_dependents;"
    last = SECOND.replace("ld.global", "{load}").format(wait="{wait}", load="{load}", end="griddepcontrol.wait;")

    def run(wait, load):
        memory = Memory()
        written, out = (memory.poisoned((32,), np.uint32, name) for name in ("written", "out"))
        launches = [
            Launch(Kernel(small_ptx.text(FIRST)), 1, [written]),
            Launch(Kernel(small_ptx.text(middle)), 1, [written], overlap=True),
            Launch(Kernel(small_ptx.text(last.format(wait=wait, load=load), 2)), 1, [written, out], overlap=True),
        ]
        emulator.run(launches, memory, order="starved")
        np.testing.assert_array_equal(out.read(), np.arange(32) + 7)

    run("", "ld.relaxed.gpu.global")
    run("griddepcontrol.wait;", "ld.global")
    with pytest.raises(EmulatorError, match="its end was not waited for"):
        run("", "ld.global")


TWO_WARPS = (
    "mov.b32 %r20, dynamic; setp.ne.b32 %p0, %r0, 0; @!%p0 mbarrier.init.shared.b64 [%r20], {count}; bar.sync 0; "
)
TWO_WARPS += "and.b32 %r1, %r0, 31; setp.ne.b32 %p1, %r1, 0; "
ROUND = "@!%p1 mbarrier.arrive.shared.b64 _, [%r20]; " + wait("%r20", 0) + "bar.sync 0; "
ROUNDS = ROUND + ROUND.replace(wait("%r20", 0), wait("%r20", 1))


def test_a_count_is_what_arrives_in_a_phase():
    small_ptx.run(TWO_WARPS.format(count=2) + ROUNDS, ZEROS, threads=64)
    fails("ends in a phase of mbarrier|deadlock", TWO_WARPS.format(count=3) + ROUNDS, ZEROS, threads=64)
    waits = ROUNDS.replace(wait("%r20", 0), "").replace(wait("%r20", 1), "")
    fails("ends in a phase of mbarrier", TWO_WARPS.format(count=3) + waits, ZEROS, threads=64)
    fails("other arrivals than its first", TWO_WARPS.format(count=1) + waits, ZEROS, threads=64)


def test_reads_of_what_nobody_wrote_on_request():
    memory = Memory()
    array = memory.poisoned((32,), np.uint32, "never")
    launch = Launch(Kernel(small_ptx.text(ADDRESS + "ld.global.b32 %r1, [%rd10];")), 1, [array])
    emulator.run([launch], memory)
    with pytest.raises(EmulatorError, match="reads what nobody has written: never at byte 0"):
        emulator.run([launch], memory, written=True)
