"""The sm_90a GEMM kernels alone, as cubins: checked against an fp32 oracle and timed variant by variant.

Two steps, because the machine with the GPU may have no compiler and the one with the compiler no GPU:

    python benchmarks/device_gemm.py build DIR SUITE...     # needs nvidia-cutlass-dsl, no GPU
    python benchmarks/device_gemm.py run DIR SUITE...       # needs torch, jax and an sm_90 GPU

A suite is "check" or a model of jax_moe.shapes. ``run`` prints a table and leaves results.json in $OUT (or DIR).
Times are CUDA graph replays; every call of a graph has a routing of its own, outputs are poisoned before each check.
"""

import ctypes
import dataclasses
import importlib
import json
import math
import os
import pathlib
import sys
import types

INF = math.inf
ROOT = pathlib.Path(__file__).resolve().parent.parent


def _import_without_library(name):
    """Modules of jax_moe without its __init__, which wants the compiled FFI library."""
    if "jax_moe" not in sys.modules:
        package = types.ModuleType("jax_moe")
        package.__path__ = [str(ROOT / "jax_moe")]
        sys.modules["jax_moe"] = package
    return importlib.import_module(name)


plan = _import_without_library("jax_moe.kernels.sm90.plan")

SHAPES = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "deepseek-r1-ep8": (32, 8, 7168, 2048),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "gpt-oss-120b": (128, 4, 2880, 2880),
}


def tile(text):
    """A tile by name: n8m1k2b4c1, or with a limit of stages n8m1k2b4c1s5."""
    import re

    found = re.fullmatch(r"n(\d+)m(\d+)k(\d+)b(\d+)c(\d+)(?:s(\d+))?", text)
    if found is None:
        raise SystemExit(f"{text}: not a tile such as n8m1k2b4c1 or n8m1k2b4c1s5")
    return plan.with_most_stages(*(int(number) for number in found.groups() if number))


CHECK_TILES = ["n8m1k2b2c1", "n8m1k1b4c2", "n16m1k4b4c1", "n48m1k1b2c2", "n80m2k1b2c1", "n128m2k1b1c1", "n24m1k4b4c1"]
ACTIVATIONS = [
    ("swiglu", 1.0, 0.0, INF),
    ("swiglu", 1.702, 1.0, 0.75),
    ("geglu", 0.0, 0.0, INF),
    ("relu2", 0.0, 0.0, INF),
    ("situ", 0.0, 4.0, 25.0),
]
CASES = [
    (t, precision, activation, bias, combine, out)
    for i, t in enumerate(CHECK_TILES)
    for precision, activation, bias, combine, out in [
        ("w4a16", ACTIVATIONS[0], False, "ordered", "float32"),
        ("w4a16", ACTIVATIONS[1], True, "atomic", "float32"),
        ("w4a4", ACTIVATIONS[(2, 0)[i % 2]], i % 2 == 0, "atomic", "bfloat16"),
        ("w4a4", ACTIVATIONS[2 + i % 2], i % 2 == 1, "ordered", "bfloat16"),
        ("w4a16", ACTIVATIONS[(3, 4)[i % 2]], False, "ordered", "float32"),
    ]
]
TIMED = {1: ["auto"], 8: ["auto"], 32: ["auto"], 128: ["auto"], 512: ["auto"], 2048: ["auto"], 8192: ["auto"]}
"""T: the tiles to time, "auto" being what plan.py picks."""


MODES = [("w4a16", "atomic"), ("w4a4", "atomic"), ("w4a16", "ordered")]  # only the first for other tiles than the first


def resolve(text, model, T):
    """The tile of "auto" for T tokens of a model."""
    if text != "auto":
        return tile(text)
    E, K, _, _ = SHAPES[model]
    return plan.best_tile(T * K, E)


def gemm1(t, precision, activation, bias):
    return plan.Gemm1Spec(t, precision, *activation, bias)


def gemm2(t, precision, bias, combine, out):
    return plan.Gemm2Spec(t, precision, combine, out if combine == "atomic" else "float32", bias)


def suite_specs(suite):
    specs = []
    if suite == "check":
        for t, precision, activation, bias, combine, out in CASES:
            specs += [gemm1(tile(t), precision, activation, bias), gemm2(tile(t), precision, bias, combine, out)]
    else:
        for T, variants in TIMED.items():
            for number, text in enumerate(variants):
                t = resolve(text, suite, T)
                for precision, combine in MODES[: 1 if number else None]:
                    specs.append(gemm1(t, precision, ACTIVATIONS[0], False))
                    specs.append(gemm2(t, precision, False, combine, "bfloat16"))
    specs += [plan.CombineSpec("bfloat16"), plan.CombineSpec("float32")]
    return list(dict.fromkeys(specs))


def build(folder, suites):
    os.environ["CUTE_DSL_ARCH"] = "sm_90a"
    dump = folder / "dump"
    dump.mkdir(parents=True, exist_ok=True)
    os.environ["CUTE_DSL_KEEP"], os.environ["CUTE_DSL_DUMP_DIR"] = "cubin", str(dump)
    import cutlass.cute as cute

    manifest_path = folder / "manifest.json"
    manifest = {}
    for suite in suites:
        for spec in suite_specs(suite):
            if spec.name in manifest:
                continue
            function, arguments = spec.entry()
            cute.compile(function, *arguments)
            (cubin,) = dump.glob("*.cubin")
            target = folder / f"{len(manifest)}.cubin"
            cubin.replace(target)
            tile = getattr(spec, "tile", None)
            manifest[spec.name] = {
                "file": target.name,
                "threads": spec.threads,
                "smem": tile.shared_bytes if tile else 0,
            }
    manifest_path.write_text(json.dumps(manifest))
    dump.rmdir()
    print(len(manifest), "kernels", sum(f.stat().st_size for f in folder.iterdir()) / 1e6, "MB")


# -- on the device -----------------------------------------------------------------------------------------------------


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


def tile_map(torch, ids, weights, L, N, poison=True):
    """What sort writes, by torch; ids [T, K] int32, local ones in [0, L)."""
    T, K = ids.shape
    R = T * K
    tiles = plan.max_tiles(R, L, N)
    flat = ids.flatten().long()
    local = (flat >= 0) & (flat < L)
    key = torch.where(local, flat, torch.full_like(flat, L))
    order = torch.sort(key, stable=True).indices
    counts = torch.bincount(key, minlength=L + 1)[:L]
    tile_counts = (counts + N - 1) // N
    starts = torch.zeros(L + 1, dtype=torch.long, device=ids.device)
    starts[1:] = tile_counts.cumsum(0)
    first_row = torch.zeros(L + 1, dtype=torch.long, device=ids.device)
    first_row[1:] = counts.cumsum(0)
    sorted_expert = key[order]
    valid = sorted_expert < L
    order, sorted_expert = order[valid], sorted_expert[valid]
    position = torch.arange(len(order), device=ids.device) - first_row[sorted_expert]
    padded = starts[sorted_expert] * N + position
    num = int(starts[-1])
    junk = 0x7FFFFFF0 if poison else 0
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

    nvfp4 = _import_without_library("jax_moe.nvfp4")
    experts = _import_without_library("jax_moe.experts")
    preparation = _import_without_library("jax_moe.prepare")
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def projection(lead, rows, columns):
        codes = jax.random.bits(next(keys), (*lead, rows, columns // 2), jnp.uint8)
        if exact:  # values -2 .. 2 by halves, block scale 1
            codes = nvfp4.pack(
                jax.random.randint(next(keys), (*lead, rows, columns), 0, 5).astype(jnp.uint8)
                | jax.random.bits(next(keys), (*lead, rows, columns), jnp.uint8) & 8
            )
            scales = jnp.ones((*lead, rows, columns // 16), jnp.float8_e4m3fn)
            return experts.Projection(
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
        return experts.Projection(codes, scales, global_scale, input_scale, bias)

    canonical = experts.Experts(gate_up=projection((L, P), inner, H), down=projection((L,), H, inner))
    prepared = preparation.prepare(canonical, "sm_90a", progress=False)

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
    """Prepared weights with random codes and block scales from 2**-6 to 2**3: for timing, no jax needed."""
    layout = _import_without_library("jax_moe.kernels.sm90.layout")
    g = torch.Generator("cuda").manual_seed(seed)

    def projection(lead, rows, columns):
        row_blocks, k_blocks = -(-rows // layout.BLOCK_ROWS), -(-columns // layout.BLOCK_K)
        payload = torch.empty((L, row_blocks, k_blocks, layout.BLOCK_BYTES), dtype=torch.uint8, device="cuda")
        for e in range(L):
            payload[e].random_(0, 256, generator=g)
            scales = torch.randint(
                16 * 8, 25 * 8, (row_blocks, k_blocks, layout.SCALE_BYTES // 4, 4), generator=g, device="cuda"
            )
            word = scales[..., 0] | scales[..., 2] << 8 | scales[..., 1] << 16 | scales[..., 3] << 24
            word = (word << 4 | word >> 28) & 0xFFFFFFFF
            parts = torch.stack([word >> 8 * i & 0xFF for i in range(4)], -1).to(torch.uint8)
            payload[e, ..., layout.CODE_BYTES :] = parts.flatten(-2)
        global_scale = torch.full(lead, 0.1 / columns**0.5, device="cuda")
        input_scale = torch.full(() if len(lead) == 2 else lead, 0.002, device="cuda")
        return types.SimpleNamespace(payload=payload, global_scale=global_scale, input_scale=input_scale, bias=None)

    return Layer(L, P, H, inner, projection((L, P), P * inner, H), projection((L,), H, inner), None)


def quantise(values, scale):
    """NVFP4 rounding without the global scale of a torch tensor, by the library's own numerics."""
    import jax.numpy as jnp
    import torch

    nvfp4 = _import_without_library("jax_moe.nvfp4")
    rows = -(-values.shape[0] // 64) * 64  # few shapes, few compilations
    padded = torch.nn.functional.pad(values, (0, 0, 0, rows - values.shape[0]))
    rounded = nvfp4.quantize_dequantize(
        jnp.from_dlpack(padded), jnp.float32(float(scale))
    )  # not under jit: see notes-h200.md
    return torch.from_dlpack(rounded.block_until_ready())[: values.shape[0]].clone()


class Op:
    """GEMM1, GEMM2 (and combine) of one problem: operands, workspaces and launches."""

    def __init__(
        self, driver, layer, x, ids, weights, t1, t2, precision, activation, bias, combine, out, limit_experts=None
    ):
        torch = driver.torch
        self.driver, self.layer, self.x, self.ids, self.combine = driver, layer, x, ids, combine
        self.T, self.K = ids.shape
        self.N = t1.token_tile
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
        self.s1, self.s2 = gemm1(t1, precision, activation, bias), gemm2(t2, precision, bias, combine, out)
        self.s3 = plan.CombineSpec(out)
        self.w4a4, self.bias = precision == "w4a4", bias
        self.x_rows = quantise(x, layer.gate_up.input_scale) if self.w4a4 and layer.dense else x
        self.offset = torch.zeros(1, dtype=torch.int32, device="cuda")

    def run1(self):
        layer, tiles = self.layer, self.map
        g = layer.gate_up
        self.driver.launch(
            self.s1.name,
            self.driver.sms * self.s1.tile.ctas_per_sm,
            self.x_rows,
            tiles["row_route"],
            tiles["tile_expert"],
            tiles["expert_tiles"],
            g.payload,
            g.global_scale,
            g.input_scale if self.w4a4 else None,
            g.bias if self.bias else None,
            layer.down.input_scale if self.w4a4 else None,
            self.h,
            layer.H,
            self.K,
            layer.L,
            g.payload.shape[1],
            g.payload.shape[2],
        )

    def run2(self):
        layer, tiles = self.layer, self.map
        d = layer.down
        target, divisor = (self.out, self.K) if self.combine == "atomic" else (self.contributions, 1)
        self.driver.launch(
            self.s2.name,
            self.driver.sms * self.s2.tile.ctas_per_sm,
            self.h,
            tiles["row_route"],
            tiles["row_weight"],
            tiles["tile_expert"],
            tiles["expert_tiles"],
            d.payload,
            d.global_scale,
            d.input_scale if self.w4a4 else None,
            d.bias if self.bias else None,
            target,
            layer.H,
            divisor,
            layer.L,
            d.payload.shape[1],
            d.payload.shape[2],
            self.I_blocks,
        )

    def run3(self):
        layer = self.layer
        self.driver.launch(
            self.s3.name,
            self.s3.grid(self.T, layer.H),
            self.contributions,
            self.ids,
            self.offset,
            self.out,
            self.T,
            self.K,
            layer.H,
            layer.L,
        )

    def run(self):
        if self.combine == "atomic":
            self.out.zero_()
        self.run1()
        self.run2()
        if self.combine == "ordered":
            self.run3()


def oracle(torch, layer, x, ids, weights, precision, activation, bias):
    """The op in fp64 sums, by docs/numerics.md; [T, H] float64."""
    kind, alpha, beta, limit = activation
    gu, dn = layer.dense
    xq = quantise(x, layer.gate_up.input_scale).double() if precision == "w4a4" else x.double()
    out = torch.zeros(x.shape[0], layer.H, dtype=torch.float64, device="cuda")
    for e in range(layer.L):
        token, slot = torch.nonzero(ids == e, as_tuple=True)
        if len(token) == 0:
            continue
        gs = layer.gate_up.global_scale[e].double()
        if precision == "w4a4":
            gs = gs * layer.gate_up.input_scale.double()
        pre = [xq[token] @ gu[e, p].double().T * gs[p] for p in range(layer.P)]
        if bias:
            pre = [v + layer.gate_up.bias[e, p, : layer.inner].double() for p, v in enumerate(pre)]
        up = pre[-1]
        gate = pre[0]
        if kind == "swiglu":
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            h = (up + beta) * gate * torch.sigmoid(alpha * gate)
        elif kind == "geglu":
            h = torch.nn.functional.gelu(gate, approximate="tanh") * up
        elif kind == "relu2":
            h = torch.relu(up) ** 2
        else:
            h = beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * limit * torch.tanh(up / limit)
        if precision == "w4a4":
            h = quantise(h.float(), layer.down.input_scale[e]).double()
            scale = layer.down.global_scale[e].double() * layer.down.input_scale[e].double()
        else:
            h = h.bfloat16().double()
            scale = layer.down.global_scale[e].double()
        y = h @ dn[e].double().T * scale
        if bias:
            y = y + layer.down.bias[e].double()
        out.index_add_(0, token, y * weights[token, slot].double()[:, None])
    return out


def check(driver):
    torch = driver.torch
    failures = 0
    layers = {}
    for number, (t, precision, activation, bias, combine, out) in enumerate(CASES):
        P = 1 if activation[0] == "relu2" else 2
        L, H, inner, T, K = 6, 336, 208, (5, 61, 300)[number % 3], 4
        exact = activation[0] == "relu2" and precision == "w4a16"
        if (P, exact) not in layers:
            layers[P, exact] = make_layer(torch, L, P, H, inner, 11 + P, True, exact)
        layer = layers[P, exact]
        g = torch.Generator("cuda").manual_seed(number)
        if exact:
            x = torch.randint(-1, 2, (T, H), generator=g, device="cuda").bfloat16()
            x[:, 12:] = 0  # every partial sum then has fewer than 24 bits
        else:
            x = torch.randn(T, H, generator=g, device="cuda").bfloat16()
        ids = torch.randint(-2, L + 3, (T, K), generator=g, device="cuda", dtype=torch.int32)
        ids[0] = -1
        weights = torch.rand(T, K, generator=g, device="cuda")
        if exact:
            weights = torch.round(weights * 4) / 4
        op = Op(driver, layer, x, ids, weights, tile(t), tile(t), precision, activation, bias, combine, out)
        worst = []
        for _ in range(3):
            op.out.fill_(float("nan"))
            op.h.fill_(float("nan"))
            op.run()
            torch.cuda.synchronize()
            worst.append(op.out.double().clone())
        want = oracle(torch, layer, x, ids, weights, precision, activation, bias)
        error = float((worst[0] - want).norm() / want.norm())
        row = float(((worst[0] - want).norm(dim=1) / want.norm(dim=1).clamp(min=want.norm() / T)).max())
        same = all(torch.equal(worst[0], w) for w in worst) if combine == "ordered" else "-"
        bound = {"w4a16": 2e-3, "w4a4": 2e-2}[precision] + (0.01 if out == "bfloat16" else 0)
        if exact:
            bound = 0.0
        fine = error <= bound and same in (True, "-") and not bool(op.out[0].any())
        failures += not fine
        print(
            f"{'ok  ' if fine else 'FAIL'} {t:12} {precision:5} {activation[0]:6} bias {int(bias)} {combine:7} {out:8} "
            f"T {T:3} error {error:.2e} worst row {row:.2e} repeat {same}{' exact' if exact else ''}",
            flush=True,
        )
    print("failures:", failures)
    return failures


def time_graph(torch, calls, replays=5):
    """Microseconds of one call: median over replays of a graph of all ``calls``."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return sorted(times)[len(times) // 2]


def bench(driver, model, variants_of, profile=False):
    torch = driver.torch
    E, K, H, inner = SHAPES[model]
    layer = random_prepared_layer(torch, E, 2, H, inner, 5)
    expert_bytes = 3 * H * inner * 9 / 16
    results = []
    for T, variants in variants_of.items():
        calls = 1 if profile else 8 if T <= 512 else 2
        g = torch.Generator("cuda").manual_seed(T)
        touched = E * (1 - (1 - K / E) ** T)
        floor = max(touched * expert_bytes / 4.46e6, 6 * T * K * H * inner / 791e6)
        inputs = []
        for _ in range(calls):
            ids = torch.rand(T, E, generator=g, device="cuda").topk(K, dim=1).indices.int()
            inputs.append(
                (
                    torch.randn(T, H, generator=g, device="cuda").bfloat16(),
                    ids,
                    torch.rand(T, K, generator=g, device="cuda"),
                )
            )
        for number, text in enumerate(variants):
            t = resolve(text, model, T)
            for precision, combine in MODES[: 1 if number else None]:
                ops = [
                    Op(driver, layer, x, ids, w, t, t, precision, ACTIVATIONS[0], False, combine, "bfloat16")
                    for x, ids, w in inputs
                ]
                if profile:
                    ops[0].run()
                    torch.cuda.synchronize()
                    return []
                one = time_graph(torch, [op.run1 for op in ops])
                two = time_graph(torch, [op.run2 for op in ops])
                both = time_graph(torch, [op.run for op in ops])
                work = touched * expert_bytes / both / 1e6 if T <= 256 else 6 * T * K * H * inner / both / 1e6
                results.append(
                    dict(
                        model=model,
                        T=T,
                        tile=t.name,
                        precision=precision,
                        combine=combine,
                        gemm1=one,
                        gemm2=two,
                        op=both,
                        floor=floor,
                    )
                )
                print(
                    f"{model:16} T {T:5} {t.name:16} {precision:5} {combine:7} gemm1 {one:8.1f} gemm2 {two:8.1f} "
                    f"all {both:8.1f} us  x floor {both / floor:5.2f}  {work:7.2f} {'TB/s' if T <= 256 else 'TFLOP/s'}",
                    flush=True,
                )
                del ops
    return results


def main():
    command, folder, *suites = sys.argv[1:]
    folder = pathlib.Path(folder)
    if command == "build":
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.cubin"):
            old.unlink()
        build(folder, suites)
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    driver = Driver(folder)
    results = []
    for suite in suites:
        if suite == "check":
            check(driver)
        elif suite.startswith("profile:"):  # profile:MODEL:T:TILE, to be run under ncu
            _, model, tokens, text = suite.split(":")
            bench(driver, model, {int(tokens): [text]}, profile=True)
        else:
            results += bench(driver, suite, TIMED)
    if results:
        target = pathlib.Path(os.environ.get("OUT", folder)) / "results.json"
        target.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
