"""One MoE problem on a GPU for benchmarks/device_gemm.py: cubins loaded and launched on operands made with torch."""

import ctypes
import dataclasses
import json
import types
from typing import Any

from gemm_suites import gemm1, gemm2, specs

import jax_moe
from jax_moe import nvfp4
from jax_moe.kernels import tiling
from jax_moe.kernels.device.constants import WORK_COUNTERS
from jax_moe.kernels.sm90.device import weight_block


class Driver:
    """Loads cubins and launches them on torch's current stream."""

    def __init__(self, folder):
        import torch

        self.torch, self.folder = torch, folder
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.functions = {}
        torch.zeros(1, device="cuda")
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count

    def call(self, name, *arguments):
        code = getattr(self.cuda, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")

    def load(self, name):
        if name not in self.functions:
            entry = self.manifest[name]
            image = (self.folder / entry["file"]).read_bytes()
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(module), image)
            self.call("cuModuleEnumerateFunctions", ctypes.byref(function), 1, module)
            if entry["smem"]:
                self.call("cuFuncSetAttribute", function, 8, entry["smem"])
                self.call("cuFuncSetAttribute", function, 9, 100)
            self.functions[name] = (function, entry)
        return self.functions[name]

    def launch(self, name, grid, *arguments):
        function, entry = self.load(name)
        values = []
        for a in arguments:
            if a is None:
                values.append(ctypes.c_void_p(0))
            elif isinstance(a, int):
                values.append(ctypes.c_int32(a))
            else:
                values.append(ctypes.c_void_p(a.data_ptr()))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        self.call("cuLaunchKernel", function, grid, 1, 1, entry["threads"], 1, 1, entry["smem"], stream, pointers, None)


def tile_map(torch, ids, weights, L, N) -> dict[str, Any]:
    """What sort writes, by torch; ids [T, K] int32, local ones in [0, L)."""
    T, K = ids.shape
    R = T * K
    tiles = tiling.max_tiles(R, L, N)
    flat = ids.flatten().long()
    local = (flat >= 0) & (flat < L)
    key = torch.where(local, flat, torch.full_like(flat, L))
    order = torch.sort(key, stable=True).indices
    counts = torch.bincount(key, minlength=L + 1)[:L]
    tile_counts = (counts + N - 1) // N
    starts = torch.zeros(L + 1 + WORK_COUNTERS, dtype=torch.long, device=ids.device)
    starts[1 : L + 1] = tile_counts.cumsum(0)
    first_row = torch.zeros(L + 1, dtype=torch.long, device=ids.device)
    first_row[1:] = counts.cumsum(0)
    sorted_expert = key[order]
    valid = sorted_expert < L
    order, sorted_expert = order[valid], sorted_expert[valid]
    position = torch.arange(len(order), device=ids.device) - first_row[sorted_expert]
    padded = starts[sorted_expert] * N + position
    num = int(starts[L])
    junk = 0x7FFFFFF0
    row_route = torch.full((tiles * N,), junk, dtype=torch.int32, device=ids.device)
    row_route[: num * N] = -1
    row_route[padded] = order.int()
    row_weight = torch.full((tiles * N,), float("nan"), device=ids.device)
    row_weight[padded] = weights.flatten()[order]
    tile_expert = torch.full((tiles,), junk, dtype=torch.int32, device=ids.device)
    tile_expert[:num] = torch.repeat_interleave(torch.arange(L, device=ids.device), tile_counts).int()
    return dict(
        row_route=row_route, row_weight=row_weight, tile_expert=tile_expert, expert_tiles=starts.int(), tiles=tiles
    )


@dataclasses.dataclass
class Layer:
    """Prepared weights as torch tensors, and the canonical ones' dequantised values for small shapes."""

    L: int
    P: int
    H: int
    inner: int
    gate_up: types.SimpleNamespace
    down: types.SimpleNamespace
    dense: tuple | None


def make_layer(torch, L, P, H, inner, seed, dense, exact=False):
    import jax
    import jax.numpy as jnp

    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def projection(lead, rows, columns):
        codes = jax.random.bits(next(keys), (*lead, rows, columns // 2), jnp.uint8)
        if exact:  # values -2 .. 2 by halves, block scale 1
            codes = nvfp4.pack(
                jax.random.randint(next(keys), (*lead, rows, columns), 0, 5).astype(jnp.uint8)
                | jax.random.bits(next(keys), (*lead, rows, columns), jnp.uint8) & 8
            )
            scales = jnp.ones((*lead, rows, columns // 16), jnp.float8_e4m3fn)
            return jax_moe.Projection(
                codes,
                scales,
                jnp.full(lead, 0.5, jnp.float32),
                jnp.float32(1) if len(lead) == 2 else jnp.ones(lead),
                jnp.round(jax.random.normal(next(keys), (*lead, rows)) * 2),
            )
        scales = jax.random.randint(next(keys), (*lead, rows, columns // 16), 40, 112).astype(jnp.uint8)
        scales = jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
        global_scale = jax.random.uniform(next(keys), lead, jnp.float32, 0.3, 3) / (12 * columns**0.5)
        bias = jax.random.normal(next(keys), (*lead, rows)) * 0.3
        input_scale = (
            jnp.float32(0.002) if len(lead) == 2 else jax.random.uniform(next(keys), lead, jnp.float32, 1e-3, 2e-2)
        )
        return jax_moe.Projection(codes, scales, global_scale, input_scale, bias)

    canonical = jax_moe.Experts(gate_up=projection((L, P), inner, H), down=projection((L,), H, inner))
    prepared = jax_moe.prepare(canonical, "sm_90a", progress=False)

    def to_torch(array):
        return torch.from_dlpack(jnp.asarray(array).block_until_ready()).clone()

    def convert(p):
        return types.SimpleNamespace(
            **{f: to_torch(getattr(p, f)) for f in ("payload", "global_scale", "input_scale", "bias")}
        )

    values = None
    if dense:
        values = tuple(
            to_torch(nvfp4.dequantize(p.payload, p.block_scale)) for p in (canonical.gate_up, canonical.down)
        )
    return Layer(L, P, H, inner, convert(prepared.gate_up), convert(prepared.down), values)


def random_prepared_layer(torch, L, P, H, inner, seed):
    """Prepared weights with random codes and block scales from 2**-6 to 2**3: for timing."""
    g = torch.Generator("cuda").manual_seed(seed)

    def projection(lead, rows, columns):
        row_blocks, k_blocks = -(-rows // weight_block.BLOCK_ROWS), -(-columns // weight_block.BLOCK_K)
        payload = torch.empty((L, row_blocks, k_blocks, weight_block.BLOCK_BYTES), dtype=torch.uint8, device="cuda")
        for e in range(L):
            payload[e].random_(0, 256, generator=g)
            scales = torch.randint(
                16 * 8, 25 * 8, (row_blocks, k_blocks, weight_block.SCALE_BYTES // 4, 4), generator=g, device="cuda"
            )
            word = scales[..., 0] | scales[..., 2] << 8 | scales[..., 1] << 16 | scales[..., 3] << 24
            word = (word << 4 | word >> 28) & 0xFFFFFFFF
            parts = torch.stack([word >> 8 * i & 0xFF for i in range(4)], -1).to(torch.uint8)
            payload[e, ..., weight_block.CODE_BYTES :] = parts.flatten(-2)
        global_scale = torch.full(lead, 0.1 / columns**0.5, device="cuda")
        input_scale = torch.full(() if len(lead) == 2 else lead, 0.002, device="cuda")
        return types.SimpleNamespace(payload=payload, global_scale=global_scale, input_scale=input_scale, bias=None)

    return Layer(L, P, H, inner, projection((L, P), P * inner, H), projection((L,), H, inner), None)


def quantise(values, scale):
    """NVFP4 rounding without the global scale of a torch tensor, by the library's own numerics."""
    import jax.numpy as jnp
    import torch

    rows = -(-values.shape[0] // 64) * 64  # few shapes, few compilations
    padded = torch.nn.functional.pad(values, (0, 0, 0, rows - values.shape[0]))
    rounded = nvfp4.quantize_dequantize(
        jnp.from_dlpack(padded), jnp.float32(float(scale))
    )  # not under jit: see notes-h200.md
    return torch.from_dlpack(rounded.block_until_ready())[: values.shape[0]].clone()


class Op:
    """GEMM1, GEMM2 (and combine) of one problem: operands, workspaces and launches."""

    def __init__(self, driver, layer, x, ids, weights, tile, precision, activation, bias, combine, out):
        torch = driver.torch
        self.driver, self.layer, self.x, self.ids, self.combine = driver, layer, x, ids, combine
        self.T, self.K = ids.shape
        self.N = tile.token_tile
        self.map = tile_map(torch, ids, weights, layer.L, self.N)
        gated = layer.P == 2
        self.I_blocks = layer.gate_up.payload.shape[1] * (1 if gated else 2)
        self.h = torch.full(
            (self.map["tiles"], self.I_blocks, self.N, 64), float("nan"), dtype=torch.bfloat16, device="cuda"
        )
        dtype = torch.bfloat16 if out == "bfloat16" else torch.float32
        self.out = torch.full((self.T, layer.H), float("nan"), dtype=dtype, device="cuda")
        self.contributions = None
        if combine == "ordered":
            self.contributions = torch.full((self.T * self.K, layer.H), float("nan"), device="cuda")
        self.s1, self.s2 = gemm1(tile, precision, activation, bias), gemm2(tile, precision, bias, combine, out)
        self.s3 = specs.CombineSpec(out)
        self.w4a4, self.bias = precision == "w4a4", bias
        self.x_rows = quantise(x, layer.gate_up.input_scale) if self.w4a4 and layer.dense else x
        self.offset = torch.zeros(1, dtype=torch.int32, device="cuda")

    def _launch(self, spec, grid, **arguments):
        self.driver.launch(spec.name, grid, *(arguments[name] for name in spec.parameters))

    def _launch_gemm(self, spec, projection, **arguments):
        tiles, layer = self.map, self.layer
        tiles["expert_tiles"][layer.L + 1 :].zero_()  # the work counters; the sort's work, about 1 us
        self._launch(
            spec, self.driver.sms * spec.config.ctas_per_sm,
            **{name: tiles[name] for name in ("row_route", "row_weight", "tile_expert", "expert_tiles")},
            payload=projection.payload, global_scale=projection.global_scale,
            input_scale=projection.input_scale if self.w4a4 else None, bias=projection.bias if self.bias else None,
            m_blocks=projection.payload.shape[1], k_blocks=projection.payload.shape[2],
            hidden_size=layer.H, local_experts=layer.L, h=self.h, **arguments,
        )  # fmt: skip

    def run1(self):
        scale = self.layer.down.input_scale if self.w4a4 else None
        self._launch_gemm(
            self.s1, self.layer.gate_up, x=self.x_rows, down_input_scale=scale, row_divisor=self.K
        )  # fmt: skip

    def run2(self):
        target, divisor = (self.out, self.K) if self.combine == "atomic" else (self.contributions, 1)
        self._launch_gemm(self.s2, self.layer.down, out=target, row_divisor=divisor, h_blocks=self.I_blocks)

    def run3(self):
        self._launch(
            self.s3, self.s3.grid(self.T, self.layer.H), contributions=self.contributions, expert_ids=self.ids,
            expert_offset=self.offset, out=self.out, num_tokens=self.T, top_k=self.K, hidden_size=self.layer.H,
            local_experts=self.layer.L,
        )  # fmt: skip

    def run(self):
        if self.combine == "atomic":
            self.out.zero_()
        self.run1()
        self.run2()
        if self.combine == "ordered":
            self.run3()
