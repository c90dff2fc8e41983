"""The two grouped GEMMs of sm_90a: NVFP4 weights from registers, gathered tokens from shared memory.

One main loop serves both GEMMs and both precisions. A thread block has one producer warpgroup and several
consumer warpgroups. Weights are the M side of ``wgmma``: a consumer turns its share of a prepared 128 x 64 block
(``layout.py``) into bf16 A fragments and multiplies them with N tokens that lie K-major in shared memory. Blocks are
persistent and take units (expert, weight tile, token tile) as ``common/schedule.py`` hands them out. The producer
tells the consumers with a unit's first stage what the unit is; a stage of no unit, the sentinel, ends their work.

Both kernels are launched with programmatic dependent launch. GEMM1's producer waits for the preceding kernel before it
reads anything which that one wrote. GEMM2 prefetches its first unit's weights before it waits: it can start only after
every block of GEMM1 has seen the sort finish and called launch_dependents, so the tile map is complete. PTX, however,
promises visibility only of the grid that is waited for.

For a block of 4608 bytes a consumer warp issues about 147 instructions, 70 of them on the integer pipe, which takes
140 clocks where HBM takes 239: dequantisation hides behind memory, but behind the tensor cores only in part
(benchmarks/notes-h200.md has what was measured and tried).

Names: ``op`` holds the kernel's operands, ``shared`` what lies in shared memory, ``me`` this thread's place, ``unit``
one piece of work (work tile); ``slot`` and ``phase`` are the next stage's index and the parity of its barriers.
"""

import collections

import cuda.bindings.driver as cuda
import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32
import cutlass.cute as cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from jax_moe.kernels.common import epilogue, plan as common_plan, ptx, schedule
from jax_moe.kernels.common.memory import array, pointer
from jax_moe.kernels.sm90 import layout, plan

_WARPGROUP = 128
_BLOCK_K = layout.BLOCK_K
_TOKEN_ROW_BYTES = _BLOCK_K * 2
_CHUNK_BYTES = 16
_CHUNKS = _TOKEN_ROW_BYTES // _CHUNK_BYTES
_ROWS_PER_PASS = _WARPGROUP // _CHUNKS
# Named barriers; 0 is sync_threads, and each m warpgroup has an epilogue's.
_REDUCTION_FULL, _REDUCTION_EMPTY, _NEXT_UNIT, _EPILOGUE = 1, 2, 3, 4
_NO_UNIT = -1


def _values(**values):
    """Named values; a tuple, because the DSL would rebind a mutable object's attributes at the end of every branch."""
    return collections.namedtuple("_Values", values)(**values)


class _Gemm:
    """What GEMM1 and GEMM2 share: the pipeline and the main loop."""

    def __init__(self, tile: plan.Tile):
        self.tile = tile
        self.n = tile.token_tile
        self.stages = tile.stages
        self.blocks = tile.stage_blocks
        self.consumers = tile.m_warpgroups * tile.k_warpgroups
        self.threads = tile.threads
        self.weight_bytes = self.blocks * layout.BLOCK_BYTES  # of one m warpgroup in one stage
        self.token_bytes = self.n * _TOKEN_ROW_BYTES  # of one block
        self.accumulators = self.n // 8 * 4  # fp32 registers of one 64-row half
        # Two blocks of A registers are 64; where they do not fit beside the accumulators (and about 60 others) the
        # compiler would serialise wgmma (ptxas C7512), and the two halves of one block take turns instead.
        self.group_per_half = 2 * self.accumulators + 64 + 60 > self._registers()[1]

    def _registers(self):
        """(producer, consumer) registers a thread after the split."""
        launched = 65536 // (self.tile.ctas_per_sm * self.threads) // 8 * 8
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
        return cute.tile_to_shape(atom, (self.n, _BLOCK_K, self.stages * self.blocks), order=(0, 1, 2))

    # -- consumer -----------------------------------------------------------------------------------------------

    def _dequantise(self, words, fragment, half, scales):
        """Fills ``fragment`` (u32[4 registers, 4 steps]) with one 64-row half of a block."""
        for step in range(4):
            word = words[step]
            lower, upper = scales[2 * half][step], scales[2 * half + 1][step]
            mask = Uint32(layout.PAIR_MASK)
            fragment[0, step] = ptx.multiply_bf16x2(word & mask, lower)
            fragment[1, step] = ptx.multiply_bf16x2(ptx.rotate_right(word, 3) & mask, upper)
            fragment[2, step] = ptx.multiply_bf16x2(ptx.rotate_right(word, 6) & mask, lower)
            spread = (word & Uint32(layout.SPREAD_MASK)) * Uint32(layout.SPREAD_FACTOR)
            fragment[3, step] = ptx.multiply_bf16x2(spread & mask, upper)

    def _unpack_scales(self, words):
        """bf16x2 block scales (both halves the same) of a thread's rows: 4 rows by 4 steps."""
        scales = []
        for word in words:
            first = ptx.mask_and_set(word, layout.SCALE_MASK, layout.SCALE_EXPONENT)
            second = ptx.mask_and_set(ptx.rotate_right(word, 8), layout.SCALE_MASK, layout.SCALE_EXPONENT)
            scales.append([ptx.broadcast_half(first, False), ptx.broadcast_half(first, True),
                           ptx.broadcast_half(second, False), ptx.broadcast_half(second, True)])  # fmt: skip
        return scales

    def _multiply(self, mma, accumulators, fragments, tokens, shared, me, slot, block, first_group_done):
        """Dequantises one block of a stage and issues its products, as one or two ``wgmma`` groups.

        Each group waits for the one before it. ``first_group_done`` is called when all products of earlier blocks are
        complete.
        """
        place = (slot * self.tile.m_warpgroups + me.m_warpgroup) * self.weight_bytes + block * layout.BLOCK_BYTES
        address = Int32(shared.weights.toint()) + place
        scales = self._unpack_scales(ptx.load_shared_v4(address + layout.CODE_BYTES + me.tid // 4 * 16))
        codes = [ptx.load_shared_v4(address + half * (layout.CODE_BYTES // 2) + me.tid * 16) for half in range(2)]
        groups = ((0,), (1,)) if self.group_per_half else ((0, 1),)
        for group in groups:
            for half in group:
                registers = cute.recast_tensor(fragments[half], Uint32)
                registers = cute.make_tensor(registers.iterator, cute.make_layout((4, 4)))
                self._dequantise(codes[half], registers, half, scales)
            warpgroup.fence()
            for step in range(4):
                token_step = tokens[None, None, step, slot * self.blocks + block]
                for half in group:
                    sums = accumulators[half]
                    cute.gemm(mma, sums, fragments[half][None, None, step], token_step, sums)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if group is groups[0]:
                first_group_done()

    @cute.jit
    def _release(self, shared, me, slot):
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
        for i in cutlass.range_constexpr(self.blocks // self.tile.k_warpgroups):
            self._multiply(
                mma, accumulators, fragment_sets[(parity + i) % len(fragment_sets)], tokens, shared, me, slot,
                me.k_warpgroup + i * self.tile.k_warpgroups,
                (lambda: self._release(shared, me, previous)) if i == 0 else (lambda: None),
            )  # fmt: skip
        return self._next(slot, phase)

    @cute.jit
    def _main_loop(self, mma, accumulators, fragment_sets, tokens, shared, me, slot, phase, k_blocks):
        """Sums this warpgroup's blocks of one unit; returns the slot and phase of the next unit's first stage."""
        for half in cutlass.range_constexpr(2):
            accumulators[half].fill(0.0)
        full = k_blocks // self.blocks
        per_stage = self.blocks // self.tile.k_warpgroups
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
            for i in cutlass.range_constexpr(self.blocks // self.tile.k_warpgroups):
                block = me.k_warpgroup + i * self.tile.k_warpgroups
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
        everyone = self.consumers * _WARPGROUP
        if me.k_warpgroup > 0:
            cute.arch.barrier(barrier_id=_REDUCTION_EMPTY, number_of_threads=everyone)
            for half in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(self.accumulators):
                    index = ((me.k_warpgroup - 1) * registers + half * self.accumulators + i) * _WARPGROUP + me.tid
                    shared.scratch[index] = accumulators[half][i]
            cute.arch.fence_acq_rel_cta()
            cute.arch.barrier_arrive(barrier_id=_REDUCTION_FULL, number_of_threads=everyone)
        else:
            cute.arch.barrier_arrive(barrier_id=_REDUCTION_EMPTY, number_of_threads=everyone)
            cute.arch.barrier(barrier_id=_REDUCTION_FULL, number_of_threads=everyone)
            for other in cutlass.range_constexpr(self.tile.k_warpgroups - 1):
                for half in cutlass.range_constexpr(2):
                    for i in cutlass.range_constexpr(self.accumulators):
                        index = (other * registers + half * self.accumulators + i) * _WARPGROUP + me.tid
                        accumulators[half][i] = accumulators[half][i] + shared.scratch[index]

    # -- producer -----------------------------------------------------------------------------------------------

    @cute.jit
    def _copy_weights(self, op, shared, slot, unit, k_block, count, extra):
        """One thread: announces a stage's bytes, ``extra`` of each block somebody else's, and copies its weights.

        The stage is ``count`` blocks, which are neighbours in memory, for each m warpgroup. With the first one go the
        unit and its width.
        """
        if k_block == 0:
            width = Int32(self.tile.widths[0])
            for i in cutlass.range_constexpr(len(self.tile.widths) - 1):
                if op.row_route[unit.token_tile * self.n + self.tile.widths[i]] >= 0:  # padding rows come last
                    width = Int32(self.tile.widths[i + 1])
            self._tell(shared, slot, (unit.expert, unit.m_tile, unit.token_tile, width))
        full = Int32((shared.barriers + slot).toint())
        block_bytes = self.tile.m_warpgroups * layout.BLOCK_BYTES + extra
        cute.arch.mbarrier_arrive_and_expect_tx(shared.barriers + slot, count * block_bytes)
        for i in cutlass.range_constexpr(self.tile.m_warpgroups):
            row_block = unit.m_tile * self.tile.m_warpgroups + i
            if row_block >= op.m_blocks:  # the last tile may have blocks to spare; their sums are never stored
                row_block = op.m_blocks - 1
            block = (Int64(unit.expert) * op.m_blocks + row_block) * op.k_blocks + k_block
            target = Int32(shared.weights.toint()) + (slot * self.tile.m_warpgroups + i) * self.weight_bytes
            source = op.payload.toint() + block * layout.BLOCK_BYTES
            ptx.bulk_copy(target, source, count * layout.BLOCK_BYTES, full)

    def _tell(self, shared, slot, values):
        """What the unit is that begins with a stage; before the arrival at the stage's barrier."""
        for i, value in enumerate(values):
            shared.units[slot * 4 + i] = Int32(value)

    @cute.jit
    def _finish(self, shared, slot, phase, tid):
        """Announces the sentinel, a stage of no unit."""
        cute.arch.mbarrier_wait(shared.barriers + self.stages + slot, phase)
        if tid == 0:
            self._tell(shared, slot, (_NO_UNIT, 0, 0, 0))
            cute.arch.mbarrier_arrive(shared.barriers + slot)

    def _num_units(self, op):
        return op.expert_tiles[op.local_experts] * op.m_tiles

    # -- the kernel ---------------------------------------------------------------------------------------------

    def _launch_options(self, ctas, stream):
        return {
            "grid": (ctas, 1, 1), "block": (self.threads, 1, 1), "stream": stream, "use_pdl": self.spec.pdl,
            "min_blocks_per_mp": self.tile.ctas_per_sm, "preferred_smem_carveout": 100,
        }  # fmt: skip

    @cute.jit
    def _run(self, op):
        tid, _, _ = cute.arch.thread_idx()
        warpgroup_index = cute.arch.make_warp_uniform(tid // _WARPGROUP)
        tid = tid % _WARPGROUP

        smem = cutlass.memory.SmemAllocator()
        token_layout = self._token_layout()
        shared = _values(
            tokens=smem.allocate_tensor(BFloat16, token_layout.outer, byte_alignment=1024, swizzle=token_layout.inner),
            weights=smem.allocate_array(Uint8, self.stages * self.tile.m_warpgroups * self.weight_bytes),
            barriers=smem.allocate_array(Int64, 2 * self.stages),  # a stage is full, then a stage is empty
            scratch=self._array(smem, Float32, self.tile.reduction_bytes // 4),
            rows=self._allocate_rows(smem),
            units=self._array(smem, Int32, 4 * self.stages),  # of a stage: expert, m tile, token tile, width
            next_unit=self._array(smem, Int32, 2),
        )
        if warpgroup_index == 0 and tid == 0:
            for i in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(shared.barriers + i, self._full_arrivals())
                cute.arch.mbarrier_init(shared.barriers + self.stages + i, 4 * self.consumers)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        m_tiles = (op.m_blocks + self.tile.m_warpgroups - 1) // self.tile.m_warpgroups
        op = _values(m_tiles=m_tiles, **op._asdict())
        producer_registers, consumer_registers = self._registers()
        if warpgroup_index == 0:
            cute.arch.setmaxregister_decrease(producer_registers)
            self._produce(op, shared, tid)
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            self._consume(op, shared, tid, warpgroup_index - 1)

    def _array(self, smem, dtype, size):
        return cute.make_tensor(smem.allocate_array(dtype, size), cute.make_layout(size)) if size else None

    def _unit(self, op, index):
        expert, m_tile, token_tile = schedule.locate(index, op.m_tiles, op.tile_expert, op.expert_tiles)
        return _values(expert=expert, m_tile=m_tile, token_tile=token_tile)

    @cute.jit
    def _receive(self, shared, slot, phase):
        """Expert, m tile, token tile and width of the unit that begins with this stage."""
        cute.arch.mbarrier_wait(shared.barriers + slot, phase)
        return tuple(shared.units[slot * 4 + i] for i in range(4))

    @cute.jit
    def _consume(self, op, shared, tid, consumer):
        me = _values(tid=tid, m_warpgroup=consumer, k_warpgroup=Int32(0))
        if cutlass.const_expr(self.tile.k_warpgroups > 1):
            me = _values(tid=tid, m_warpgroup=Int32(0), k_warpgroup=consumer)
        slot, phase = Int32(0), Int32(0)
        expert, m_tile, token_tile, width = self._receive(shared, slot, phase)
        while expert != _NO_UNIT:
            unit = _values(expert=expert, m_tile=m_tile, token_tile=token_tile)
            prefetched = self._prefetch_epilogue(op, unit, tid)
            for w in self.tile.widths:
                if width == w:
                    slot, phase = self._compute(op, shared, me, unit, prefetched, slot, phase, w)
            expert, m_tile, token_tile, width = self._receive(shared, slot, phase)

    @cute.jit
    def _compute(self, op, shared, me, unit, prefetched, slot, phase, width: cutlass.Constexpr):
        """One 128-row block of weights times the first ``width`` rows of a token tile, for this warpgroup."""
        mma = self._tiled_mma(width)
        thread_mma = mma.get_slice(me.tid)
        used = cute.local_tile(shared.tokens, (width, _BLOCK_K), (0, 0, None))
        tokens = mma.make_fragment_B(thread_mma.partition_B(used))
        accumulators = [mma.make_fragment_C(thread_mma.partition_shape_C((64, width))) for _ in range(2)]
        a_shape = thread_mma.partition_shape_A((64, _BLOCK_K))
        sets = 1 if self.group_per_half else 2
        fragment_sets = [[mma.make_fragment_A(a_shape) for _ in range(2)] for _ in range(sets)]
        slot, phase = self._main_loop(mma, accumulators, fragment_sets, tokens, shared, me, slot, phase, op.k_blocks)
        if cutlass.const_expr(self.tile.k_warpgroups > 1):
            self._add_up(accumulators, shared, me)
        if me.k_warpgroup == 0:
            self._epilogue(op, shared, me, unit, prefetched, accumulators, width)
        return slot, phase


class Gemm1(_Gemm):
    """Gathers x by route, multiplies with gate and up, and stores the activated (w4a4: NVFP4-rounded) intermediate."""

    def __init__(self, spec: common_plan.Gemm1Spec):
        super().__init__(spec.tile)
        self.spec = spec
        self.copies_in_flight = self.stages // 2  # the other half is for consumers to draw on

    def entry(self):
        i32 = Int32(0)
        arguments = (
            pointer(BFloat16), pointer(Int32), pointer(Int32), pointer(Int32), pointer(Uint8), pointer(Float32),
            pointer(Float32), pointer(Float32), pointer(Float32), pointer(BFloat16), i32, i32, i32, i32, i32, i32,
            cuda.CUstream(0),
        )  # fmt: skip
        return self.launch, arguments

    @cute.jit
    def launch(
        self, x: cute.Pointer, row_route: cute.Pointer, tile_expert: cute.Pointer, expert_tiles: cute.Pointer,
        payload: cute.Pointer, global_scale: cute.Pointer, input_scale: cute.Pointer, bias: cute.Pointer,
        down_input_scale: cute.Pointer, h: cute.Pointer, H: Int32, row_divisor: Int32, local_experts: Int32,
        m_blocks: Int32, k_blocks: Int32, ctas: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        self.kernel(
            x, row_route, tile_expert, expert_tiles, payload, global_scale, input_scale, bias, down_input_scale, h, H,
            row_divisor, local_experts, m_blocks, k_blocks,
        ).launch(**self._launch_options(ctas, stream))  # fmt: skip

    @cute.kernel
    def kernel(
        self, x: cute.Pointer, row_route: cute.Pointer, tile_expert: cute.Pointer, expert_tiles: cute.Pointer,
        payload: cute.Pointer, global_scale: cute.Pointer, input_scale: cute.Pointer, bias: cute.Pointer,
        down_input_scale: cute.Pointer, h: cute.Pointer, H: Int32, row_divisor: Int32, local_experts: Int32,
        m_blocks: Int32, k_blocks: Int32,
    ):  # fmt: skip
        op = _values(
            x=x, row_route=array(row_route), tile_expert=array(tile_expert), expert_tiles=array(expert_tiles),
            payload=payload, global_scale=array(global_scale), input_scale=array(input_scale), bias=array(bias),
            down_input_scale=array(down_input_scale), h=h, H=H, row_divisor=row_divisor, local_experts=local_experts,
            m_blocks=m_blocks, k_blocks=k_blocks,
        )  # fmt: skip
        self._run(op)

    def _full_arrivals(self):
        return 1 + 4  # the thread that announces the weights, and each warp for its token rows

    def _allocate_rows(self, smem):
        return None

    def _prefetch_epilogue(self, op, unit, tid):
        return None

    @cute.jit
    def _produce(self, op, shared, tid):
        """Weights by bulk copies of one thread, token rows by cp.async of all: 8 threads a row, 16 bytes each."""
        index, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        chunk = tid % _CHUNKS
        # All 16 rows of a pass are of one block, or, where a tile has 8 rows, of two.
        blocks_per_pass = max(1, _ROWS_PER_PASS // self.n)
        passes = (self.n + _ROWS_PER_PASS - 1) // _ROWS_PER_PASS
        full_passes = passes if self.n % _ROWS_PER_PASS == 0 or passes == 1 else passes - 1
        pass_bytes = _ROWS_PER_PASS * _TOKEN_ROW_BYTES
        first_row = tid // _CHUNKS % self.n
        first_block = tid // _CHUNKS // self.n
        if cutlass.const_expr(blocks_per_pass == 1):
            first_row, first_block = tid // _CHUNKS, Int32(0)
        swizzled = first_row * _TOKEN_ROW_BYTES + (chunk ^ (first_row % 8)) * _CHUNK_BYTES
        target = Int32(shared.tokens.iterator.toint()) + swizzled
        offsets = cute.make_rmem_tensor(passes, Int32)
        slot, phase = Int32(0), Int32(1)
        announced, in_flight, parity = Int32(0), Int32(0), Int32(0)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        units = self._num_units(op)
        while index < units:
            unit = self._unit(op, index)
            taken = Int32(0)
            if tid == 0:  # long before it is needed
                taken = schedule.take(op.expert_tiles, op.local_experts, 0, ctas)
            for i in cutlass.range_constexpr(passes):
                row = first_row + i * _ROWS_PER_PASS
                route = Int32(-1)
                if row < self.n:
                    route = op.row_route[unit.token_tile * self.n + row]
                offset = Int32(-1)
                if route >= 0:
                    offset = (route // op.row_divisor) * (op.H // 8) + chunk  # in units of 16 bytes
                offsets[i] = offset
            for k_block in cutlass.range(0, op.k_blocks, self.blocks, unroll=1):
                cute.arch.mbarrier_wait(shared.barriers + self.stages + slot, phase)
                if tid == 0:
                    count = min(op.k_blocks - k_block, self.blocks)
                    self._copy_weights(op, shared, slot, unit, k_block, count, 0)
                for j in cutlass.range_constexpr((self.blocks + blocks_per_pass - 1) // blocks_per_pass):
                    block = first_block + j * blocks_per_pass
                    place = target + (slot * self.blocks + block) * self.token_bytes
                    source = Int64(op.x.toint()) + Int64(k_block + block) * _TOKEN_ROW_BYTES
                    column = (k_block + block) * _BLOCK_K + chunk * 8
                    rows = [offsets[i] for i in range(full_passes)]
                    if block < self.blocks:
                        ptx.gather_rows(place, source, rows, column, op.H, pass_bytes)
                        if cutlass.const_expr(passes > full_passes):
                            place = place + full_passes * pass_bytes
                            if first_row < self.n - full_passes * _ROWS_PER_PASS:
                                ptx.gather_rows(place, source, [offsets[full_passes]], column, op.H, pass_bytes)
                cute.arch.cp_async_commit_group()
                in_flight = in_flight + 1
                if in_flight > self.copies_in_flight:
                    cute.arch.cp_async_wait_group(self.copies_in_flight)
                    announced = self._announce(shared, announced, tid)
                    in_flight = in_flight - 1
                slot, phase = self._next(slot, phase)
            if tid == 0:
                shared.next_unit[parity] = taken
            cute.arch.barrier(barrier_id=_NEXT_UNIT, number_of_threads=_WARPGROUP)
            index = shared.next_unit[parity]  # the other place is for the unit after it: one barrier will do
            parity = parity ^ 1
        cute.arch.cp_async_wait_group(0)
        for _ in cutlass.range(in_flight, unroll=1):
            announced = self._announce(shared, announced, tid)
        self._finish(shared, slot, phase, tid)
        self._announce(shared, slot, tid)

    @cute.jit
    def _announce(self, shared, slot, tid):
        """Tells the consumers that this warp's part of a stage has arrived; returns the next slot."""
        # cp.async writes through the generic proxy, wgmma reads through the async one.
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        if tid % 32 == 0:
            cute.arch.mbarrier_arrive(shared.barriers + slot)
        slot = slot + 1
        if slot == self.stages:
            slot = Int32(0)
        return slot

    @cute.jit
    def _epilogue(self, op, shared, me, unit, prefetched, accumulators, width: cutlass.Constexpr):
        row_block = unit.m_tile * self.tile.m_warpgroups + me.m_warpgroup
        if row_block < op.m_blocks:
            self._store(op, me, unit, row_block, accumulators, width)

    def _store(self, op, me, unit, row_block, accumulators, width):
        spec, expert = self.spec, unit.expert
        warp, group, quad = me.tid // 32, me.tid % 32 // 4, me.tid % 4
        # Where this thread's neighbouring values lie: in I, and in the blocks of 64 that GEMM2 reads.
        if spec.gated:
            projections, values_per_thread, value = 2, 2, 16 * warp + 2 * group
            block, num_blocks = row_block, op.m_blocks
        else:
            projections, values_per_thread, value = 1, 4, 32 * warp + 4 * group
            block, num_blocks = 2 * row_block + warp // 2, 2 * op.m_blocks
        scales = [op.global_scale[expert * projections + p] for p in range(projections)]
        if spec.precision == "w4a4":
            scales = [scale * op.input_scale[0] for scale in scales]
        scales = [scale * Float32(2.0**-layout.WEIGHT_LOG2) for scale in scales]
        next_scale = op.down_input_scale[expert] if spec.precision == "w4a4" else None
        biases = [[Float32(0.0)] * values_per_thread for _ in range(projections)]
        if spec.has_bias:
            first = row_block * (layout.BLOCK_ROWS // projections) + value
            starts = [(expert * projections + p) * (num_blocks * _BLOCK_K) + first for p in range(projections)]
            biases = [[op.bias[start + i] for i in range(values_per_thread)] for start in starts]
        column = value % _BLOCK_K
        chunk, within = column // 8, column % 8 * 2
        tile_address = Int64(op.h.toint()) + (Int64(unit.token_tile) * num_blocks + block) * self.token_bytes

        def activated(j, c):
            """The activated values of token 8*j + 2*quad + c."""
            if spec.gated:
                gates = [accumulators[i][4 * j + c] * scales[0] + biases[0][i] for i in range(2)]
                ups = [accumulators[i][4 * j + 2 + c] * scales[1] + biases[1][i] for i in range(2)]
            else:
                ups = [accumulators[i // 2][4 * j + 2 * (i % 2) + c] * scales[0] + biases[0][i] for i in range(4)]
                gates = ups
            return [
                epilogue.activate(gate, up, spec.activation, spec.alpha, spec.beta, spec.limit)
                for gate, up in zip(gates, ups, strict=True)
            ]

        def store(j, c, values):
            words = [ptx.pack_bf16x2(values[2 * i], values[2 * i + 1]) for i in range(values_per_thread // 2)]
            row = 2 * quad + c  # modulo 8, which is all that the swizzle looks at
            address = tile_address + Int64((row + 8 * j) * _TOKEN_ROW_BYTES + (chunk ^ row) * 16 + within)
            ptx.store_global(address, words)

        # The 16 neighbours of an NVFP4 block are in 8 lanes (4 without a gate). These take as many tokens at a time,
        # so that each lane computes one block's scale, by two slow divisions, and not each lane every block's.
        lanes = 8 if spec.gated else 4
        columns = [(j, c) for j in range(width // 8) for c in range(2)]
        for first in range(0, len(columns), lanes):
            some = columns[first : first + lanes]
            values = [activated(j, c) for j, c in some]
            if spec.precision == "w4a4":
                values = epilogue.round_blocks(values, next_scale, group % lanes, lanes, 4)
            for (j, c), row in zip(some, values, strict=True):
                store(j, c, row)


class Gemm2(_Gemm):
    """Multiplies the intermediate with down and adds (atomic) or stores (ordered) the weighted rows."""

    def __init__(self, spec: common_plan.Gemm2Spec):
        super().__init__(spec.tile)
        self.spec = spec

    def entry(self):
        i32 = Int32(0)
        out = BFloat16 if self._bf16() else Float32
        arguments = (
            pointer(BFloat16), pointer(Int32), pointer(Float32), pointer(Int32), pointer(Int32), pointer(Uint8),
            pointer(Float32), pointer(Float32), pointer(Float32), pointer(out), i32, i32, i32, i32, i32, i32, i32,
            cuda.CUstream(0),
        )  # fmt: skip
        return self.launch, arguments

    def _bf16(self):
        return self.spec.combine == "atomic" and self.spec.out_dtype == "bfloat16"

    @cute.jit
    def launch(
        self, h: cute.Pointer, row_route: cute.Pointer, row_weight: cute.Pointer, tile_expert: cute.Pointer,
        expert_tiles: cute.Pointer, payload: cute.Pointer, global_scale: cute.Pointer, input_scale: cute.Pointer,
        bias: cute.Pointer, out: cute.Pointer, H: Int32, row_divisor: Int32, local_experts: Int32, m_blocks: Int32,
        k_blocks: Int32, h_blocks: Int32, ctas: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        self.kernel(
            h, row_route, row_weight, tile_expert, expert_tiles, payload, global_scale, input_scale, bias, out, H,
            row_divisor, local_experts, m_blocks, k_blocks, h_blocks,
        ).launch(**self._launch_options(ctas, stream))  # fmt: skip

    @cute.kernel
    def kernel(
        self, h: cute.Pointer, row_route: cute.Pointer, row_weight: cute.Pointer, tile_expert: cute.Pointer,
        expert_tiles: cute.Pointer, payload: cute.Pointer, global_scale: cute.Pointer, input_scale: cute.Pointer,
        bias: cute.Pointer, out: cute.Pointer, H: Int32, row_divisor: Int32, local_experts: Int32, m_blocks: Int32,
        k_blocks: Int32, h_blocks: Int32,
    ):  # fmt: skip
        op = _values(
            h=h, row_route=array(row_route), row_weight=array(row_weight), tile_expert=array(tile_expert),
            expert_tiles=array(expert_tiles), payload=payload, global_scale=array(global_scale),
            input_scale=array(input_scale), bias=array(bias), out=out, H=H, row_divisor=row_divisor,
            local_experts=local_experts, m_blocks=m_blocks, k_blocks=k_blocks, h_blocks=h_blocks,
        )  # fmt: skip
        self._run(op)

    def _full_arrivals(self):
        return 1

    def _allocate_rows(self, smem):
        size = self.tile.m_warpgroups * self.n
        return self._array(smem, Int32, size), self._array(smem, Float32, size)

    def _prefetch_epilogue(self, op, unit, tid):
        """Routes and weights of token rows ``tid``, ``tid + 128``; used after the main loop has hidden the loads."""
        return tuple(self._load_row(op, unit, first + tid) for first in range(0, self.n, _WARPGROUP))

    @cute.jit
    def _load_row(self, op, unit, row):
        route, weight = Int32(-1), Float32(0.0)
        if row < self.n:
            route = op.row_route[unit.token_tile * self.n + row]
            weight = op.row_weight[unit.token_tile * self.n + row]
        return route, weight

    @cute.jit
    def _share_row(self, op, shared, me, row, route, weight):
        """Gives this warpgroup's threads the output row and weight of a token row."""
        if row < self.n:
            out_row = Int32(-1)
            if route >= 0:
                out_row = route // op.row_divisor
            shared.rows[0][me.m_warpgroup * self.n + row] = out_row
            shared.rows[1][me.m_warpgroup * self.n + row] = weight

    @cute.jit
    def _produce(self, op, shared, tid):
        """One thread: everything is a bulk copy, because GEMM1 stored its result as tiles in shared-memory order."""
        index, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        if tid == 0:
            target = Int32(shared.tokens.iterator.toint())
            slot, phase = Int32(0), Int32(1)
            units = self._num_units(op)
            early = Int32(0)  # blocks of the first unit whose weights are asked for before GEMM1 has ended
            if index < units:
                early = min(op.k_blocks, self.stages * self.blocks)
                unit = self._unit(op, index)
                for k_block in cutlass.range(0, early, self.blocks, unroll=1):
                    count = min(op.k_blocks - k_block, self.blocks)
                    self._copy_weights(op, shared, k_block // self.blocks, unit, k_block, count, self.token_bytes)
            cute.arch.griddepcontrol_wait()
            while index < units:
                unit = self._unit(op, index)
                taken = schedule.take(op.expert_tiles, op.local_experts, 1, ctas)
                for k_block in cutlass.range(0, op.k_blocks, self.blocks, unroll=1):
                    cute.arch.mbarrier_wait(shared.barriers + self.stages + slot, phase)
                    count = min(op.k_blocks - k_block, self.blocks)
                    if k_block >= early:
                        self._copy_weights(op, shared, slot, unit, k_block, count, self.token_bytes)
                    block = Int64(unit.token_tile) * op.h_blocks + k_block
                    source = Int64(op.h.toint()) + block * self.token_bytes
                    full = Int32((shared.barriers + slot).toint())
                    place = target + slot * (self.blocks * self.token_bytes)
                    ptx.bulk_copy(place, source, count * self.token_bytes, full)
                    slot, phase = self._next(slot, phase)
                index, early = taken, Int32(0)
            self._finish(shared, slot, phase, tid)

    @cute.jit
    def _epilogue(self, op, shared, me, unit, prefetched, accumulators, width: cutlass.Constexpr):
        warp, group, quad = me.tid // 32, me.tid % 32 // 4, me.tid % 4
        row_block = unit.m_tile * self.tile.m_warpgroups + me.m_warpgroup
        mine = me.m_warpgroup * self.n
        barrier = me.m_warpgroup + _EPILOGUE
        cute.arch.barrier(barrier_id=barrier, number_of_threads=_WARPGROUP)  # the unit before this one has been stored
        for i in cutlass.range_constexpr(len(prefetched)):
            self._share_row(op, shared, me, i * _WARPGROUP + me.tid, *prefetched[i])
        cute.arch.barrier(barrier_id=barrier, number_of_threads=_WARPGROUP)
        feature = row_block * layout.BLOCK_ROWS + 32 * warp + 4 * group
        if feature < op.H:
            self._store(op, shared, unit, mine + 2 * quad, feature, accumulators, width)

    def _store(self, op, shared, unit, first_row, feature, accumulators, width):
        spec, expert = self.spec, unit.expert
        scale = op.global_scale[expert]
        if spec.precision == "w4a4":
            scale = scale * op.input_scale[expert]
        scale = scale * Float32(2.0**-layout.WEIGHT_LOG2)
        biases = [Float32(0.0)] * 4
        if spec.has_bias:
            biases = [op.bias[expert * op.H + feature + i] for i in range(4)]
        size = 2 if self._bf16() else 4
        column = Int64(op.out.toint()) + Int64(feature) * size
        for j in range(width // 8):
            for c in range(2):
                out_row = shared.rows[0][first_row + 8 * j + c]
                weight = shared.rows[1][first_row + 8 * j + c]
                sums = [accumulators[i // 2][4 * j + 2 * (i % 2) + c] for i in range(4)]
                values = [(total * scale + bias) * weight for total, bias in zip(sums, biases, strict=True)]
                self._store_row(out_row, column, op.H * size, values)

    @cute.jit
    def _store_row(self, out_row, column, row_bytes, values):
        if out_row >= 0:
            address = column + Int64(out_row) * Int64(row_bytes)
            if cutlass.const_expr(self.spec.combine == "ordered"):
                ptx.store_global_f32x4(address, values)
            elif cutlass.const_expr(self._bf16()):
                low, high = ptx.pack_bf16x2(values[0], values[1]), ptx.pack_bf16x2(values[2], values[3])
                ptx.add_global_bf16x4(address, low, high)
            else:
                ptx.add_global_f32x4(address, values)
