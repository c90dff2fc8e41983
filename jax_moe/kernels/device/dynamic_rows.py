"""w4a4_dynamic: rows that are rounded to NVFP4 with a scale of their own, which is written beside them.

``spec.row_threads`` threads, whole warps, take a row: they read it once to find its largest magnitude, and again, from
a cache, to round it. A thread takes one block of 16 values at a time, 32 bytes in and 32 bytes out.
"""

import cutlass
from cutlass import Float32
import cutlass.cute as cute

from jax_moe.kernels.device import epilogue, ptx, x_rows
from jax_moe.kernels.device.entry import array

_WARP = 32


class RowPass(x_rows.Pass):
    """What passes over rows share."""

    def _thread(self):
        """Number of the row that this thread works on, and its place among the threads that do."""
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        rows = self.spec.threads // self.spec.row_threads
        return cta * rows + tid // self.spec.row_threads, tid % self.spec.row_threads

    @cute.jit
    def _scale(self, amax: Float32) -> Float32:
        """The row's scale, of the largest magnitudes that its threads have found."""
        for distance in (16, 8, 4, 2, 1):
            amax = ptx.maximum(amax, cute.arch.shuffle_sync_bfly(amax, distance))
        warps = self.spec.row_threads // _WARP
        if cutlass.const_expr(warps > 1):  # a CTA of one row
            tid, _, _ = cute.arch.thread_idx()
            smem = cutlass.memory.SmemAllocator()
            amaxes = cute.make_tensor(smem.allocate_array(Float32, warps), cute.make_layout(warps))
            if tid % _WARP == 0:
                amaxes[tid // _WARP] = amax
            cute.arch.sync_threads()
            for warp in cutlass.range_constexpr(warps):
                amax = ptx.maximum(amax, amaxes[warp])
        return epilogue.row_scale(amax)

    def _store(self, loaded, values, target):
        for i in range(len(values)):
            loaded[i] = cutlass.BFloat16(values[i])
        cute.autovec_copy(loaded, target)


class XRows(RowPass):
    """The rows of x, weighted as the spec says. A CTA takes one."""

    @cute.kernel
    def kernel(self, given):
        row, thread = self._thread()
        amax = Float32(0.0)
        for column in cutlass.range(thread, given.row_blocks, self.spec.row_threads):
            _, values = self._load(given, row, column)
            amax = ptx.maximum(amax, epilogue.amax(values))
        scale = self._scale(amax)
        for column in cutlass.range(thread, given.row_blocks, self.spec.row_threads):
            loaded, values = self._load(given, row, column)
            values = epilogue.round_block(values, scale)
            self._store(loaded, values, self._block(given.x_rows, row * given.row_blocks + column))
        if thread == 0:
            array(given.row_scales)[row] = scale
