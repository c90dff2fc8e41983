"""Small kernels written by hand, which keep all rules: what the lint is tried on where there is no compiler."""

_FRAME = """
.version 8.8
.target {target}
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry snippet( .param .u64 source, .param .u32 count )
.reqntid {threads}, 1, 1
{{
 .reg .pred %p<30>;
 .reg .b32 %r<90>;
 .reg .b64 %rd<30>;
 mov.u32 %r1, %tid.x;
 shr.u32 %r2, %r1, 5;
 and.b32 %r3, %r1, 31;
 mov.b32 %r4, memory;
 ld.param.b64 %rd1, [source];
 ld.param.b32 %r5, [count];
{body}
}}
"""


def wait(address: str, parity: str) -> str:
    """The loop that CuTe DSL makes of a wait at an mbarrier."""
    return (
        f"{{\n .reg .pred P1;\nLAB_WAIT:\n mbarrier.try_wait.parity.shared.b64 P1, [{address}], {parity}, 10000000;\n"
        " @P1 bra.uni DONE;\n bra.uni LAB_WAIT;\nDONE:\n}"
    )


def kernel(body: str, target: str = "sm_100f", threads: int = 192) -> str:
    """PTX; registers 1 to 5 are the thread, its warp, its lane, shared memory and the kernel's second parameter."""
    return _FRAME.format(target=target, threads=threads, body=body)


# Barriers: 40960 full, 40968 empty, 40976 sums full, 40984 sums empty. Warps 0-3 store sums, 4 multiplies, 5 gathers.
TENSOR_MEMORY = kernel(f"""
 setp.ne.s32 %p1, %r1, 0;
 @%p1 bra INITIALISED;
 mov.b32 %r6, 1;
 mov.b32 %r7, 4;
 mbarrier.init.shared.b64 [%r4+40960], %r6;
 mbarrier.init.shared.b64 [%r4+40968], %r6;
 mbarrier.init.shared.b64 [%r4+40976], %r6;
 mbarrier.init.shared.b64 [%r4+40984], %r7;
 fence.mbarrier_init.release.cluster;
INITIALISED:
 setp.ne.s32 %p2, %r2, 4;
 @%p2 bra ALLOCATED;
 mov.b32 %r8, 64;
 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4+40992], %r8;
 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
ALLOCATED:
 tcgen05.fence::before_thread_sync;
 bar.sync 0;
 tcgen05.fence::after_thread_sync;
 ld.shared.b32 %r9, [%r4+40992];
 setp.lt.s32 %p3, %r2, 4;
 @%p3 bra SUMS;
 setp.eq.s32 %p4, %r2, 4;
 @%p4 bra PRODUCTS;
 griddepcontrol.wait;
 griddepcontrol.launch_dependents;
 mov.b32 %r10, 0;
GATHER:
{wait("%r4+40968", "1")}
 cp.async.cg.shared.global [%r4], [%rd1], 16;
 cp.async.commit_group;
 cp.async.wait_group 0;
 fence.proxy.async.shared::cta;
 bar.warp.sync -1;
 setp.ne.s32 %p5, %r3, 0;
 @%p5 bra GATHERED;
 mbarrier.arrive.shared.b64 %rd3, [%r4+40960], %r6;
GATHERED:
 add.s32 %r10, %r10, 1;
 setp.lt.s32 %p6, %r10, %r5;
 @%p6 bra GATHER;
 bra.uni FINISH;
PRODUCTS:
 elect.sync %r11|%p7, -1;
 not.pred %p8, %p7;
 @%p8 bra FINISH;
{wait("%r4+40984", "1")}
 tcgen05.fence::after_thread_sync;
 mov.b32 %r12, 0;
MULTIPLY:
{wait("%r4+40960", "0")}
 tcgen05.fence::after_thread_sync;
 add.s32 %r13, %r9, 32;
 tcgen05.cp.cta_group::1.32x128b.warpx4 [%r13], %rd4;
 {{ .reg .pred p; setp.ne.b32 p, %r12, 0;
 tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [%r9], %rd5, %rd6, %r14, [%r13], [%r13], p; }}
 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4+40968];
 add.s32 %r12, %r12, 1;
 setp.lt.s32 %p9, %r12, %r5;
 @%p9 bra MULTIPLY;
 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4+40976];
 bra.uni FINISH;
SUMS:
{wait("%r4+40976", "0")}
 tcgen05.fence::after_thread_sync;
 tcgen05.ld.sync.aligned.16x256b.x1.b32 {{%r20, %r21, %r22, %r23}}, [%r9];
 st.global.b32 [%rd1], %r20;
 tcgen05.wait::ld.sync.aligned;
 tcgen05.fence::before_thread_sync;
 bar.warp.sync -1;
 setp.ne.s32 %p10, %r3, 0;
 @%p10 bra FINISH;
 mbarrier.arrive.shared.b64 %rd7, [%r4+40984], %r6;
FINISH:
 tcgen05.fence::before_thread_sync;
 bar.sync 0;
 tcgen05.fence::after_thread_sync;
 @%p2 bra END;
 mov.b32 %r30, 64;
 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r9, %r30;
END:
 ret;
""")
"""A whole little kernel with tensor memory: three roles, one stage."""

STORES = kernel(f"""
 setp.ne.s32 %p1, %r2, 0;
 @%p1 bra ALLOCATED;
 mov.b32 %r8, 64;
 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4+40992], %r8;
 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
 setp.ne.s32 %p2, %r1, 0;
 @%p2 bra ALLOCATED;
 mov.b32 %r6, 1;
 mbarrier.init.shared.b64 [%r4+40960], %r6;
 fence.mbarrier_init.release.cluster;
ALLOCATED:
 tcgen05.fence::before_thread_sync;
 bar.sync 0;
 tcgen05.fence::after_thread_sync;
 shl.b32 %r10, %r1, 4;
 add.s32 %r11, %r4, %r10;
 st.shared.b32 [%r11], %r1;
 fence.proxy.async.shared::cta;
 st.shared.b32 [%r11+41000], %r1;
 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r9], {{%r12}};
 tcgen05.wait::st.sync.aligned;
 tcgen05.fence::before_thread_sync;
 bar.sync 0;
 setp.ne.s32 %p3, %r1, 0;
 @%p3 bra DONE;
 tcgen05.fence::after_thread_sync;
 {{ .reg .pred p; setp.ne.b32 p, %r1, 0; tcgen05.mma.cta_group::1.kind::f16 [%r9], [%r9], %rd5, %r14, p; }}
 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4+40960];
DONE:
{wait("%r4+40960", "0")}
 tcgen05.fence::before_thread_sync;
 bar.sync 0;
 tcgen05.fence::after_thread_sync;
 @%p1 bra END;
 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r9, %r8;
END:
 ret;
""")
"""Operands stored to shared memory and to tensor memory by all threads; what is stored behind the barrier is none."""

WGMMA = kernel(
    f"""
 setp.ne.s32 %p1, %r1, 0;
 @%p1 bra READY;
 mov.b32 %r6, 4;
 mbarrier.init.shared.b64 [%r4+40960], %r6;
 mbarrier.init.shared.b64 [%r4+40968], %r6;
 fence.mbarrier_init.release.cluster;
READY:
 bar.sync 0;
 setp.lt.s32 %p2, %r2, 4;
 @%p2 bra MULTIPLY;
 griddepcontrol.wait;
 mov.b32 %r10, 0;
 mov.b32 %r11, 0;
GATHER:
{wait("%r4+40968", "1")}
 cp.async.cg.shared.global [%r4], [%rd1], 16;
 cp.async.commit_group;
 add.s32 %r11, %r11, 1;
 setp.lt.s32 %p3, %r11, 2;
 @%p3 bra GATHERED;
 cp.async.wait_group 1;
 fence.proxy.async.shared::cta;
 bar.warp.sync -1;
 sub.s32 %r11, %r11, 1;
 setp.ne.s32 %p4, %r3, 0;
 @%p4 bra GATHERED;
 mbarrier.arrive.shared.b64 %rd3, [%r4+40960], 1;
GATHERED:
 add.s32 %r10, %r10, 1;
 setp.lt.s32 %p5, %r10, %r5;
 @%p5 bra GATHER;
 cp.async.wait_group 0;
 setp.lt.s32 %p6, %r11, 1;
 @%p6 bra END;
 fence.proxy.async.shared::cta;
 bar.warp.sync -1;
 setp.ne.s32 %p7, %r3, 0;
 @%p7 bra END;
 mbarrier.arrive.shared.b64 %rd4, [%r4+40960], 1;
 bra.uni END;
MULTIPLY:
 mov.b32 %r12, 0;
 mov.b32 %r20, 0;
PRODUCT:
{wait("%r4+40960", "0")}
 mov.b32 %r21, %r12;
 wgmma.fence.sync.aligned;
 wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r20}}, {{%r21}}, %rd5, 1, 1, 1, 0;
 wgmma.commit_group.sync.aligned;
 wgmma.wait_group.sync.aligned 0;
 setp.ne.s32 %p8, %r3, 0;
 @%p8 bra RELEASED;
 mbarrier.arrive.shared.b64 %rd6, [%r4+40968], 1;
RELEASED:
 add.s32 %r12, %r12, 1;
 setp.lt.s32 %p9, %r12, %r5;
 @%p9 bra PRODUCT;
 st.global.b32 [%rd1], %r20;
END:
 ret;
""",
    target="sm_90a",
    threads=256,
)
"""The same for sm_90a: four warps gather, with one group of copies in flight, and four multiply."""
