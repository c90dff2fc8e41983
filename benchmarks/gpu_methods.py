"""What benchmarks/gpu_op.py times: for each method a maker of chains of calls, with random weights, tokens and routing.

A method is called with the name of a model and returns ``make(count, length)``: a :class:`Chain` of ``length`` calls of
``count`` tokens. docs/hopper.md and gpu_op's own text say why chains.
"""

from collections.abc import Callable
import dataclasses
import functools
import os
import time
from typing import Any

from jax_moe import shapes
from jax_moe.cli import timing


@dataclasses.dataclass(frozen=True)
class Chain:
    """``run(programs)`` runs the chain so often and waits for it; ``touched``: experts with a token, mean of the calls.

    ``start_eagerly()`` returns the seconds that the host takes to start the chain without a command buffer.
    """

    run: Callable[[int], None]
    touched: float
    start_eagerly: Callable[[], float] | None = None


def random_experts(model: str, precision: Any = "w4a16"):
    """Weights as the default device reads them, and the activation of a model; only gpt-oss has biases."""
    import jax_moe

    gpt_oss = model == "gpt-oss-120b"
    canonical = timing.random_experts(shapes.MODELS[model], 0, bias=gpt_oss)
    activation = jax_moe.SwiGLU(alpha=1.702, beta=1.0, limit=7.0) if gpt_oss else jax_moe.SwiGLU()
    return jax_moe.prepare(canonical, precision=precision, progress=False), activation


def ours(model: str, precision: Any, combine: Any, *flags: str, draw: timing.Routings = timing.routings):
    """The op of this project; ``flags``: names of further options that are True; ``draw``: its routings."""
    import jax

    import jax_moe

    shape = shapes.MODELS[model]
    weights, activation = random_experts(model, precision)
    op = functools.partial(jax_moe.fused_moe, precision=precision, combine=combine, activation=activation)
    op = functools.partial(op, **dict.fromkeys(flags, True))

    def make(count, length):
        arguments, touched = timing.chain_arguments(shape, weights, count, length, seed=count, draw=draw)
        chain = timing.op_chain(op, chained=count <= timing.CHAINED_TOKENS)
        compiled = timing.captured(chain)
        eager = jax.jit(chain, compiler_options={"xla_gpu_enable_command_buffer": ""})

        def start_eagerly() -> float:
            start = time.perf_counter()
            out = eager(*arguments)
            elapsed = time.perf_counter() - start
            out.block_until_ready()
            return elapsed

        return Chain(functools.partial(timing.run, compiled, arguments), touched, start_eagerly)

    return make


def ragged_dot_op(x, gate_up, down, ids, weights):
    """The op in plain JAX on bf16 weights: gate_up ``[E, H, 2*I]``, down ``[E, I, H]``."""
    import jax
    import jax.numpy as jnp

    top_k, intermediate = ids.shape[1], down.shape[1]
    order = jnp.argsort(ids.reshape(-1), stable=True)
    sizes = jnp.bincount(ids.reshape(-1), length=down.shape[0]).astype(jnp.int32)
    both = jax.lax.ragged_dot(x[order // top_k], gate_up, sizes)
    h = jax.nn.silu(both[:, :intermediate].astype(jnp.float32)) * both[:, intermediate:]
    rows = jax.lax.ragged_dot(h.astype(jnp.bfloat16), down, sizes, preferred_element_type=jnp.float32)
    out = jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(rows * weights.reshape(-1)[order][:, None])
    return out.astype(x.dtype)


def ragged_dot(model: str, options: dict[str, bool] | None = None):
    """``jax.lax.ragged_dot`` on bf16 weights. Refuses what would not fit: its dense lowering may need E copies of x.

    ``options``: of the compiler.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # read when the first array is made
    import jax
    import jax.numpy as jnp

    shape = shapes.MODELS[model]
    keys = jax.random.split(jax.random.key(0), 2)
    experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
    gate_up = jax.random.normal(keys[0], (experts, hidden, 2 * intermediate), jnp.bfloat16) * hidden**-0.5
    down = jax.random.normal(keys[1], (experts, intermediate, hidden), jnp.bfloat16) * intermediate**-0.5

    def chain(x, gate_up, down, ids, weights):
        wait = jnp.int32(0)
        for i in range(ids.shape[0]):
            y = ragged_dot_op(x, gate_up, down, ids[i] + wait, weights[i])
            wait = timing.after(y)
        return y

    def make(count, length):
        ids, routing_weights, touched = timing.routings(shape, count, length, seed=count)
        arguments = (
            timing.random_x(shape, count, seed=count),
            gate_up,
            down,
            jnp.asarray(ids),
            jnp.asarray(routing_weights),
        )
        compiled = jax.jit(chain, compiler_options=options).lower(*arguments).compile()
        needed, limit = compiled.memory_analysis(), (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        if needed and limit and needed.temp_size_in_bytes + needed.argument_size_in_bytes > 0.95 * limit:
            raise MemoryError(f"{needed.temp_size_in_bytes / 1e9:.0f} GB of temporaries, {limit / 1e9:.0f} GB there")
        return Chain(functools.partial(timing.run, compiled, arguments), touched)

    return make


def torch_op(x, gate_up, down, ids, weights):
    """The op in torch on bf16 weights: gate_up ``[E, 2*I, H]``, down ``[E, H, I]``."""
    import torch

    top_k, (experts, _, intermediate) = ids.shape[1], down.shape
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(1, experts + 1, device=x.device)).to(torch.int32)
    both = torch._grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=ends)
    h = torch.nn.functional.silu(both[:, :intermediate]) * both[:, intermediate:]
    rows = torch._grouped_mm(h, down.transpose(1, 2), offs=ends)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    out.index_add_(0, order // top_k, rows.float() * weights.reshape(-1)[order][:, None])
    return out.to(x.dtype)


def torch_grouped_mm(model: str):
    """``torch._grouped_mm`` on bf16 weights, in a CUDA graph; calls on one stream wait for one another."""
    import torch

    shape = shapes.MODELS[model]
    experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
    torch.manual_seed(0)
    gate_up = torch.randn(experts, 2 * intermediate, hidden, dtype=torch.bfloat16, device="cuda") * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate, dtype=torch.bfloat16, device="cuda") * intermediate**-0.5

    def make(count, length):
        ids, routing_weights, touched = timing.routings(shape, count, length, seed=count)
        ids, weights = torch.tensor(ids, dtype=torch.int64, device="cuda"), torch.tensor(routing_weights, device="cuda")
        x = torch.randn(count, hidden, dtype=torch.bfloat16, device="cuda")

        def chain():
            for i in range(length):
                torch_op(x, gate_up, down, ids[i], weights[i])

        return Chain(torch_graph(chain), touched)

    return make


def torch_graph(chain: Callable[[], None]) -> Callable[[int], None]:
    """``chain`` once eagerly, then captured: a function that replays it so many times and waits."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()

    def run(programs):
        for _ in range(programs):
            graph.replay()
        torch.cuda.synchronize()

    return run
