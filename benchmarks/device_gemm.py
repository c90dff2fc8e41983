"""The sm_90a GEMM kernels alone, as cubins: checked against an fp32 oracle and timed variant by variant.

Two steps, because the machine with the GPU may have no compiler and the one with the compiler no GPU:

    python benchmarks/device_gemm.py build DIR SUITE...     # needs nvidia-cutlass-dsl, no GPU
    python benchmarks/device_gemm.py run DIR SUITE...       # needs torch, jax and an sm_90 GPU

A suite is "check" or a model of jax_moe.shapes. ``run`` prints a table and leaves results.json in $OUT (or DIR).
Times are CUDA graph replays; every call of a graph has a routing of its own, outputs are poisoned before each check.
"""

import dataclasses
import json
import os
import pathlib
import sys

from gemm_problem import Driver, make_layer, Op, quantise, random_prepared_layer
from gemm_suites import ACTIVATIONS, CASES, MODES, resolve, shapes, suite_specs, tile, timed
from gpu_op import floor_seconds

from jax_moe.kernels import cache


def build(folder, suites):
    """The suites' kernels as files, compiled (or taken from the cache) as for a call of the op."""
    manifest = {}
    for spec in dict.fromkeys(spec for suite in suites for spec in suite_specs(suite)):
        kernel = cache.compiled(spec, "sm_90a")
        file = folder / f"{len(manifest)}.cubin"
        file.write_bytes(kernel.image)
        manifest[spec.name] = {"file": file.name, "threads": kernel.threads, "smem": kernel.shared_bytes}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    print(len(manifest), "kernels", sum(f.stat().st_size for f in folder.iterdir()) / 1e6, "MB")


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
        op = Op(driver, layer, x, ids, weights, tile(t), precision, activation, bias, combine, out)
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
    shape = shapes.MODELS[model]
    E, K, H, inner = dataclasses.astuple(shape)
    layer = random_prepared_layer(torch, E, 2, H, inner, 5)
    results = []
    for T, variants in variants_of.items():
        calls = 1 if profile else 8 if T <= 512 else 2
        g = torch.Generator("cuda").manual_seed(T)
        touched = shape.touched_experts(T)
        floor = floor_seconds(shape, T, touched) * 1e6
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
                    Op(driver, layer, x, ids, w, t, precision, ACTIVATIONS[0], False, combine, "bfloat16")
                    for x, ids, w in inputs
                ]
                if profile:
                    ops[0].run()
                    torch.cuda.synchronize()
                    return []
                one = time_graph(torch, [op.run1 for op in ops])
                two = time_graph(torch, [op.run2 for op in ops])
                both = time_graph(torch, [op.run for op in ops])
                work = (touched * shape.weight_bytes_per_expert if T <= 256 else shape.flops(T)) / both / 1e6
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
            results += bench(driver, *timed(suite))
    if results:
        target = pathlib.Path(os.environ.get("OUT", folder)) / "results.json"
        target.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
