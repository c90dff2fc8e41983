"""A whole Qwen3-MoE model with random weights: tokens a second, prefill and memory, beside transformers in bfloat16.

    python benchmarks/whole_model.py --model qwen3-30b-a3b --peer transformers --output results.json
    python benchmarks/whole_model.py --model qwen3-30b-a3b --layers 2               (a cut, on any machine)

Method. The model and its two jitted programs are those of ``examples/generate.py``, with weights made on the device. A
decoding call makes 16 tokens for each of B sequences, greedily, behind a prompt of --context tokens; its median time
gives tokens a second. Prefill is one call on --prefill tokens of one sequence. The counters of the FFI library are read
around the decoding calls: captured calls were recorded into a command buffer, and forked ones have the zeroing on an
auxiliary branch there. ``loop`` has the layers one after another in the program, each with arrays of its own; ``scan``
scans over stacked ones, where XLA copies a layer's weights (CPU) or records each call anew (GPU).

transformers generates with ``model.generate``, random bfloat16 weights of the same shapes and its own cache (or, as
``transformers-static``, a static one, with which it compiles the decoding step on a GPU); the time of one new token is
subtracted from that of 17. Every method runs in a process of its own; one that fails is listed, the rest still runs.

Kernels for a GPU that has no compiler beside it: JAX_MOE_CACHE_DIR=kernels and --compile-for sm_90a, on any machine.
"""

import dataclasses
import datetime
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Annotated, Any

import typer

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
PEERS = ("transformers", "transformers-static")
NEW = 16  # tokens that a timed call of a peer makes; ours makes generate.CHUNK


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a whole model; those of its MoE layers are in ``experts``: E, K, H, I."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: tuple[int, int, int, int]


MODELS = {
    "qwen3-30b-a3b": Model(48, 32, 4, 128, 151936, (128, 8, 2048, 768)),
    "qwen3-235b-a22b": Model(94, 64, 4, 128, 151936, (128, 8, 4096, 1536)),
    "tiny": Model(2, 4, 2, 32, 64, (8, 3, 64, 32)),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure."""

    model: str
    layers: int
    batches: tuple[int, ...]
    context: int
    prefill: int
    repeats: int

    @property
    def sizes(self) -> Model:
        return dataclasses.replace(MODELS[self.model], layers=self.layers)


# --- This library -----------------------------------------------------------------------------------------------------


def random_params(sizes: Model, dtype: Any, precision: Any, *, stack: bool, target: str | None = None):
    """The example's parameters, random, made on the default device layer by layer; (params, config)."""
    import jax
    import jax.numpy as jnp
    import qwen3_moe

    import jax_moe

    config = qwen3_moe.Config(sizes.layers, sizes.kv_heads, sizes.head_dim, 1e6, 1e-6, dtype)
    num_experts, top_k, hidden, intermediate = sizes.experts

    def matrix(key, rows, columns):
        """Of variance 1 / columns."""
        bound = (3 / columns) ** 0.5
        return jax.random.uniform(key, (rows, columns), jnp.float32, -bound, bound).astype(dtype)

    def projection(key, lead, rows, columns, input_scale_shape):
        """Random codes and block scales from 0.5 to 2; 3.5 is the root mean square of their product."""
        codes, scales = jax.random.split(key)
        block_scale = 0x30 + jax.random.bits(scales, (*lead, rows, columns // 16), jnp.uint8) % 0x10
        return jax_moe.Projection(
            jax.random.bits(codes, (*lead, rows, columns // 2), jnp.uint8),
            jax.lax.bitcast_convert_type(block_scale, jnp.float8_e4m3fn),
            jnp.full(lead, 1 / (3.5 * columns**0.5), jnp.float32),
            jnp.full(input_scale_shape, 4 / (6 * 448), jnp.float32),
        )

    @jax.jit
    def layer(key):
        keys = jax.random.split(key, 7)
        queries, values = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        return {
            "attention_norm": jnp.ones(hidden),
            "query": matrix(keys[0], queries, hidden),
            "key": matrix(keys[1], values, hidden),
            "value": matrix(keys[2], values, hidden),
            "output": matrix(keys[3], hidden, queries),
            "query_norm": jnp.ones(sizes.head_dim),
            "key_norm": jnp.ones(sizes.head_dim),
            "moe_norm": jnp.ones(hidden),
            "router": jax_moe.Router(matrix(keys[4], num_experts, hidden).astype(jnp.float32), k=top_k),
            "experts": jax_moe.Experts(
                projection(keys[5], (num_experts, 2), intermediate, hidden, ()),
                projection(keys[6], (num_experts,), hidden, intermediate, (num_experts,)),
            ),
        }

    @jax.jit
    def rest(key):
        embed, unembed = (matrix(key, sizes.vocabulary, hidden) for key in jax.random.split(key))
        return {"embed": embed, "unembed": unembed, "norm": jnp.ones(hidden)}

    def prepared(number):
        made = layer(jax.random.key(number))
        return made | {"experts": jax_moe.prepare(made["experts"], target, precision, progress=False)}

    layers = map(prepared, range(sizes.layers))
    made = rest(jax.random.key(sizes.layers))
    return made | {"layers": qwen3_moe.stack_layers(layers, sizes.layers) if stack else list(layers)}, config


def ours(request: Request, precision: Any, form: str, emit) -> None:
    """Rows of this library; ``form``: loop or scan."""
    sys.path.insert(0, str(EXAMPLES))
    import generate
    import jax
    import jax.numpy as jnp
    import numpy as np
    import qwen3_moe

    import jax_moe

    start = time.perf_counter()
    params, config = random_params(request.sizes, jnp.bfloat16, precision, stack=form == "scan")
    jax.block_until_ready(params)
    device, key = jax.devices()[0], jax.random.key(0)
    facts = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "weight_gb": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9,
        "made_in_seconds": time.perf_counter() - start,
    }

    def generator(prompt: int, new: int) -> generate.Generator:
        moe, room = qwen3_moe.moe_layer(precision=precision), generate.cache_length(prompt, new)
        return generate.Generator(config, moe, generate.Sampling(), room)

    def prompt(batch: int, length: int) -> np.ndarray:
        return np.random.default_rng(batch).integers(0, request.sizes.vocabulary, (batch, length), np.int32)

    run, tokens = generator(request.prefill, 1), prompt(1, request.prefill)
    prefill = functools.partial(run.prefill, params, tokens, request.prefill, key)
    seconds, first = timed(lambda: jax.block_until_ready(prefill()), request.repeats)
    emit(
        {"what": "prefill", "batch": 1, "tokens": request.prefill, "seconds": seconds, "first_seconds": first, **facts}
    )

    for batch in request.batches:
        calls = request.repeats + 2  # the first compiles, the second is captured
        run, tokens = generator(request.context, calls * generate.CHUNK), prompt(batch, request.context)
        padded = np.pad(tokens, ((0, 0), (0, -request.context % generate.PROMPT_MULTIPLE)))
        state = jax.block_until_ready(run.prefill(params, padded, request.context, key))
        before, times = jax_moe.ffi.counters(), []
        for call in range(calls):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(run.decode(params, state, request.context + call * generate.CHUNK, key))
            times.append(time.perf_counter() - start)
        after = jax_moe.ffi.counters()
        seconds, made = statistics.median(times[2:]), batch * generate.CHUNK
        counted = {name: getattr(after, name) - getattr(before, name) for name in after._fields}
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        row = {"what": "decode", "batch": batch, "tokens": made, "seconds": seconds, "first_seconds": times[0]}
        emit(row | {"peak_gb": memory and memory / 1e9, "counters": counted, **facts})
        del state


def compile_for(request: Request, precision: Any, form: str, target: str) -> None:
    """Fills the kernel cache with all that :func:`ours` launches on a GPU; no GPU needed, and no weights."""
    sys.path.insert(0, str(EXAMPLES))
    import generate
    import jax
    import jax.numpy as jnp
    import qwen3_moe

    sizes = dataclasses.replace(request.sizes, layers=1)  # kernels are the same in every layer
    made: list[Any] = []

    def params():
        tree, config = random_params(sizes, jnp.bfloat16, precision, stack=False, target=target)
        made.append(config)
        return tree

    shapes, key = jax.eval_shape(params), jax.eval_shape(lambda: jax.random.key(0))
    moe = qwen3_moe.moe_layer(precision=precision)
    run = generate.Generator(made[0], moe, generate.Sampling(), generate.cache_length(request.context, NEW))
    long = dataclasses.replace(run, cache_length=generate.cache_length(request.prefill, 1))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    number = ints(())
    generate.Generator.prefill.trace(long, shapes, ints((1, request.prefill)), number, key).lower(
        lowering_platforms=("cuda",)
    )
    padded = request.context + -request.context % generate.PROMPT_MULTIPLE
    for batch in request.batches:
        prefill = generate.Generator.prefill.trace(run, shapes, ints((batch, padded)), number, key)
        prefill.lower(lowering_platforms=("cuda",))
        state = jax.eval_shape(
            functools.partial(generate.Generator.prefill, run), shapes, ints((batch, padded)), number, key
        )
        generate.Generator.decode.trace(run, shapes, state, number, key).lower(lowering_platforms=("cuda",))


def timed(run, repeats: int) -> tuple[float, float]:
    """Median seconds of ``run()``, and those of the first call, which compiles."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]), times[0]


# --- transformers -----------------------------------------------------------------------------------------------------


def transformers(request: Request, cache: str | None, emit) -> None:
    """Rows of transformers with bfloat16 weights; on a GPU if torch has one."""
    import torch
    import transformers as package
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = request.sizes
    num_experts, top_k, hidden, intermediate = sizes.experts
    config = Qwen3MoeConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        moe_intermediate_size=intermediate,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=max(4096, 2 * request.prefill),
        dtype="bfloat16",
    )
    on_gpu = torch.cuda.is_available()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = Qwen3MoeForCausalLM(config).eval()
    facts = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": package.__version__,
        "weight_gb": sum(parameter.nbytes for parameter in model.parameters()) / 1e9,
    }

    def run(tokens, new: int) -> None:
        with torch.inference_mode():
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=new, max_new_tokens=new, do_sample=False,
                cache_implementation=cache, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        if on_gpu:
            torch.cuda.synchronize()

    def prompt(batch: int, length: int):
        return torch.randint(0, sizes.vocabulary, (batch, length), device=model.device)

    tokens = prompt(1, request.prefill)
    seconds, first = timed(lambda: run(tokens, 1), request.repeats)
    emit(
        {"what": "prefill", "batch": 1, "tokens": request.prefill, "seconds": seconds, "first_seconds": first, **facts}
    )
    for batch in request.batches:
        tokens = prompt(batch, request.context)
        one, _ = timed(lambda tokens=tokens: run(tokens, 1), request.repeats)
        all_, first = timed(lambda tokens=tokens: run(tokens, 1 + NEW), request.repeats)
        row = {"what": "decode", "batch": batch, "tokens": batch * NEW, "seconds": all_ - one, "first_seconds": first}
        memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
        emit(row | {"peak_gb": memory, **facts})


# --- The command ------------------------------------------------------------------------------------------------------


def measure(text: str) -> None:
    """One method in this process, its rows as lines; called by main."""
    asked = json.loads(text)
    method = asked.pop("method")
    request = Request(**asked | {"batches": tuple(asked["batches"])})

    def emit(row: dict) -> None:
        print("ROW", json.dumps({"method": method, **row}), flush=True)

    if method in PEERS:
        transformers(request, "static" if method == "transformers-static" else None, emit)
    else:
        _, precision, form = method.split()
        ours(request, precision, form, emit)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "qwen3-30b-a3b",
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many layers.")] = None,
    batch: Annotated[str, typer.Option(help="Numbers of sequences, separated by commas.")] = "1,8,64",
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt behind which tokens are made.")] = 128,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that prefill is timed with.")] = 2048,
    precision: Annotated[list[str] | None, typer.Option(help="w4a16 (default) or w4a4; may be repeated.")] = None,
    form: Annotated[list[str] | None, typer.Option(help="loop (default) or scan; may be repeated.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(PEERS)}; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls; the median counts.")] = 10,
    output: Annotated[pathlib.Path | None, typer.Option(help="JSON file for the results.")] = None,
    compile_target: Annotated[str | None, typer.Option("--compile-for", help="Only compile kernels for this.")] = None,
) -> None:
    """Time a whole model with random weights; see the module's text."""
    given = {"--model": ([model], MODELS), "--peer": (peer or [], PEERS), "--form": (form or [], ("loop", "scan"))}
    given["--precision"] = (precision or [], ("w4a16", "w4a4"))
    for option, (names, known) in given.items():
        if unknown := [name for name in names if name not in known]:
            raise typer.BadParameter(f"{option}: got {', '.join(unknown)}, needs any of {', '.join(known)}")
    if not all(part.isdecimal() and int(part) for part in batch.split(",")):
        raise typer.BadParameter(f"--batch: got {batch!r}, needs positive numbers, as 1,8,64")
    batches = tuple(map(int, batch.split(",")))
    request = Request(model, layers or MODELS[model].layers, batches, context, prefill, repeats)
    methods = [f"jax_moe {p} {f}" for p in precision or ["w4a16"] for f in form or ["loop"]]
    if compile_target:
        for method in methods:
            _, kind, layers_as = method.split()
            compile_for(request, kind, layers_as, compile_target)
        print(f"compiled for {compile_target}: the kernels of {model}")
        return
    rows, failures = [], []
    for method in methods + (peer or []):
        text = json.dumps({"method": method, **dataclasses.asdict(request)})
        child = subprocess.Popen([sys.executable, __file__, "measure", text], stdout=subprocess.PIPE, text=True)
        assert child.stdout
        for line in child.stdout:
            if line.startswith("ROW "):
                rows.append(json.loads(line[4:]))
                print(line, end="", file=sys.stderr, flush=True)
        if code := child.wait():
            failures.append({"method": method, "error": f"exit code {code}"})
        if output:
            facts = {"date": datetime.date.today().isoformat(), "request": dataclasses.asdict(request)}
            output.write_text(json.dumps({**facts, "results": rows, "failures": failures}, indent=1) + "\n")
    show(rows, f"{model}, {request.layers} layers, context {context}")
    for failure in failures:
        print(f"FAILED {failure['method']}: {failure['error']}")
    if failures:
        raise typer.Exit(1)


def show(rows: list[dict], title: str) -> None:
    """The rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading in (
        "method",
        "what",
        "batch",
        "ms a call",
        "tokens/s",
        "weights GB",
        "peak GB",
        "eager, captured, forked",
    ):
        table.add_column(heading)
    for row in rows:
        peak, counted = row.get("peak_gb"), row.get("counters")
        table.add_row(
            row["method"], row["what"], str(row["batch"]), f"{row['seconds'] * 1e3:.2f}",
            f"{row['tokens'] / row['seconds']:.1f}", f"{row['weight_gb']:.2f}", f"{peak:.2f}" if peak else "",
            ", ".join(map(str, counted.values())) if counted else "",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2])
    else:
        typer.run(main)
