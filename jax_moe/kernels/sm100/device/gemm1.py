"""GEMM1 of sm_100f: x rows, gathered by route, times gate and up -> the activated intermediate."""

import cutlass
from cutlass import Int32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device import epilogue, outputs, ptx
from jax_moe.kernels.sm100.device import mainloop, weight_block
from jax_moe.kernels.sm100.device.mainloop import GATHER_WARPS
from jax_moe.kernels.sm100.device.weight_block import (
    ATOM_BYTES,
    BLOCK_K,
    ROW_BYTES,
    SCALE_BYTES,
    STEP_K,
    STEPS,
    swizzled,
)

_CHUNKS = 8  # threads that copy a token row of 128 bytes, 16 bytes each
_PASS_ROWS = GATHER_WARPS * 32 // _CHUNKS
_PASSES = 4  # in one go: 32 rows, a column of words in a scale atom


class Gemm1(mainloop.Gemm):
    """Gathers x by route, multiplies with gate and up, and stores the activated (w4a4: quantised) intermediate."""

    arrays = ("row_route", "tile_expert", "expert_tiles", "global_scale", "input_scale", "bias", "down_input_scale")
    counter = 0
    early_weights = False  # the sort says which

    def __init__(self, spec):
        super().__init__(spec)
        self.copies_in_flight = self.stages // 2  # the other half is for the products to draw on

    def _gather_warps(self):
        return GATHER_WARPS

    def _allocate_rows(self, smem):
        return None

    # -- loads ------------------------------------------------------------------------------------------------------

    def _token_bytes_loaded(self, unit):
        return 0

    def _copy_tokens(self, op, shared, slot, unit, k_block):
        pass

    @cute.jit
    def _gather_all(self, op, shared, tid):
        """Token rows, 8 threads each; w4a4: also their scales, a thread of four copying one step's."""
        chunk, first_row, lane = tid % _CHUNKS, tid // _CHUNKS, tid % 32
        passes, own_passes = self.n // _PASS_ROWS, self.n // self.group // _PASS_ROWS
        # Where this thread's chunk, or word of scales, of each row begins in a row of blocks; -1: nowhere.
        chunks = cute.make_rmem_tensor(own_passes, Int32)
        words = cute.make_rmem_tensor(passes, Int32)  # of a pair both CTAs need the scales of all rows
        stride = op.hidden_size // 8  # of x, in chunks
        if cutlass.const_expr(self.is_fp4):
            stride = _padded(op.hidden_size) // 32
        place, place_parity = Int32(0), Int32(0)
        slot, parity = Int32(0), Int32(1)
        announced, in_flight = Int32(0), Int32(0)
        expert, _, token_tile, width = self._receive(shared, place, place_parity, lane)
        while expert != mainloop._NO_UNIT:
            place, place_parity = self._next(place, place_parity, mainloop._UNITS)
            own_width = width // self.group
            first = token_tile * self.n + first_row
            for i in cutlass.range_constexpr(own_passes):
                row = self._row(op, first + shared.rank * own_width, i * _PASS_ROWS, own_width)
                chunks[i] = _or_none(row, row * stride + chunk)
                if cutlass.const_expr(self.is_fp4 and self.group == 1):
                    words[i] = _or_none(row, row * (stride // 2) + chunk)
            if cutlass.const_expr(self.is_fp4 and self.group == 2):
                for i in cutlass.range_constexpr(passes):
                    row = self._row(op, first, i * _PASS_ROWS, width)
                    words[i] = _or_none(row, row * (stride // 2) + chunk)
            for k_block in cutlass.range(0, op.k_blocks, self.blocks, unroll=1):
                self._wait(shared, self.empty + slot, parity)
                for some in cutlass.range_constexpr(0, own_passes, _PASSES):
                    if some * _PASS_ROWS < own_width:
                        chosen = [chunks[i] for i in range(some, min(some + _PASSES, own_passes))]
                        self._gather(op, shared, slot, k_block, chosen, some, first_row, chunk)
                if cutlass.const_expr(self.is_fp4):
                    for some in cutlass.range_constexpr(0, passes, _PASSES):
                        if some * _PASS_ROWS < width and chunk < STEPS:
                            chosen = [words[i] for i in range(some, min(some + _PASSES, passes))]
                            self._gather_scales(op, shared, slot, k_block, chosen, some, first_row, chunk)
                cute.arch.cp_async_commit_group()
                in_flight = in_flight + 1
                if in_flight > self.copies_in_flight:
                    cute.arch.cp_async_wait_group(self.copies_in_flight)
                    announced = self._announce(shared, announced, lane)
                    in_flight = in_flight - 1
                slot, parity = self._next(slot, parity, self.stages)
            expert, _, token_tile, width = self._receive(shared, place, place_parity, lane)
        cute.arch.cp_async_wait_group(0)
        for _ in cutlass.range(in_flight, unroll=1):
            announced = self._announce(shared, announced, lane)

    @cute.jit
    def _row(self, op, first, row: cutlass.Constexpr, width):
        """Of x, for row ``first + row`` of the tile map; -1 if it has none, or is behind ``width``."""
        found = Int32(-1)
        if row < width:
            route = op.row_route[first + row]
            if route >= 0:
                found = route // op.row_divisor
        return found

    @cute.jit
    def _announce(self, shared, slot, lane):
        """Tells that this warp's part of a stage has arrived; returns the next slot."""
        # cp.async writes through the generic proxy, the tensor cores read through the async one.
        cute.arch.fence_view_async_shared()
        self._warp_arrives(shared, self.full + slot, lane)
        slot = slot + 1
        if slot == self.stages:
            slot = Int32(0)
        return slot

    @cute.jit
    def _gather(self, op, shared, slot, k_block, chunks, first: cutlass.Constexpr, first_row, chunk):
        """Some passes of a stage, from pass ``first`` on; zeros where there is no row."""
        place = shared.tokens + slot * (self.blocks * self.token_bytes) + first * _PASS_ROWS * ROW_BYTES
        place = place + swizzled(first_row, chunk)
        if cutlass.const_expr(self.is_fp4):
            source = Int64(op.x.toint()) + Int64(k_block) * ROW_BYTES
            ptx.gather_rows(place, source, chunks, Int32(0), Int32(1), _PASS_ROWS * ROW_BYTES)
        else:
            for i in cutlass.range(self._count(op, k_block), unroll=1):
                block = k_block + i
                source = Int64(op.x.toint()) + Int64(block) * ROW_BYTES
                column = block * STEP_K + chunk * 8
                ptx.gather_rows(place, source, chunks, column, op.hidden_size, _PASS_ROWS * ROW_BYTES)
                place = place + self.token_bytes

    @cute.jit
    def _gather_scales(self, op, shared, slot, k_block, words, first: cutlass.Constexpr, first_row, step):
        """The scales of one step of some passes' rows: words of an atom."""
        place = shared.token_scales + slot * self.token_scale_bytes + step * ATOM_BYTES + first_row * 16
        place = place + first // 16 * SCALE_BYTES + first // _PASSES % 4 * 4
        source = Int64(op.x_scales.toint()) + Int64(k_block) * (BLOCK_K // 16)
        ptx.gather_words(place, source, words, _PASS_ROWS * 16)

    # -- epilogue ---------------------------------------------------------------------------------------------------

    def _prepare_rows(self, op, shared, unit, tid):
        pass

    @cute.jit
    def _store_unit(self, op, shared, sums, unit, tid):
        warp, group, quad = tid // 32, tid % 32 // 4, tid % 4
        made = outputs.intermediate(op, self.spec, unit.expert, unit.m_block, warp, group, self.unscale)
        whole = unit.width // 32 * 32
        if cutlass.const_expr(self.n >= 32):
            for column in cutlass.range(0, whole, 32, unroll=1):
                self._store_columns(op, made, sums, unit, column, group, quad, 4)
        for column in cutlass.range(whole, unit.width, 8, unroll=1):
            self._store_columns(op, made, sums, unit, column, group, quad, 1)

    def _store_columns(self, op, made, sums, unit, column, group, quad, blocks):
        fragments = self._fragments(sums, column, blocks)
        # The 16 neighbours of an NVFP4 block are in 8 lanes (4 without a gate). These take as many tokens at a time,
        # so that each lane computes one block's scale, by two slow divisions, and not each lane every block's.
        lanes = 8 if self.spec.gated else 4
        columns = [(j, c) for j in range(blocks) for c in range(2)]
        for first in range(0, len(columns), lanes):
            some = columns[first : first + lanes]
            values = [outputs.activated(self.spec, made, fragments, j, c) for j, c in some]
            rows = [column + 8 * j + 2 * quad + c for j, c in some]
            if self.is_fp4:
                self._store_fp4(op, made, unit, rows, values, group % lanes, group, lanes)
            else:
                for row, some_values in zip(rows, values, strict=True):
                    self._store_bf16(op, made, unit, row, some_values)

    def _store_bf16(self, op, made, unit, row, values):
        tile = Int64(op.h.toint()) + (Int64(unit.token_tile) * op.h_blocks + made.block) * (self.tile_bytes)
        byte = made.value % STEP_K * 2
        words = [ptx.pack_bf16x2(values[2 * i], values[2 * i + 1]) for i in range(len(values) // 2)]
        ptx.store_global(tile + Int64(swizzled(row, byte // 16) + byte % 16), words)

    def _store_fp4(self, op, made, unit, rows, values, lane, group, lanes):
        """Codes and scales of some tokens, as GEMM2's stages have them."""
        tile = Int64(unit.token_tile) * op.h_blocks + made.block // STEPS
        tile = Int64(op.h.toint()) + tile * (self.tile_bytes + self.token_scale_bytes)
        step, value = made.block % STEPS, made.value % STEP_K
        codes, scale = epilogue.quantise_blocks(values, made.next_scale, lane, lanes, 4)
        byte = step * (STEP_K // 2) + value // 2
        for row, code in zip(rows, codes, strict=True):
            ptx.store_global_bytes(tile + Int64(swizzled(row, byte // 16) + byte % 16), code, len(values[0]) // 2)
        # Each lane has one token's scale, or where there are fewer tokens than lanes, some have the same.
        share = lanes // len(rows)
        mine = lane // share
        row = rows[0] + 8 * (mine // 2) + mine % 2
        atom = weight_block.ATOM_BYTES * step + weight_block.atom_word(row % 128) + row // 128 * SCALE_BYTES
        self._store_scale(tile + Int64(self.tile_bytes + atom + value // 16), scale, lane, share)

    @cute.jit
    def _store_scale(self, address, scale, lane, share: cutlass.Constexpr):
        if lane % share == 0:
            ptx.store_global_bytes(address, scale, 1)


def _padded(hidden_size):
    """Values of a row of x, as it is quantised."""
    return (hidden_size + BLOCK_K - 1) // BLOCK_K * BLOCK_K


@cute.jit
def _or_none(row: Int32, offset: Int32) -> Int32:
    result = offset
    if row < 0:
        result = Int32(-1)
    return result
