"""The main loop of sm_90a's grouped GEMMs: NVFP4 weights from registers, gathered tokens from shared memory.

One main loop serves GEMM1, GEMM2 and the product on its own (a GEMM1 to the table below), in both precisions. A CTA has
one producer warpgroup and several consumer warpgroups. Weights are the M side of ``wgmma``: a consumer turns its share
of a prepared 128 x 64 block (``weight_block.py``) into bf16 A fragments and multiplies them with N tokens that lie
K-major in shared memory. CTAs are persistent and take units (expert, weight tile, token tile) as ``device/schedule.py``
hands them out; of few routes, and in clusters, by their numbers. The producer tells the consumers with a unit's first
stage what the unit is; a stage of no unit, the sentinel, ends their work.

A stage is ``config.stage_blocks`` weight blocks for each m warpgroup and as many blocks of tokens. Who waits for whom:

    barrier                 waits                  arrives, and how often in one phase
    full[stage]  mbarrier   every consumer         GEMM1: a thread (weights with their bytes), 4 producer warps (tokens)
                                                   GEMM2: a thread (weights and tokens, with their bytes)
    empty[stage] mbarrier   GEMM1: all producers   each consumer warp, when the products of the stage are complete
                            GEMM2: one thread      (at first all stages are empty: producers begin with parity 1)
    REDUCTION               k warpgroups > 1: the consumers, twice a unit: sums may be, then are, handed over
    sums         mbarrier   clusters: warpgroup 0 of rank 0; the 4 warps of rank 1's, which have sent their sums of the
                            unit that both share: there is one at most
    the cluster's barrier   clusters: before rank 1 sends, all have begun; before anybody leaves, all are done
    NEXT_UNIT               GEMM1: the producers, once a unit: thread 0 has taken the next one
    EPILOGUE + m warpgroup  GEMM2, and GEMM1 in w4a4_dynamic: one warpgroup: rows, weights and scales of the unit may
                            be, then are, written
    MAP_ROUTES              few routes: those who make the tile map, between its steps

Both kernels are launched with programmatic dependent launch. GEMM1's producer waits for the preceding kernel before it
reads anything which that one wrote. GEMM2 prefetches its first unit's weights before it waits: it can start only after
every CTA of GEMM1 has seen the sort finish and called launch_dependents, so the tile map is complete. PTX, however,
promises visibility only of the grid that is waited for: GEMM2 reads the tile map past L1 (``Gemm.reads_early``). Of few
routes each CTA makes the map for itself (``device/few_routes.py``), from operands, before its warps part into roles.

For a block of 4608 bytes a consumer warp issues about 147 instructions, 70 of them on the integer pipe, which takes
140 clocks where HBM takes 239: dequantisation hides behind memory, but behind the tensor cores only in part
(benchmarks/notes-h200.md has what was measured and tried).

Names: ``op`` holds the kernel's operands, ``shared`` what lies in shared memory, ``me`` this thread's place, ``unit``
one piece of work (work tile); ``slot`` and ``phase`` are the next stage's index and the parity of its barriers.
"""

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
import cutlass.cute as cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from jax_moe.kernels.device import dequantise, entry, few_routes, ptx, schedule
from jax_moe.kernels.device.constants import FEW_ROUTES
from jax_moe.kernels.device.entry import array, named
from jax_moe.kernels.sm90.device import weight_block
from jax_moe.kernels.sm90.device.weight_block import BLOCK_K

WARPGROUP = 128
TOKEN_ROW_BYTES = BLOCK_K * 2
# Named barriers; 0 is sync_threads, and each m warpgroup has an epilogue's.
REDUCTION, MAP_ROUTES, NEXT_UNIT, EPILOGUE = 1, 2, 3, 4
_NO_UNIT = -1

# The products of a block in groups of wgmma: (64-row halves, k16-steps) of each.
_STEPS = tuple(range(BLOCK_K // 16))
_WHOLE_BLOCK = (((0, 1), _STEPS),)
_HALF_BY_HALF = (((0,), _STEPS), ((1,), _STEPS))
_STEP_BY_STEP = tuple(((0, 1), (step,)) for step in _STEPS)

TILE_MAP = ("row_route", "tile_expert", "expert_tiles", "expert_ids", "expert_offset")
"""Operands that say what the tiles are, and are indexed: the sort's map, or what ``few_routes.py`` makes one of."""


class Gemm(entry.Kernel):
    """What GEMM1 and GEMM2 share: the pipeline and the main loop."""

    reads_early = False  # the tile map, before the kernel in front has ended

    @property
    def consumers_wait(self) -> bool:
        """For the kernel in front, of which they read something themselves: scales of rows."""
        return self.is_dynamic

    def __init__(self, spec):
        super().__init__(spec)
        self.read = schedule.reader(self.reads_early)
        self.config = config = spec.config
        self.is_dynamic = spec.precision == "w4a4_dynamic"  # rows of tokens have a scale each
        self.n = config.token_tile
        self.stages = config.stages
        self.blocks = config.stage_blocks
        self.consumers = config.m_warpgroups * config.k_warpgroups
        self.unit_words = 4 * config.cluster  # of a stage: whole vectors, of which compilers may load more than is used
        self.weight_bytes = self.blocks * weight_block.BLOCK_BYTES  # of one m warpgroup in one stage
        self.token_bytes = self.n * TOKEN_ROW_BYTES  # of one block
        self.accumulators = self.n // 8 * 4  # fp32 registers of one 64-row half
        # Two blocks of A registers are 64; where they do not fit beside the accumulators (and about 60 others) the
        # compiler would serialise wgmma (ptxas C7512), and the two halves of one block take turns instead, with 32.
        # Beside three widths of more than 112 rows there is room for 16: then two of a block's k16-steps take turns.
        if 2 * self.accumulators + 64 + 60 <= self._registers()[1]:
            self.groups, self.fragment_sets = _WHOLE_BLOCK, 2
        else:
            self.groups, self.fragment_sets = (_STEP_BY_STEP if self.n > 112 else _HALF_BY_HALF), 1

    def _registers(self):
        """(producer, consumer) registers a thread after the split."""
        launched = 65536 // (self.config.ctas_per_sm * self.spec.threads) // 8 * 8
        producer = 56 if self.n > 96 else 40
        # What the producers give back is all there is to hand out: asking for more would wait for ever.
        consumer = min(240, (launched + (launched - producer) // self.consumers) // 8 * 8)
        return producer, consumer

    # -- set-up -------------------------------------------------------------------------------------------------

    def _tiled_mma(self, width):
        operation = warpgroup.MmaF16BF16Op(
            BFloat16, Float32, (64, width, 16), warpgroup.OperandSource.RMEM, OperandMajorMode.K, OperandMajorMode.K
        )
        mma = cute.make_tiled_mma(operation)
        mma.set(warpgroup.Field.ACCUMULATE, True)  # sums start as zeros, so that one loop body serves all steps
        return mma

    def _token_layout(self):
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        return cute.tile_to_shape(atom, (self.n, BLOCK_K, self.stages * self.blocks), order=(0, 1, 2))

    # -- consumer -----------------------------------------------------------------------------------------------

    def _dequantise(self, words, fragment, half, steps, scales):
        """Fills ``steps`` of ``fragment`` (u32[4 registers, 4 steps]) with those of one 64-row half of a block."""
        for step in steps:
            pairs = dequantise.pairs(words[step], scales[2 * half][step], scales[2 * half + 1][step])
            for i, pair in enumerate(pairs):
                fragment[i, step] = pair

    def _multiply(self, mma, accumulators, fragments, tokens, shared, me, slot, block, first_group_done):
        """Dequantises one block of a stage and issues its products, in one or several ``wgmma`` groups.

        Each group waits for the one before it. ``first_group_done`` is called when all products of earlier blocks are
        complete.
        """
        place = (
            slot * self.config.m_warpgroups + me.m_warpgroup
        ) * self.weight_bytes + block * weight_block.BLOCK_BYTES
        address = Int32(shared.weights.toint()) + place
        scale_words = ptx.load_shared_v4(address + weight_block.CODE_BYTES + me.tid // 4 * 16)
        scales = [dequantise.scales(word) for word in scale_words]  # of a thread's rows: 4 rows by 4 steps
        codes = [ptx.load_shared_v4(address + half * (weight_block.CODE_BYTES // 2) + me.tid * 16) for half in range(2)]
        for group in self.groups:
            halves, steps = group
            for half in halves:
                registers = cute.recast_tensor(fragments[half], Uint32)
                registers = cute.make_tensor(registers.iterator, cute.make_layout((4, 4)))
                self._dequantise(codes[half], registers, half, steps, scales)
            warpgroup.fence()
            for step in steps:
                token_step = tokens[None, None, step, slot * self.blocks + block]
                for half in halves:
                    sums = accumulators[half]
                    cute.gemm(mma, sums, fragments[half][None, None, step], token_step, sums)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if group is self.groups[0]:
                first_group_done()

    @cute.jit
    def _release(self, shared, me, slot):
        """Lane 0 hands a stage back for all lanes, which have read codes and scales of it themselves."""
        cute.arch.sync_warp()
        if slot >= 0 and me.tid % 32 == 0:
            cute.arch.mbarrier_arrive(shared.barriers + self.stages + slot)

    @cute.jit
    def _next(self, slot, phase):
        slot = slot + 1
        if slot == self.stages:
            slot = Int32(0)
            phase = phase ^ 1
        return slot, phase

    @cute.jit
    def _stage(
        self, mma, accumulators, fragment_sets, tokens, shared, me, slot, phase, previous, parity: cutlass.Constexpr
    ):
        """Multiplies a whole stage, and leaves its last products in flight.

        The stage before it (``previous``, or -1) is released as soon as the tensor cores are done with it.
        """
        cute.arch.mbarrier_wait(shared.barriers + slot, phase)
        for i in cutlass.range_constexpr(self.blocks // self.config.k_warpgroups):
            self._multiply(
                mma, accumulators, fragment_sets[(parity + i) % len(fragment_sets)], tokens, shared, me, slot,
                me.k_warpgroup + i * self.config.k_warpgroups,
                (lambda: self._release(shared, me, previous)) if i == 0 else (lambda: None),
            )  # fmt: skip
        return self._next(slot, phase)

    @cute.jit
    def _main_loop(self, mma, accumulators, fragment_sets, tokens, shared, me, slot, phase, k_blocks):
        """Sums this warpgroup's blocks of one unit; returns the slot and phase of the next unit's first stage."""
        for half in cutlass.range_constexpr(2):
            accumulators[half].fill(0.0)
        full = k_blocks // self.blocks
        per_stage = self.blocks // self.config.k_warpgroups
        # One set of A registers is filled while wgmma reads another: a loop body must take a multiple of their number.
        stages_per_body = 2 if per_stage % len(fragment_sets) else 1
        previous = Int32(-1)
        for _ in cutlass.range(full // stages_per_body, unroll=1):
            for i in cutlass.range_constexpr(stages_per_body):
                current = slot
                slot, phase = self._stage(
                    mma, accumulators, fragment_sets, tokens, shared, me, slot, phase, previous, i
                )
                previous = current
        if full % stages_per_body == 1:
            current = slot
            slot, phase = self._stage(mma, accumulators, fragment_sets, tokens, shared, me, slot, phase, previous, 0)
            previous = current
        warpgroup.wait_group(0)
        self._release(shared, me, previous)
        rest = k_blocks - full * self.blocks
        if cutlass.const_expr(self.blocks > 1):
            slot, phase = self._last_stage(mma, accumulators, fragment_sets[0], tokens, shared, me, slot, phase, rest)
        return slot, phase

    @cute.jit
    def _last_stage(self, mma, accumulators, fragments, tokens, shared, me, slot, phase, rest):
        """A stage of only ``rest`` blocks, if that is not 0; nothing stays in flight."""
        if rest > 0:
            cute.arch.mbarrier_wait(shared.barriers + slot, phase)
            for i in cutlass.range_constexpr(self.blocks // self.config.k_warpgroups):
                block = me.k_warpgroup + i * self.config.k_warpgroups
                if block < rest:
                    self._multiply(mma, accumulators, fragments, tokens, shared, me, slot, block, lambda: None)
                    warpgroup.wait_group(0)
            self._release(shared, me, slot)
            slot, phase = self._next(slot, phase)
        return slot, phase

    @cute.jit
    def _add_up(self, accumulators, shared, me):
        """Adds the sums of all k warpgroups into those of warpgroup 0, which alone goes on to the epilogue."""
        registers = 2 * self.accumulators
        everyone = self.consumers * WARPGROUP
        # Both sides wait at both barriers: of one that only arrives, compute-sanitizer sees no order.
        cute.arch.barrier(barrier_id=REDUCTION, number_of_threads=everyone)  # the unit before this one is added up
        if me.k_warpgroup > 0:
            for half in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(self.accumulators):
                    index = ((me.k_warpgroup - 1) * registers + half * self.accumulators + i) * WARPGROUP + me.tid
                    shared.scratch[index] = accumulators[half][i]
        cute.arch.barrier(barrier_id=REDUCTION, number_of_threads=everyone)
        if me.k_warpgroup == 0:
            for other in cutlass.range_constexpr(self.config.k_warpgroups - 1):
                for half in cutlass.range_constexpr(2):
                    for i in cutlass.range_constexpr(self.accumulators):
                        index = (other * registers + half * self.accumulators + i) * WARPGROUP + me.tid
                        accumulators[half][i] = accumulators[half][i] + shared.scratch[index]

    @cute.jit
    def _add_up_cluster(self, accumulators, shared, me):
        """Adds the sums of rank 1 into those of rank 0; of both only warpgroup 0, which has its CTA's sums."""
        first = (self.config.k_warpgroups - 1) * 2 * self.accumulators  # what ``_add_up`` has comes before
        barrier = Int32((shared.barriers + 2 * self.stages).toint())
        if self._rank() == 0:
            done = ptx.try_wait_cluster(barrier, Int32(0))
            while done == 0:
                done = ptx.try_wait_cluster(barrier, Int32(0))
            for half in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(self.accumulators):
                    index = (first + half * self.accumulators + i) * WARPGROUP + me.tid
                    accumulators[half][i] = accumulators[half][i] + shared.scratch[index]
        else:
            place = ptx.in_cta(Int32(shared.scratch.iterator.toint()), 0)
            for half in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(self.accumulators):
                    index = (first + half * self.accumulators + i) * WARPGROUP + me.tid
                    ptx.store_cluster(place + index * 4, Int32(ptx.bits(accumulators[half][i])))
            cute.arch.sync_warp()
            if me.tid % 32 == 0:
                ptx.arrive_cluster(ptx.in_cta(barrier, 0))

    def _rank(self):
        """Of this CTA in its cluster. Not made warp-uniform by a shuffle: one thread of a warp asks, too."""
        return cute.arch.block_idx_in_cluster()

    # -- producer -----------------------------------------------------------------------------------------------

    @cute.jit
    def _copy_weights(self, op, shared, slot, unit, k_block, count, extra):
        """One thread: announces a stage's bytes, ``extra`` of each block somebody else's, and copies its weights.

        The stage is ``count`` blocks, which are neighbours in memory, for each m warpgroup.
        """
        full = Int32((shared.barriers + slot).toint())
        block_bytes = self.config.m_warpgroups * weight_block.BLOCK_BYTES + extra
        cute.arch.mbarrier_arrive_and_expect_tx(shared.barriers + slot, count * block_bytes)
        for i in cutlass.range_constexpr(self.config.m_warpgroups):
            row_block = unit.m_tile * self.config.m_warpgroups + i
            if row_block >= op.m_blocks:  # the last tile may have blocks to spare; their sums are never stored
                row_block = op.m_blocks - 1
            block = (Int64(unit.expert) * op.m_blocks + row_block) * op.k_blocks + k_block
            target = Int32(shared.weights.toint()) + (slot * self.config.m_warpgroups + i) * self.weight_bytes
            source = op.payload.toint() + block * weight_block.BLOCK_BYTES
            ptx.bulk_copy(target, source, count * weight_block.BLOCK_BYTES, full)

    @cute.jit
    def _width(self, op, unit):
        """The least of the widths that holds the rows of the unit's tile."""
        width = Int32(self.config.widths[0])
        for i in cutlass.range_constexpr(len(self.config.widths) - 1):
            if self._route(op, unit.token_tile, self.config.widths[i]) >= 0:  # padding rows come last
                width = Int32(self.config.widths[i + 1])
        return width

    def _tell(self, shared, slot, values):
        """What the unit is that begins with a stage; before the arrival at the stage's barrier."""
        for i, value in enumerate(values[: self.unit_words]):
            shared.units[slot * self.unit_words + i] = Int32(value)

    @cute.jit
    def _finish(self, shared, slot, phase, tid):
        """Announces the sentinel, a stage of no unit."""
        cute.arch.mbarrier_wait(shared.barriers + self.stages + slot, phase)
        if tid == 0:
            self._tell(shared, slot, (_NO_UNIT, 0, 0, 0, 0))
            cute.arch.mbarrier_arrive(shared.barriers + slot)

    def _num_units(self, op):
        if self.spec.maps_routes:
            return op.tiles.num_tiles[0] * op.m_tiles
        return self.read(op.expert_tiles, op.local_experts) * op.m_tiles

    def _route(self, op, token_tile, row):
        """Route of a row of a tile, -1 for padding."""
        if self.spec.maps_routes:
            return few_routes.route(op.tiles, token_tile, row)
        return self.read(op.row_route, token_tile * self.n + row)

    def _first_unit(self):
        """The unit that this CTA begins with, or its cluster."""
        index, _, _ = cute.arch.block_idx()
        return index // self.config.cluster if self.config.cluster > 1 else index

    def _part(self, op):
        """``(first, end)`` of the blocks of the contraction that this CTA takes of each unit."""
        return 0, op.k_blocks

    def _half(self, op):
        """The same of a unit that the cluster shares."""
        rank = self._rank()
        return rank * op.k_blocks // 2, (rank + 1) * op.k_blocks // 2

    @cute.jit
    def _piece(self, op, index, units, ctas):
        """``(unit, (first, end), is_shared)``: what this CTA does where its cluster is at unit ``index``.

        A cluster has every n-th unit: two at once, one for each of its CTAs. The last of an odd number is shared.
        """
        if cutlass.const_expr(self.config.cluster == 1):
            return self._unit(op, index), self._part(op), Int32(0)
        stride, rank = ctas // 2, self._rank()
        is_shared = Int32(1)
        first, end = self._half(op)
        if index + stride < units:
            index = index + rank * stride
            is_shared = Int32(0)
            first = Int32(0)
            end = op.k_blocks
        return self._unit(op, index), (first, end), is_shared

    def _take(self, op, index, gemm, ctas):
        """The unit of GEMM1 (``gemm`` 0) or GEMM2 (1) that this CTA, or its cluster, does after unit ``index``."""
        if self.spec.maps_routes or self.config.cluster > 1:
            return index + ctas  # units are few and alike, and both CTAs of a cluster must know it
        return schedule.take(op.expert_tiles, op.local_experts, gemm, ctas)

    # -- the kernel ---------------------------------------------------------------------------------------------

    def launch_options(self):
        return {"min_blocks_per_mp": self.config.ctas_per_sm, "preferred_smem_carveout": 100}

    @cute.kernel
    def kernel(self, given):
        self._run(self._operands(given))

    def _operands(self, given):
        """``given``, with what is indexed by element as arrays."""
        return named(
            **{name: array(value) if name in self.arrays else value for name, value in given._asdict().items()}
        )

    @cute.jit
    def _run(self, op):
        tid, _, _ = cute.arch.thread_idx()
        warpgroup_index = cute.arch.make_warp_uniform(tid // WARPGROUP)
        tid = tid % WARPGROUP
        maps_routes = self.spec.maps_routes

        smem = cutlass.memory.SmemAllocator()
        token_layout = self._token_layout()
        shared = named(
            tokens=smem.allocate_tensor(BFloat16, token_layout.outer, byte_alignment=1024, swizzle=token_layout.inner),
            weights=smem.allocate_array(Uint8, self.stages * self.config.m_warpgroups * self.weight_bytes),
            # A stage is full, then a stage is empty; of a cluster, the sums of the other CTA are there.
            barriers=smem.allocate_array(Int64, 2 * self.stages + self.config.cluster - 1),
            scratch=self._array(smem, Float32, self.config.reduction_bytes // 4),
            rows=self._allocate_rows(smem),
            units=self._array(
                smem, Int32, self.unit_words * self.stages
            ),  # of a stage: expert, m tile, token tile, width
            next_unit=self._array(smem, Int32, 2),
        )
        tiles = few_routes.allocate(smem) if maps_routes else None
        if warpgroup_index == int(maps_routes) and tid == 0:  # the producers are busy with the map
            for i in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(shared.barriers + i, self._full_arrivals())
                cute.arch.mbarrier_init(shared.barriers + self.stages + i, 4 * self.consumers)
            if cutlass.const_expr(self.config.cluster > 1):
                cute.arch.mbarrier_init(shared.barriers + 2 * self.stages, 4)
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(maps_routes):
            if warpgroup_index == 0 and tid < FEW_ROUTES:
                few_routes.make(op, tiles, self.n, MAP_ROUTES, tid)
        if cutlass.const_expr(self.config.cluster > 1):
            self._meet()
        else:
            cute.arch.sync_threads()

        m_tiles = (op.m_blocks + self.config.m_warpgroups - 1) // self.config.m_warpgroups
        op = named(m_tiles=m_tiles, tiles=tiles, **op._asdict())
        producer_registers, consumer_registers = self._registers()
        if warpgroup_index == 0:
            cute.arch.setmaxregister_decrease(producer_registers)
            self._produce(op, shared, tid)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            self._consume(op, shared, tid, warpgroup_index - 1)
        if cutlass.const_expr(self.config.cluster > 1):
            # Rank 0 has waited for the sums, but only here can compute-sanitizer see that it is still there when they
            # come. Nobody reads anything behind it: the arrival need not release.
            self._meet(cute.arch.cluster_arrive_relaxed)

    def _meet(self, arrive=cute.arch.cluster_arrive):
        """Waits for all threads of the cluster and, if ``arrive`` releases it, for what they have written."""
        cute.arch.sync_warp()
        arrive()
        cute.arch.cluster_wait()

    def _array(self, smem, dtype, size):
        return cute.make_tensor(smem.allocate_array(dtype, size), cute.make_layout(size)) if size else None

    def _unit(self, op, index):
        if self.spec.maps_routes:
            expert, m_tile, token_tile = few_routes.locate(index, op.m_tiles, op.tiles)
        else:
            expert, m_tile, token_tile = schedule.locate(index, op.m_tiles, op.tile_expert, op.expert_tiles, self.read)
        return named(expert=expert, m_tile=m_tile, token_tile=token_tile)

    @cute.jit
    def _receive(self, shared, slot, phase):
        """Expert, m tile, token tile and width of the unit that begins with this stage, and whether it is shared."""
        cute.arch.mbarrier_wait(shared.barriers + slot, phase)
        words = [shared.units[slot * self.unit_words + i] for i in range(4)]
        is_shared = Int32(0) if self.config.cluster == 1 else shared.units[slot * self.unit_words + 4]
        return (*words, is_shared)

    @cute.jit
    def _consume(self, op, shared, tid, consumer):
        if cutlass.const_expr(self.consumers_wait):
            cute.arch.griddepcontrol_wait()  # what another thread has waited for need not be visible to them
        me = named(tid=tid, m_warpgroup=consumer, k_warpgroup=Int32(0))
        if cutlass.const_expr(self.config.k_warpgroups > 1):
            me = named(tid=tid, m_warpgroup=Int32(0), k_warpgroup=consumer)
        slot, phase = Int32(0), Int32(0)
        expert, m_tile, token_tile, width, is_shared = self._receive(shared, slot, phase)
        while expert != _NO_UNIT:
            unit = named(expert=expert, m_tile=m_tile, token_tile=token_tile)
            prefetched = self._prefetch_epilogue(op, unit, tid)
            for w in self.config.widths:
                if width == w:
                    slot, phase = self._compute(op, shared, me, unit, is_shared, prefetched, slot, phase, w)
            expert, m_tile, token_tile, width, is_shared = self._receive(shared, slot, phase)

    @cute.jit
    def _compute(self, op, shared, me, unit, is_shared, prefetched, slot, phase, width: cutlass.Constexpr):
        """One 128-row block of weights times the first ``width`` rows of a token tile, for this warpgroup."""
        mma = self._tiled_mma(width)
        thread_mma = mma.get_slice(me.tid)
        used = cute.local_tile(shared.tokens, (width, BLOCK_K), (0, 0, None))
        tokens = mma.make_fragment_B(thread_mma.partition_B(used))
        accumulators = [mma.make_fragment_C(thread_mma.partition_shape_C((64, width))) for _ in range(2)]
        a_shape = thread_mma.partition_shape_A((64, BLOCK_K))
        fragment_sets = [[mma.make_fragment_A(a_shape) for _ in range(2)] for _ in range(self.fragment_sets)]
        first, end = self._part(op)
        if cutlass.const_expr(self.config.cluster > 1):
            first, end = Int32(0), op.k_blocks
            if is_shared != 0:
                first, end = self._half(op)
        slot, phase = self._main_loop(mma, accumulators, fragment_sets, tokens, shared, me, slot, phase, end - first)
        if cutlass.const_expr(self.config.k_warpgroups > 1):
            self._add_up(accumulators, shared, me)
        if me.k_warpgroup == 0:
            if cutlass.const_expr(self.config.cluster > 1):
                if is_shared != 0:
                    self._add_up_cluster(accumulators, shared, me)
                if is_shared * self._rank() == 0:
                    self._epilogue(op, shared, me, unit, prefetched, accumulators, width)
            else:
                self._epilogue(op, shared, me, unit, prefetched, accumulators, width)
        return slot, phase
