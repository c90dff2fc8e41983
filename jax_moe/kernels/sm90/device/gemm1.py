"""GEMM1 of sm_90a: x rows, gathered by route, times gate and up -> the activated intermediate."""

import cutlass
from cutlass import Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device import bf16_weights, epilogue, outputs, ptx
from jax_moe.kernels.sm90.device import mainloop
from jax_moe.kernels.sm90.device.mainloop import NEXT_UNIT, TOKEN_ROW_BYTES, WARPGROUP
from jax_moe.kernels.sm90.device.weight_block import BLOCK_K

_CHUNK_BYTES = 16
_CHUNKS = TOKEN_ROW_BYTES // _CHUNK_BYTES
_ROWS_PER_PASS = WARPGROUP // _CHUNKS


class Gemm1(mainloop.Gemm):
    """Gathers x by route, multiplies with gate and up, and stores the activated (w4a4: NVFP4-rounded) intermediate."""

    arrays = (
        *mainloop.TILE_MAP, "global_scale", "input_scale", "bias", "down_input_scale",
    )  # fmt: skip

    def __init__(self, spec):
        super().__init__(spec)
        self.copies_in_flight = self.stages // 2  # the other half is for consumers to draw on

    def _full_arrivals(self):
        return 1 + 4  # the thread that announces the weights, and each warp for its token rows

    def _allocate_rows(self, smem):
        return None

    def _prefetch_epilogue(self, op, unit, tid):
        return None

    @cute.jit
    def _produce(self, op, shared, tid):
        """Weights by bulk copies of one thread, token rows by cp.async of all: 8 threads a row, 16 bytes each."""
        index, ctas = self._first_unit()
        first_k, end = self._part(op)
        chunk = tid % _CHUNKS
        # All 16 rows of a pass are of one block, or, where a tile has 8 rows, of two.
        blocks_per_pass = max(1, _ROWS_PER_PASS // self.n)
        passes = (self.n + _ROWS_PER_PASS - 1) // _ROWS_PER_PASS
        full_passes = passes if self.n % _ROWS_PER_PASS == 0 or passes == 1 else passes - 1
        pass_bytes = _ROWS_PER_PASS * TOKEN_ROW_BYTES
        first_row = tid // _CHUNKS % self.n
        first_block = tid // _CHUNKS // self.n
        if cutlass.const_expr(blocks_per_pass == 1):
            first_row, first_block = tid // _CHUNKS, Int32(0)
        swizzled = first_row * TOKEN_ROW_BYTES + (chunk ^ (first_row % 8)) * _CHUNK_BYTES
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
                taken = self._take(op, index, 0, ctas)
            for i in cutlass.range_constexpr(passes):
                row = first_row + i * _ROWS_PER_PASS
                route = Int32(-1)
                if row < self.n:
                    route = self._route(op, unit.token_tile, row)
                offset = Int32(-1)
                if route >= 0:
                    offset = (route // op.row_divisor) * (op.hidden_size // 8) + chunk  # in units of 16 bytes
                offsets[i] = offset
            for k_block in cutlass.range(first_k, end, self.blocks, unroll=1):
                cute.arch.mbarrier_wait(shared.barriers + self.stages + slot, phase)
                if tid == 0:
                    if k_block == first_k:
                        self._tell(shared, slot, (unit.expert, unit.m_tile, unit.token_tile, self._width(op, unit)))
                    count = min(end - k_block, self.blocks)
                    self._copy_weights(op, shared, slot, unit, k_block, count, 0)
                for j in cutlass.range_constexpr((self.blocks + blocks_per_pass - 1) // blocks_per_pass):
                    block = first_block + j * blocks_per_pass
                    place = target + (slot * self.blocks + block) * self.token_bytes
                    source = Int64(op.x.toint()) + Int64(k_block + block) * TOKEN_ROW_BYTES
                    column = (k_block + block) * BLOCK_K + chunk * 8
                    rows = [offsets[i] for i in range(full_passes)]
                    if block < self.blocks:
                        ptx.gather_rows(place, source, rows, column, op.hidden_size, pass_bytes)
                        if cutlass.const_expr(passes > full_passes):
                            place = place + full_passes * pass_bytes
                            if first_row < self.n - full_passes * _ROWS_PER_PASS:
                                ptx.gather_rows(
                                    place, source, [offsets[full_passes]], column, op.hidden_size, pass_bytes
                                )
                cute.arch.cp_async_commit_group()
                in_flight = in_flight + 1
                if in_flight > self.copies_in_flight:
                    cute.arch.cp_async_wait_group(self.copies_in_flight)
                    announced = self._announce(shared, announced, tid)
                    in_flight = in_flight - 1
                slot, phase = self._next(slot, phase)
            if tid == 0:
                shared.next_unit[parity] = taken
            cute.arch.barrier(barrier_id=NEXT_UNIT, number_of_threads=WARPGROUP)
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
        row_block = unit.m_tile * self.config.m_warpgroups + me.m_warpgroup
        if row_block < op.m_blocks:
            self._store(op, me, unit, row_block, accumulators, width)

    def _store(self, op, me, unit, row_block, accumulators, width):
        spec = self.spec
        warp, group, quad = me.tid // 32, me.tid % 32 // 4, me.tid % 4
        unscale = 2.0**-bf16_weights.WEIGHT_LOG2
        made = outputs.intermediate(op, spec, unit.expert, row_block, warp, group, unscale)
        column = made.value % BLOCK_K
        chunk, within = column // 8, column % 8 * 2
        tile_address = Int64(op.h.toint()) + (Int64(unit.token_tile) * made.num_blocks + made.block) * self.token_bytes

        def store(j, c, values):
            words = [ptx.pack_bf16x2(values[2 * i], values[2 * i + 1]) for i in range(len(values) // 2)]
            row = 2 * quad + c  # modulo 8, which is all that the swizzle looks at
            address = tile_address + Int64((row + 8 * j) * TOKEN_ROW_BYTES + (chunk ^ row) * 16 + within)
            ptx.store_global(address, words)

        # The 16 neighbours of an NVFP4 block are in 8 lanes (4 without a gate). These take as many tokens at a time,
        # so that each lane computes one block's scale, by two slow divisions, and not each lane every block's.
        lanes = 8 if spec.gated else 4
        columns = [(j, c) for j in range(width // 8) for c in range(2)]
        for first in range(0, len(columns), lanes):
            some = columns[first : first + lanes]
            values = [outputs.activated(spec, made, accumulators, j, c) for j, c in some]
            if spec.precision == "w4a4":
                values = epilogue.round_blocks(values, made.next_scale, group % lanes, lanes, 4)
            for (j, c), row in zip(some, values, strict=True):
                store(j, c, row)
