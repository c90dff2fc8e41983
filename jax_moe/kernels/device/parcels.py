"""Parcels, in which tokens travel (``jax_moe/parcels.py``): the kernel that makes them, and the pass over x of them."""

from cutlass import BFloat16, Float32, Int64, Uint32
import cutlass.cute as cute

from jax_moe.kernels.device import entry, epilogue, ptx
from jax_moe.kernels.device.entry import array

_BLOCK = 16  # as nvfp4.BLOCK_SIZE, which is host code


def _padded(row_blocks):
    """Blocks of a parcel with the zeros that make it a multiple of 8 bytes: scales are what they are counted in."""
    return (row_blocks + 7) // 8 * 8


class _Pass(entry.Kernel):
    """``row_blocks``: H / 16."""

    def _place(self):
        """Index of this thread."""
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        return cta * self.spec.threads + tid

    def _codes(self, given, base: cute.Pointer, row):
        """Address of the codes in the parcel of a row, behind its routing."""
        num_bytes = 8 * (given.top_k + given.row_blocks) + _padded(given.row_blocks)
        return Int64(base.toint()) + Int64(row) * num_bytes + 8 * given.top_k


class Parcels(_Pass):
    """x and its routing -> parcels. A thread takes a block of 16 values; behind a token's, each of K takes a route."""

    @cute.kernel
    def kernel(self, given):
        index = self._place()
        padded = _padded(given.row_blocks)
        row_threads = padded + given.top_k
        if index < given.num_tokens * row_threads:
            row = index // row_threads
            column = index - row * row_threads
            codes = self._codes(given, given.out, row)
            if column < padded:
                scale = Uint32(0)
                if column < given.row_blocks:
                    low, high, scale = self._quantised(given, row * given.row_blocks + column)
                    ptx.store_global(codes + 8 * column, (low, high))
                ptx.store_global_bytes(codes + 8 * given.row_blocks + column, scale, 1)
            else:
                slot = column - padded
                route = row * given.top_k + slot
                ids = codes - 8 * given.top_k
                ptx.store_global(ids + 4 * slot, (Uint32(array(given.expert_ids)[route]),))
                weight = ptx.bits(array(given.routing_weights)[route])
                ptx.store_global(ids + 4 * (given.top_k + slot), (weight,))

    def _quantised(self, given, block):
        source = cute.make_tensor((given.x + Int64(block) * _BLOCK).align(16), cute.make_layout(_BLOCK))
        loaded = cute.make_rmem_tensor(_BLOCK, BFloat16)
        cute.autovec_copy(source, loaded)
        values = [Float32(loaded[i]) for i in range(_BLOCK)]
        return epilogue.quantise_block(values, array(given.input_scale)[0], anywhere=True)


class ParcelRows(_Pass):
    """Parcels -> x as bf16, code * block scale. A thread takes 8 values, so that neighbours store without gaps."""

    @cute.kernel
    def kernel(self, given):
        index = self._place()
        row_threads = 2 * given.row_blocks
        if index < given.num_rows * row_threads:
            row = index // row_threads
            column = index - row * row_threads
            codes = self._codes(given, given.x, row)
            word = ptx.load_global(codes + 4 * column, 4)
            scale = ptx.from_e4m3(ptx.load_global(codes + 8 * given.row_blocks + column // 2, 1))
            values = epilogue.values_of_codes(word, scale)
            pairs = [ptx.pack_bf16x2(values[i], values[i + 1]) for i in range(0, 8, 2)]
            ptx.store_global(Int64(given.x_rows.toint()) + Int64(index) * 16, pairs)
