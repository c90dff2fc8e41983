"""A kernel that writes down the map of ``device/few_routes.py``, for test_few_routes.py; its class needs the DSL."""

import dataclasses
from typing import ClassVar

try:
    import cutlass
    from cutlass import Int32
    import cutlass.cute as cute
    from cutlass.memory import SmemAllocator

    from jax_moe.kernels.device import entry, few_routes
    from jax_moe.kernels.device.constants import FEW_ROUTES
    from jax_moe.kernels.device.entry import array, named
except ImportError:
    pass


@dataclasses.dataclass(frozen=True)
class Spec:
    """As ``jax_moe.kernels.specs.Spec`` says."""

    token_tile: int

    implementation = "few_routes_kernel:WriteMap"
    parameters: ClassVar[dict[str, str]] = {
        "expert_ids": "i32*", "expert_offset": "i32*", "num_tiles": "i32*", "units": "i32*", "row_route": "i32*",
        "num_routes": "i32", "local_experts": "i32", "m_tiles": "i32",
    }  # fmt: skip
    threads = 128
    cluster = 1
    overlap = False
    tensor_core_ptx = None

    @property
    def name(self) -> str:
        return f"few_routes_n{self.token_tile}"


if "entry" in globals():

    class WriteMap(entry.Kernel):
        @cute.kernel
        def kernel(self, given):
            tid, _, _ = cute.arch.thread_idx()
            warpgroup = cute.arch.make_warp_uniform(tid // FEW_ROUTES)
            tiles = few_routes.allocate(SmemAllocator())
            op = named(
                expert_ids=array(given.expert_ids), expert_offset=array(given.expert_offset),
                num_routes=given.num_routes, local_experts=given.local_experts,
            )  # fmt: skip
            if warpgroup == 0:
                few_routes.make(op, tiles, self.spec.token_tile, 1, tid)
            cute.arch.sync_threads()
            num_tiles, units, row_route = array(given.num_tiles), array(given.units), array(given.row_route)
            if tid == 0:
                num_tiles[0] = tiles.num_tiles[0]
            for work in cutlass.range(tid, tiles.num_tiles[0] * given.m_tiles, self.spec.threads, unroll=1):
                for i, value in enumerate(few_routes.locate(work, given.m_tiles, tiles)):
                    units[3 * work + i] = Int32(value)
            n = self.spec.token_tile
            for row in cutlass.range(tid, tiles.num_tiles[0] * n, self.spec.threads, unroll=1):
                row_route[row] = few_routes.route(tiles, row // n, row % n)
