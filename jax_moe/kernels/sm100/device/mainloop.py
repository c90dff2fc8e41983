"""The main loop of sm_100f's two grouped GEMMs: NVFP4 weights on the M side of ``tcgen05.mma``, tokens on the N side.

One main loop serves both GEMMs and both precisions. A CTA multiplies 128 rows of weights with one token tile at a time;
how many rows of the tile are multiplied, the *width*, is a value of run time. w4a4 gives the tensor cores codes and
scales as they lie in memory; w4a16 has a warpgroup or two that turn weights into bf16 in tensor memory. CTAs are
persistent and take units (expert, weight block, token tile) as ``device/schedule.py`` hands them out.

Warps of a CTA, and what each does for every unit:

    0-3   epilogue     sums from tensor memory to global memory; warp w can reach lanes 32 * (w % 4) to + 31 only
    4     products     one thread issues all copies of scales, products and commits
    5     loads        takes units, tells the others what they are; weights, and GEMM2's tokens, by bulk copies
    6, 7  gather       GEMM1: token rows by cp.async
    8-    dequantise   w4a16: weights from shared memory to tensor memory, one warpgroup or two

A stage is ``config.stage_blocks`` weight blocks with their tokens. Who waits for whom (all are mbarriers; ``place`` is
one of a ring of units, ``half`` one of two):

    barrier               waits                        arrives, and how often in one phase
    FULL + stage          products, dequantise;        loads (with the bytes of its copies); GEMM1: 2 warps that gather
                          w4a4: loads, too
    EMPTY + stage         loads, gather; products      the commit of the stage's products; w4a16: each dequantising warp
    UNIT_FULL + place     everybody but loads          loads
    UNIT_EMPTY + place    loads                        every warp but the one that takes units, when it has read one
    SUMS_FULL + half      epilogue                     the commit of the unit's products
    SUMS_EMPTY + half     products                     each warp of the epilogue
    WEIGHTS_FULL + half   products                     w4a16: each warp of one warpgroup
    WEIGHTS_EMPTY + half  dequantise                   w4a16: the commit of the block's products
    PEER + stage          products                     pairs: the peer's warp 4, when its FULL is complete

What EMPTY barriers guard is empty at first: waits for them begin with parity 1, and the first of each passes at once.

Tensor memory has two sets of sums, so that the epilogue of one unit runs beside the products of the next; then, w4a4,
two sets of scale columns, or, w4a16, two blocks of weights. PTX orders a copy of scales before the products that follow
it, but not after those in front of it. So scale columns are written again only when the commit of the stage that read
them, two stages ago, has been waited for: the products of the stage between keep the tensor cores busy meanwhile.

A pair (``config.pair``) is two CTAs of a cluster: 256 rows of weights, half a tile's token rows in the shared memory of
each. One thread of the *leader*, CTA 0, issues the products for both, and each CTA stores the sums of its own rows. So
the leader waits for both: UNIT_EMPTY, SUMS_EMPTY and WEIGHTS_FULL are its own, the warps of both CTAs arrive there,
the peer's warp 4 tells it that a stage is full, and its own loads tell both CTAs of a unit. Commits arrive in both.

Launch overlap is as on sm_90a (``kernels/README.md``). GEMM1 lets GEMM2 start after it has allocated its tensor memory:
else a CTA of GEMM2, which waits for GEMM1, could hold what a CTA of GEMM1 still needs.

Names: ``op`` holds the kernel's operands, ``shared`` what lies in shared memory, ``unit`` one piece of work.
"""

import cutlass
from cutlass import Float32, Int32, Int64, Uint8
import cutlass.cute as cute

from jax_moe.kernels.device import bf16_weights, dequantise, entry, ptx, schedule
from jax_moe.kernels.device.entry import array, named
from jax_moe.kernels.sm100.device import tcgen05, weight_block
from jax_moe.kernels.sm100.device.weight_block import ROW_BYTES, STEP_K, STEPS

WARPGROUP = 128
EPILOGUE_WARPS = 4
PRODUCTS, LOADS, GATHER, DEQUANTISE = 4, 5, 6, 8  # first warps of the roles
GATHER_WARPS = 2
ROWS = 1  # named barrier of the epilogue; 0 is sync_threads
_UNITS = 8  # places of the ring
_NO_UNIT = -1
_A_COLUMNS = STEP_K // 2  # of tensor memory: a dequantised block


class Gemm(entry.Kernel):
    """What GEMM1 and GEMM2 share: roles, pipeline and main loop."""

    def __init__(self, spec):
        super().__init__(spec)
        self.read = schedule.reader(self.early_weights)
        self.config = config = spec.config
        self.n = config.token_tile
        self.stages = config.stages
        self.blocks = config.stage_blocks
        self.group = 2 if config.pair else 1  # CTAs that multiply together
        self.is_fp4 = spec.precision == "w4a4"
        self.unscale = 1.0 if self.is_fp4 else 2.0**-bf16_weights.WEIGHT_LOG2
        self.block_bytes = weight_block.BLOCK_BYTES if self.is_fp4 else weight_block.BF16_BLOCK_BYTES
        self.atoms = (self.n + 127) // 128  # of the scales of a step's tokens
        self.tile_bytes = self.n * ROW_BYTES  # of one block of a tile, as h has it, without scales
        self.token_bytes = self.tile_bytes // self.group  # of these in this CTA
        self.token_scale_bytes = self.atoms * weight_block.SCALE_BYTES if self.is_fp4 else 0
        # Barriers, in this order.
        self.full, self.empty = 0, self.stages
        self.unit_full = 2 * self.stages
        self.unit_empty = self.unit_full + _UNITS
        self.sums_full = self.unit_empty + _UNITS
        self.sums_empty = self.sums_full + 2
        self.weights_full = self.sums_empty + 2
        self.weights_empty = self.weights_full + 2
        self.peer = self.weights_empty + 2
        self.num_barriers = self.peer + (self.stages if config.pair else 0)
        # Columns of tensor memory.
        self.scale_columns = STEPS * 4 * (1 + self.atoms)  # of one stage: those of weights, then of tokens
        self.a_column = 2 * self.n
        other = 2 * self.scale_columns if self.is_fp4 else 2 * _A_COLUMNS
        self.columns = tcgen05.allocation(2 * self.n + other)

    def launch_options(self):
        return {"min_blocks_per_mp": self.config.ctas_per_sm, "preferred_smem_carveout": 100}

    # -- barriers ---------------------------------------------------------------------------------------------------

    def _arrivals(self):
        """Of one phase of every barrier, in order."""
        dequantising = 4 if not self.is_fp4 else 0  # a block is one warpgroup's
        readers = EPILOGUE_WARPS + 1 + self._gather_warps() + self.config.dequantisers * 4
        readers = self.group * readers + self.group - 1  # and the peer's loads
        return (
            [1 + self._gather_warps()] * self.stages
            + [1 + self.config.dequantisers * 4] * self.stages
            + [1] * _UNITS
            + [readers] * _UNITS
            + [1, 1]
            + [self.group * EPILOGUE_WARPS] * 2
            + [self.group * dequantising or 1] * 2
            + [1, 1]
            + [1] * (self.num_barriers - self.peer)
        )

    def _address(self, shared, index):
        return Int32((shared.barriers + index).toint())

    @cute.jit
    def _wait(self, shared, index, parity):
        if cutlass.const_expr(self.group == 1):
            cute.arch.mbarrier_wait(shared.barriers + index, parity)
        else:
            done = ptx.try_wait_cluster(self._address(shared, index), parity)
            while done == 0:
                done = ptx.try_wait_cluster(self._address(shared, index), parity)

    def _arrive(self, shared, index):
        cute.arch.mbarrier_arrive(shared.barriers + index)

    def _arrive_at_leader(self, shared, index):
        if self.group == 1:
            self._arrive(shared, index)
        else:
            ptx.arrive_cluster(ptx.in_cta(self._address(shared, index), 0))

    @cute.jit
    def _warp_arrives(self, shared, index, lane):
        """For what all lanes of the warp have done."""
        cute.arch.sync_warp()
        if lane == 0:
            self._arrive(shared, index)

    @cute.jit
    def _warp_arrives_at_leader(self, shared, index, lane):
        cute.arch.sync_warp()
        if lane == 0:
            self._arrive_at_leader(shared, index)

    def _commit(self, shared, index):
        tcgen05.commit(self.group, self._address(shared, index))

    def _synchronise(self):
        """All threads of the CTA, or of the pair."""
        tcgen05.fence_before()
        if self.group == 1:
            cute.arch.sync_threads()
        else:
            cute.arch.sync_warp()
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        tcgen05.fence_after()

    @cute.jit
    def _next(self, index, parity, size: cutlass.Constexpr):
        """The place after this one in a ring, and the parity of its barriers."""
        index = index + 1
        if index == size:
            index = Int32(0)
            parity = parity ^ 1
        return index, parity

    # -- the kernel -------------------------------------------------------------------------------------------------

    @cute.kernel
    def kernel(self, given):
        self._run(self._operands(given))

    def _operands(self, given):
        """``given``, with what is indexed by element as arrays, and with the number of weight blocks along K."""
        values = {name: array(value) if name in self.arrays else value for name, value in given._asdict().items()}
        steps = STEPS if self.is_fp4 else 1
        k_blocks = (given.k_steps + steps - 1) // steps
        return named(**values, k_blocks=k_blocks, m_tiles=(given.m_blocks + self.group - 1) // self.group)

    @cute.jit
    def _run(self, op):
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tid // 32), tid % 32
        rank = Int32(0)
        if cutlass.const_expr(self.group == 2):
            rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        smem = cutlass.memory.SmemAllocator()
        tokens = smem.allocate_array(Uint8, self.stages * self.blocks * self.token_bytes, byte_alignment=1024)
        weights = smem.allocate_array(Uint8, self.stages * self.blocks * self.block_bytes, byte_alignment=1024)
        shared = named(
            tokens=Int32(tokens.toint()),
            weights=Int32(weights.toint()),
            token_scales=self._bytes(smem, self.stages * self.token_scale_bytes),
            barriers=smem.allocate_array(Int64, self.num_barriers),
            units=self._array(smem, Int32, 4 * _UNITS),  # of a place: expert, m tile, token tile, width
            rows=self._allocate_rows(smem),
            rank=rank,  # of this CTA in its pair
        )
        tensor_memory = smem.allocate_array(Int32, 1)
        if tid == 0:
            for i, count in enumerate(self._arrivals()):
                cute.arch.mbarrier_init(shared.barriers + i, count)
            cute.arch.mbarrier_init_fence()
        if warp == PRODUCTS:  # one whole warp allocates, and the same frees
            cute.arch.alloc_tmem(self.columns, tensor_memory, is_two_cta=self.config.pair)
            cute.arch.relinquish_tmem_alloc_permit(is_two_cta=self.config.pair)
        self._synchronise()
        base = cute.make_tensor(tensor_memory, cute.make_layout(1))[0]

        if warp < EPILOGUE_WARPS:
            self._store_all(op, shared, base, tid)
        if warp == PRODUCTS:
            with cute.arch.elect_one():
                if cutlass.const_expr(self.group == 1):
                    self._multiply_all(op, shared, base)
                else:
                    if rank == 0:
                        self._multiply_all(op, shared, base)
                    else:
                        self._tell_of_stages(op, shared)
        if warp == LOADS:
            self._load_all(op, shared, lane)
        if cutlass.const_expr(self._gather_warps() > 0):
            if warp >= GATHER and warp < DEQUANTISE:
                self._gather_all(op, shared, tid - GATHER * 32)
        if cutlass.const_expr(not self.is_fp4):
            if warp >= DEQUANTISE:
                self._dequantise_all(op, shared, base, tid - DEQUANTISE * 32)

        cute.arch.sync_warp()
        self._synchronise()
        if warp == PRODUCTS:
            pointer = cute.arch.retrieve_tmem_ptr(Float32, 16, tensor_memory)
            cute.arch.dealloc_tmem(pointer, self.columns, is_two_cta=self.config.pair)

    def _array(self, smem, dtype, size):
        return cute.make_tensor(smem.allocate_array(dtype, size), cute.make_layout(size)) if size else None

    def _bytes(self, smem, size):
        return Int32(smem.allocate_array(Uint8, size, byte_alignment=512).toint()) if size else None

    # -- units ------------------------------------------------------------------------------------------------------

    def _num_units(self, op):
        return self.read(op.expert_tiles, op.local_experts) * op.m_tiles

    @cute.jit
    def _receive(self, shared, place, parity, lane):
        """Expert, weight block, token tile and width of the next unit; for a whole warp."""
        self._wait(shared, self.unit_full + place, parity)
        values = [shared.units[place * 4 + i] for i in range(4)]
        self._warp_arrives_at_leader(shared, self.unit_empty + place, lane)
        return self._of_this_cta(shared, values)

    def _of_this_cta(self, shared, values):
        expert, m_tile, token_tile, width = values
        return expert, self.group * m_tile + shared.rank, token_tile, width

    # -- loads ------------------------------------------------------------------------------------------------------

    @cute.jit
    def _unit(self, op, index, lane):
        """A unit, its width the rows of its tile up to the last with a route, in eights; for a whole warp."""
        expert, m_tile, token_tile = schedule.locate(index, op.m_tiles, op.tile_expert, op.expert_tiles, self.read)
        route = Int32(-1)
        if lane * 8 < self.n:
            route = self.read(op.row_route, token_tile * self.n + lane * 8)
        width = 8 * Int32(cute.arch.popc(cute.arch.vote_ballot_sync(route >= 0)))  # padding rows come last
        if cutlass.const_expr(self.config.granule == 16):
            width = (width + 15) // 16 * 16
        return named(expert=expert, m_tile=m_tile, token_tile=token_tile, width=width)

    def _loaded(self, shared, unit):
        """The unit, with this CTA's weight block."""
        values = (unit.expert, unit.m_tile, unit.token_tile, unit.width)
        expert, m_block, token_tile, width = self._of_this_cta(shared, values)
        return named(expert=expert, m_block=m_block, token_tile=token_tile, width=width)

    @cute.jit
    def _load_all(self, op, shared, lane):
        index, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        index, ctas = index // self.group, ctas // self.group
        early = Int32(0)  # blocks of the first unit whose weights are asked for before the kernel in front has ended
        if cutlass.const_expr(self.early_weights):
            if index < self._num_units(op):
                unit = self._loaded(shared, self._unit(op, index, lane))
                early = min(op.k_blocks, self.stages * self.blocks)
                for k_block in cutlass.range(0, early, self.blocks, unroll=1):
                    if lane == 0:
                        self._copy_weights(op, shared, k_block // self.blocks, unit, k_block)
        cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(not self.early_weights):
            cute.arch.griddepcontrol_launch_dependents()
        if cutlass.const_expr(self.group == 1):
            self._lead_loads(op, shared, lane, index, ctas, early)
        else:
            if shared.rank == 0:
                self._lead_loads(op, shared, lane, index, ctas, early)
            else:
                self._follow_loads(op, shared, lane, early)

    @cute.jit
    def _lead_loads(self, op, shared, lane, index, ctas, early):
        slot, parity = Int32(0), Int32(1)
        place, place_parity = Int32(0), Int32(1)
        units = self._num_units(op)
        while index < units:
            unit = self._unit(op, index, lane)
            taken = Int32(0)
            if lane == 0:  # long before it is needed
                taken = schedule.take(op.expert_tiles, op.local_experts, self.counter, ctas)
            self._tell(shared, place, place_parity, (unit.expert, unit.m_tile, unit.token_tile, unit.width), lane)
            place, place_parity = self._next(place, place_parity, _UNITS)
            slot, parity = self._load_unit(op, shared, lane, self._loaded(shared, unit), slot, parity, early)
            early = Int32(0)
            index = cute.arch.shuffle_sync(taken, 0)
        self._tell(shared, place, place_parity, (_NO_UNIT, 0, 0, 0), lane)
        self._drain(shared, slot, parity)

    @cute.jit
    def _follow_loads(self, op, shared, lane, early):
        """The peer's, of the units that the leader takes."""
        slot, parity = Int32(0), Int32(1)
        place, place_parity = Int32(0), Int32(0)
        expert, m_block, token_tile, width = self._receive(shared, place, place_parity, lane)
        while expert != _NO_UNIT:
            place, place_parity = self._next(place, place_parity, _UNITS)
            unit = named(expert=expert, m_block=m_block, token_tile=token_tile, width=width)
            slot, parity = self._load_unit(op, shared, lane, unit, slot, parity, early)
            early = Int32(0)
            expert, m_block, token_tile, width = self._receive(shared, place, place_parity, lane)
        self._drain(shared, slot, parity)

    @cute.jit
    def _load_unit(self, op, shared, lane, unit, slot, parity, early):
        for k_block in cutlass.range(0, op.k_blocks, self.blocks, unroll=1):
            self._wait(shared, self.empty + slot, parity)
            if cutlass.const_expr(self.is_fp4):
                # The commit speaks for the products only. They leave out steps behind K, whose bytes are copied too.
                self._wait(shared, self.full + slot, parity)
            if lane == 0:
                if k_block >= early:
                    self._copy_weights(op, shared, slot, unit, k_block)
                self._copy_tokens(op, shared, slot, unit, k_block)
            slot, parity = self._next(slot, parity, self.stages)
        return slot, parity

    @cute.jit
    def _drain(self, shared, slot, parity):
        """The last stages' commits arrive before this CTA's shared memory is given back."""
        for _ in cutlass.range(self.stages, unroll=1):
            self._wait(shared, self.empty + slot, parity)
            slot, parity = self._next(slot, parity, self.stages)

    @cute.jit
    def _tell(self, shared, place, parity, values, lane):
        self._wait(shared, self.unit_empty + place, parity)
        if lane == 0:
            for i in cutlass.range_constexpr(4):
                shared.units[place * 4 + i] = Int32(values[i])
            self._arrive(shared, self.unit_full + place)
            if cutlass.const_expr(self.group == 2):
                peers = ptx.in_cta(Int32(shared.units.iterator.toint()) + place * 16, 1)
                for i in cutlass.range_constexpr(4):
                    ptx.store_cluster(peers + 4 * i, Int32(values[i]))
                ptx.arrive_cluster(ptx.in_cta(self._address(shared, self.unit_full + place), 1))

    @cute.jit
    def _count(self, op, k_block):
        """Weight blocks of the stage that begins with ``k_block``."""
        return min(op.k_blocks - k_block, self.blocks)

    @cute.jit
    def _copy_weights(self, op, shared, slot, unit, k_block):
        """One thread: announces a stage's bytes, also those of ``_copy_tokens``, and copies its weights."""
        full = shared.barriers + self.full + slot
        count = self._count(op, k_block)
        cute.arch.mbarrier_arrive_and_expect_tx(full, count * (self.block_bytes + self._token_bytes_loaded(unit)))
        # The last pair may have a block to spare; its sums are never stored.
        block = (Int64(unit.expert) * op.m_blocks + min(unit.m_block, op.m_blocks - 1)) * op.k_blocks + k_block
        ptx.bulk_copy(
            shared.weights + slot * (self.blocks * self.block_bytes), op.payload.toint() + block * self.block_bytes,
            count * self.block_bytes, Int32(full.toint()),
        )  # fmt: skip

    # -- dequantise: w4a16 ------------------------------------------------------------------------------------------

    @cute.jit
    def _dequantise_all(self, op, shared, base, tid):
        """A warpgroup's thread ``tid`` (modulo 128) dequantises row ``tid`` of every block, or of every second."""
        group, row, lane = tid // WARPGROUP, tid % WARPGROUP, tid % 32
        lanes = base + (row // 32 << 21)  # the lane of an address is at bit 16
        place, place_parity = Int32(0), Int32(0)
        slot, parity = Int32(0), Int32(0)
        half, half_parity = Int32(0), Int32(1)
        expert, _, _, _ = self._receive(shared, place, place_parity, lane)
        while expert != _NO_UNIT:
            place, place_parity = self._next(place, place_parity, _UNITS)
            for k_block in cutlass.range(0, op.k_blocks, self.blocks, unroll=1):
                self._wait(shared, self.full + slot, parity)
                address = shared.weights + slot * (self.blocks * self.block_bytes)
                for _ in cutlass.range(self._count(op, k_block), unroll=1):
                    if cutlass.const_expr(self.config.dequantisers == 1):
                        self._dequantise(shared, address, lanes, row, lane, half, half_parity)
                    elif half == group:
                        self._dequantise(shared, address, lanes, row, lane, half, half_parity)
                    address = address + self.block_bytes
                    half, half_parity = self._next(half, half_parity, 2)
                self._warp_arrives(shared, self.empty + slot, lane)
                slot, parity = self._next(slot, parity, self.stages)
            expert, _, _, _ = self._receive(shared, place, place_parity, lane)
        for _ in cutlass.range_constexpr(2):  # as in _drain
            self._wait(shared, self.weights_empty + half, half_parity)
            half, half_parity = self._next(half, half_parity, 2)

    @cute.jit
    def _dequantise(self, shared, address, lanes, row, lane, half, parity):
        """One row of a block to ``half`` of the weights in tensor memory."""
        halves = weight_block.BF16_CODE_BYTES // 2
        codes = (*ptx.load_shared_v4(address + row * 16), *ptx.load_shared_v4(address + halves + row * 16))
        scale_word = ptx.load_shared(address + weight_block.BF16_CODE_BYTES + row * 4)
        scales = dequantise.scales(scale_word)
        words = []
        for i in cutlass.range_constexpr(len(codes)):
            words.extend(dequantise.pairs(codes[i], scales[i // 2], scales[i // 2]))
        self._wait(shared, self.weights_empty + half, parity)
        tcgen05.fence_after()
        tcgen05.store_columns(lanes + self.a_column + half * _A_COLUMNS, words)
        tcgen05.wait_stores()
        tcgen05.fence_before()
        self._warp_arrives_at_leader(shared, self.weights_full + half, lane)

    # -- products ---------------------------------------------------------------------------------------------------

    @cute.jit
    def _multiply_all(self, op, shared, base):
        """One thread."""
        place, place_parity = Int32(0), Int32(0)
        slot, parity = Int32(0), Int32(0)
        half, half_parity = Int32(0), Int32(1)  # of the sums
        other, other_parity = Int32(0), Int32(0)  # of the scales, or of the dequantised weights
        expert, width = self._receive_width(shared, place, place_parity)
        while expert != _NO_UNIT:
            place, place_parity = self._next(place, place_parity, _UNITS)
            self._wait(shared, self.sums_empty + half, half_parity)
            tcgen05.fence_after()
            sums = base + half * self.n
            instruction = tcgen05.instruction_descriptor(self.is_fp4, self.group, width)
            for k_block in cutlass.range(0, op.k_blocks, self.blocks, unroll=1):
                self._wait(shared, self.full + slot, parity)
                if cutlass.const_expr(self.group == 2):
                    self._wait(shared, self.peer + slot, parity)
                tcgen05.fence_after()
                if cutlass.const_expr(self.is_fp4):
                    self._multiply_stage(op, shared, base, sums, instruction, slot, parity, other, k_block)
                    other = other ^ 1
                else:
                    other, other_parity = self._multiply_dequantised(
                        op, shared, base, sums, instruction, slot, other, other_parity, k_block
                    )
                self._commit(shared, self.empty + slot)
                slot, parity = self._next(slot, parity, self.stages)
            self._commit(shared, self.sums_full + half)
            half, half_parity = self._next(half, half_parity, 2)
            expert, width = self._receive_width(shared, place, place_parity)

    @cute.jit
    def _receive_width(self, shared, place, parity):
        """Expert and width of the next unit; for one thread, which is its warp's."""
        self._wait(shared, self.unit_full + place, parity)
        expert, width = shared.units[place * 4], shared.units[place * 4 + 3]
        self._arrive_at_leader(shared, self.unit_empty + place)
        return expert, width

    @cute.jit
    def _tell_of_stages(self, op, shared):
        """The peer's thread, which issues no products: tells the leader of each stage that is full here."""
        place, place_parity = Int32(0), Int32(0)
        slot, parity = Int32(0), Int32(0)
        expert, _ = self._receive_width(shared, place, place_parity)
        while expert != _NO_UNIT:
            place, place_parity = self._next(place, place_parity, _UNITS)
            for _ in cutlass.range(0, op.k_blocks, self.blocks, unroll=1):
                self._wait(shared, self.full + slot, parity)
                self._arrive_at_leader(shared, self.peer + slot)
                slot, parity = self._next(slot, parity, self.stages)
            expert, _ = self._receive_width(shared, place, place_parity)

    @cute.jit
    def _multiply_stage(self, op, shared, base, sums, instruction, slot, parity, half, k_block):
        """w4a4: a stage's scales to tensor memory, then its products."""
        # Those two stages ago were the last to read these columns (see the module).
        back, back_parity = slot - 2, parity
        if back < 0:
            back, back_parity = back + self.stages, parity ^ 1
        self._wait(shared, self.empty + back, back_parity)
        tcgen05.fence_after()
        a = shared.weights + slot * self.block_bytes
        b = shared.tokens + slot * self.token_bytes
        a_scales = a + weight_block.CODE_BYTES
        b_scales = shared.token_scales + slot * self.token_scale_bytes
        a_columns = base + self.a_column + half * self.scale_columns
        b_columns = a_columns + 4 * STEPS
        steps = min(op.k_steps - k_block * STEPS, STEPS)
        a, b = tcgen05.operand_descriptor(a), tcgen05.operand_descriptor(b)
        a_scales, b_scales = tcgen05.scale_descriptor(a_scales), tcgen05.scale_descriptor(b_scales)
        for step in cutlass.range_constexpr(STEPS):
            if step < steps:
                atom = step * weight_block.ATOM_BYTES
                tcgen05.copy_scales(self.group, a_columns + 4 * step, tcgen05.moved(a_scales, atom))
                for i in cutlass.range_constexpr(self.atoms):
                    columns = b_columns + 4 * (step * self.atoms + i)
                    source = tcgen05.moved(b_scales, i * weight_block.SCALE_BYTES + atom)
                    tcgen05.copy_scales(self.group, columns, source)
        for step in cutlass.range_constexpr(STEPS):
            if step < steps:
                operands = [tcgen05.moved(descriptor, step * STEP_K // 2) for descriptor in (a, b)]
                scales = a_columns + 4 * step, b_columns + 4 * step * self.atoms
                accumulate = k_block if step == 0 else Int32(1)
                tcgen05.multiply_fp4(self.group, sums, *operands, instruction, *scales, accumulate)

    @cute.jit
    def _multiply_dequantised(self, op, shared, base, sums, instruction, slot, half, parity, k_block):
        """w4a16: the products of a stage's blocks as their weights come."""
        tokens = tcgen05.operand_descriptor(shared.tokens + slot * (self.blocks * self.token_bytes))
        count = self._count(op, k_block)
        for i in cutlass.range_constexpr(self.blocks):
            if i < count:
                self._wait(shared, self.weights_full + half, parity)
                tcgen05.fence_after()
                columns = base + self.a_column + half * _A_COLUMNS
                for step in cutlass.range_constexpr(4):  # 16 values each: 8 columns, 32 bytes
                    tcgen05.multiply_bf16(
                        self.group, sums, columns + 8 * step,
                        tcgen05.moved(tokens, i * self.token_bytes + 32 * step), instruction,
                        k_block if i == 0 and step == 0 else Int32(1),
                    )  # fmt: skip
                self._commit(shared, self.weights_empty + half)
                half, parity = self._next(half, parity, 2)
        return half, parity

    # -- epilogue ---------------------------------------------------------------------------------------------------

    @cute.jit
    def _store_all(self, op, shared, base, tid):
        warp, lane = tid // 32, tid % 32
        place, place_parity = Int32(0), Int32(0)
        half, parity = Int32(0), Int32(0)
        expert, m_block, token_tile, width = self._receive(shared, place, place_parity, lane)
        while expert != _NO_UNIT:
            place, place_parity = self._next(place, place_parity, _UNITS)
            unit = named(expert=expert, m_block=m_block, token_tile=token_tile, width=width)
            self._prepare_rows(op, shared, unit, tid)
            self._wait(shared, self.sums_full + half, parity)
            tcgen05.fence_after()
            if cutlass.const_expr(self.group == 1):
                self._store_unit(op, shared, base + half * self.n + (warp << 21), unit, tid)
            else:
                if m_block < op.m_blocks:
                    self._store_unit(op, shared, base + half * self.n + (warp << 21), unit, tid)
            tcgen05.wait_loads()
            tcgen05.fence_before()
            self._warp_arrives_at_leader(shared, self.sums_empty + half, lane)
            half, parity = self._next(half, parity, 2)
            expert, m_block, token_tile, width = self._receive(shared, place, place_parity, lane)

    def _fragments(self, sums, column, blocks: int):
        """This thread's sums of ``8 * blocks`` columns: what ``outputs.py`` calls ``accumulators``."""
        return [tcgen05.load_fragments(sums + (half * 16 << 16) + column, blocks) for half in range(2)]
