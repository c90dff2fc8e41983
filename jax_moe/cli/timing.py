"""How long one call of the op takes: what ``python -m jax_moe bench`` and the scripts in ``benchmarks/`` share.

A call on a GPU is shorter than what starting a program and waiting for it costs the host. So a program is a chain of
calls, each waiting for the one before, because independent calls might overlap, and each with a random routing of its
own, because one routing's weights might stay in the cache. Several programs are started before the host waits.
"""

from collections.abc import Callable
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_moe
from jax_moe import nvfp4, shapes

CHAINED_TOKENS = 128
"""On a GPU, calls of up to so many tokens may get each other's outputs; see :func:`op_chain`."""

Arguments = tuple[jax.Array, Any, list[jax.Array], list[jax.Array]]
"""Of a chain: x bf16 [T, H], weights, and for each call expert ids int32 [T, K] and routing weights f32 [T, K]."""

Routings = Callable[[shapes.LayerShape, int, int, int], tuple[np.ndarray, np.ndarray, float]]


def routings(shape: shapes.LayerShape, tokens: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Random distinct experts of each token of each call, their weights, and the mean number of experts with a token.

    Ids are int32 and weights float32 ``[length, T, K]``.
    """
    rng = np.random.default_rng(seed)
    ids = np.argpartition(rng.random((length, tokens, shape.num_experts)), shape.top_k - 1, axis=-1)
    ids = ids[..., : shape.top_k].astype(np.int32)
    touched = statistics.mean(len(np.unique(call)) for call in ids)
    return ids, np.full(ids.shape, 1 / shape.top_k, np.float32), touched


def even_routings(
    shape: shapes.LayerShape, tokens: int, length: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """As :func:`routings`, but every expert has the same number of rows, T * K / E.

    Raises:
      ValueError: that is not a whole number.
    """
    experts, routes = shape.num_experts, tokens * shape.top_k
    if routes % experts:
        raise ValueError(f"tokens: got {tokens}, whose {routes} routes {experts} experts cannot share equally")
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(experts) for _ in range(length)]).astype(np.int32)
    ids = np.tile(order, routes // experts).reshape(length, tokens, shape.top_k)
    return ids, np.full(ids.shape, 1 / shape.top_k, np.float32), float(experts)


def random_x(shape: shapes.LayerShape, tokens: int, seed: int) -> jax.Array:
    """Normal bf16 ``[T, H]``."""
    return jax.random.normal(jax.random.key(seed), (tokens, shape.hidden_size), jnp.bfloat16)


def random_experts(
    shape: shapes.LayerShape,
    seed: int | np.random.Generator,
    *,
    parts: int = 2,
    bias: bool = False,
    block_scales: tuple[int, int] = (0x30, 0x40),
) -> jax_moe.Experts:
    """Canonical experts with random codes, input scales, and scales under which intermediates are of order 1.

    Args:
      shape: E, H and I.
      seed: or a generator to draw from.
      parts: P; the global scales of two parts differ by up to 10x.
      bias: with biases.
      block_scales: bytes of the least e4m3 block scale and behind the largest: 0.5 up to 2.
    """
    rng = np.random.default_rng(seed)
    draw = functools.partial(random_projection, rng, bias=bias, block_scales=block_scales)
    experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
    gate_up = draw((experts, parts), intermediate, hidden, (3, 6))
    return jax_moe.Experts(gate_up, draw((experts,), hidden, intermediate, (2, 12, experts)))


def random_projection(
    rng: np.random.Generator,
    lead: tuple[int, ...],
    rows: int,
    columns: int,
    input_scale: tuple,
    *,
    bias: bool = False,
    block_scales: tuple[int, int] = (0x30, 0x40),
) -> jax_moe.Projection:
    """A canonical projection ``[*lead, rows, columns]``, as :func:`random_experts` has two.

    ``input_scale``: least and largest magnitude of what it is multiplied with, and how many scales, if not one.
    """
    payload = rng.integers(0, 256, (*lead, rows, columns // 2), np.uint8)
    block_scale = rng.integers(*block_scales, (*lead, rows, columns // nvfp4.BLOCK_SIZE), np.uint8)
    spread = 10 ** rng.uniform(-0.5, 0.5, lead)
    return jax_moe.Projection(
        jnp.asarray(payload),
        jnp.asarray(block_scale.view(jnp.float8_e4m3fn)),
        # 3.5 is the root mean square of a code times a block scale.
        jnp.asarray(spread / (3.5 * np.sqrt(columns)), jnp.float32),
        jnp.asarray(rng.uniform(*input_scale) / (nvfp4.E2M1_MAX * nvfp4.E4M3_MAX), jnp.float32),
        jnp.asarray(rng.normal(size=(*lead, rows)), jnp.float32) if bias else None,
    )


def after(y: jax.Array) -> jax.Array:
    """An int32 zero that is there only once ``y`` is: makes one call wait for another without changing its input."""
    first = y[0, 0]
    return (jnp.isnan(first) & (first == 0)).astype(jnp.int32)  # never true, which XLA does not find out


def op_chain(op: Callable[..., jax.Array], *, chained: bool) -> Callable[..., jax.Array]:
    """Calls of ``op(x, weights, routing, expert_offset=...)`` one after the other, as a function of :data:`Arguments`.

    Args:
      op: one call.
      chained: each call's input is the last one's output. Otherwise all have the same x, and a small kernel makes each
        wait for the one before. From a few hundred tokens on a GPU is at its power limit, and what is multiplied
        matters: outputs that become inputs shrink call by call to zeros, which take less power and so less time. With
        fewer tokens the bytes of the weights decide, whatever is in x, and that kernel would be a twentieth of a call.
    """

    def chain(x, weights, ids, routing_weights):
        offset, y = jnp.int32(0), x
        for call_ids, call_weights in zip(ids, routing_weights, strict=True):
            y = op(y if chained else x, weights, jax_moe.Routing(call_ids, call_weights), expert_offset=offset)
            offset = offset if chained else after(y)
        return y

    return chain


def chain_arguments(
    shape: shapes.LayerShape, weights: Any, tokens: int, length: int, seed: int, draw: Routings = routings
) -> tuple[Arguments, float]:
    """Random arguments of :func:`op_chain`'s function, and the mean number of experts that a call touches.

    ``draw``: :func:`routings` or :func:`even_routings`.
    """
    ids, routing_weights, touched = draw(shape, tokens, length, seed)
    return (
        random_x(shape, tokens, seed),
        weights,
        list(map(jnp.asarray, ids)),
        list(map(jnp.asarray, routing_weights)),
    ), touched


def captured(chain: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``chain`` under ``jax.jit``; on a GPU recorded into a command buffer however short it is."""
    return jax.jit(chain, compiler_options={"xla_gpu_graph_min_graph_size": 1})


def run(function: Callable[..., jax.Array], arguments: tuple, programs: int) -> None:
    """Starts a jitted function so many times and waits: on a GPU for the last result, on a CPU for each.

    A GPU's stream has one program after the other; a CPU might run several at once.
    """
    on_cpu = jax.default_backend() == "cpu"
    for _ in range(programs):
        out = function(*arguments)
        if on_cpu:
            out.block_until_ready()
    out.block_until_ready()


def timed(run: Callable[[int], None], programs: int) -> float:
    """Seconds that ``run(programs)`` takes, waiting included."""
    start = time.perf_counter()
    run(programs)
    return time.perf_counter() - start


def programs_in_a_row(one: float) -> int:
    """As many programs of ``one`` second each as hide what starting and awaiting one costs the host."""
    return max(1, min(50, round(0.05 / one)))


def seconds_per_call(run: Callable[[int], None], length: int, repeats: int, limit: float | None = None) -> float:
    """Median seconds of one of the ``length`` calls in a program.

    Args:
      run: starts so many programs and waits for them.
      length: calls in a program.
      repeats: timed runs.
      limit: seconds that they may take, about; there are three at least.
    """
    run(4)  # compiled, run eagerly, captured, replayed
    one = timed(run, 1)
    programs = programs_in_a_row(one)
    run(programs)
    if limit is not None:
        repeats = max(3, min(repeats, round(limit / (one * programs))))
    return statistics.median(timed(run, programs) for _ in range(repeats)) / (programs * length)
