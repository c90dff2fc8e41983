"""The pass over h of w4a4_dynamic on sm_90a: rounds GEMM1's bf16 rows where they are, each with a scale of its own."""

import cutlass
from cutlass import BFloat16, Float32, Int64
import cutlass.cute as cute

from jax_moe.kernels.device import dynamic_rows, epilogue, ptx
from jax_moe.kernels.device.entry import array

_BLOCKS = 4  # of 16 values, in the 128 bytes of a row that lie together


class HRows(dynamic_rows.RowPass):
    """Padded rows of h that are a route's. A warp takes one; the scale of padding is 0.

    The swizzle of h moves 16 bytes within such 128: which of the four blocks is where does not matter here, nor does
    which of its halves comes first.
    """

    @cute.kernel
    def kernel(self, given):
        # GEMM1, in front, has ended, and so has the sort: GEMM2 may start and read the tile map.
        cute.arch.griddepcontrol_launch_dependents()
        row, lane = self._thread()
        if row < array(given.expert_tiles)[given.local_experts] * given.token_tile:
            scale = Float32(0.0)
            if array(given.row_route)[row] >= 0:
                scale = self._round_row(given, row, lane)
            if lane == 0:
                array(given.row_scales)[row] = scale

    @cute.jit
    def _round_row(self, given, row, lane) -> Float32:
        amax = Float32(0.0)
        for block in cutlass.range(lane, given.h_blocks * _BLOCKS, self.spec.row_threads):
            _, values = self._load_block(self._place(given, row, block))
            amax = ptx.maximum(amax, epilogue.amax(values))
        scale = self._scale(amax)
        for block in cutlass.range(lane, given.h_blocks * _BLOCKS, self.spec.row_threads):
            place = self._place(given, row, block)
            loaded, values = self._load_block(place)
            self._store(loaded, epilogue.round_block(values, scale), place)
        return scale

    def _load_block(self, place):
        loaded = cute.make_rmem_tensor(16, BFloat16)
        cute.autovec_copy(place, loaded)
        return loaded, [Float32(loaded[i]) for i in range(16)]

    def _place(self, given, row, block):
        """16 values of a padded row."""
        tile = row // given.token_tile
        segment = Int64(tile * given.h_blocks + block // _BLOCKS) * given.token_tile + row % given.token_tile
        return self._block(given.h, segment * _BLOCKS + block % _BLOCKS)
