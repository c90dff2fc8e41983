"""The programs that benchmarks/gpu_scaling.py times: chains of calls in each form, and of each collective.

gpu_scaling.py says what the forms are, and how a call waits for the last one.
"""

import collections
from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
from scaling_model import LOCAL, ONE

import jax_moe
from jax_moe import exchange, shapes
from jax_moe.cli import timing

LENGTH = 8
"""Calls of a program."""

COLUMNS = 4096
"""Of the arrays that collectives are timed with: H."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A mesh axis, and whether tokens are spread over it, too."""

    axis: str
    is_spread: bool


FORMS = {
    "replicated": Form("expert", False),
    "spread": Form("expert", True),
    "tensor": Form("tensor", False),
    "tensor-spread": Form("tensor", True),
    LOCAL: Form("expert", False),
}
SUM_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Case:
    """A row to measure; of one GPU the form is :data:`ONE`, and nothing is summed."""

    precision: Any
    tokens: int
    form: str = ONE
    sum_dtype: str = ""


def make_mesh(devices: list, axis: str, axis_type=AxisType.Auto) -> Mesh:
    return Mesh(np.array(devices), (axis,), axis_types=(axis_type,))


def tokens_spec(case: Case, mesh: Mesh) -> PartitionSpec:
    """Of x, the routing and the output."""
    is_spread = case.form != ONE and FORMS[case.form].is_spread
    return PartitionSpec(mesh.axis_names[0] if is_spread else None)


def program(case: Case, mesh: Mesh) -> Any:
    """The jitted chain of a case, as a function of ``timing.Arguments``; its first call's output and its last's."""
    if case.form == ONE:
        op = functools.partial(jax_moe.fused_moe, precision=case.precision)
    elif case.form == LOCAL:
        op = local_op(case, mesh)
    else:
        op = functools.partial(
            jax_moe.sharded_moe,
            mesh=mesh,
            data_axis=mesh.axis_names[0] if FORMS[case.form].is_spread else None,
            precision=case.precision,
            sum_dtype=jnp.dtype(case.sum_dtype),
        )
    spec = tokens_spec(case, mesh)
    is_gathered, is_chained = spec != PartitionSpec(None), case.tokens <= timing.CHAINED_TOKENS

    def local_wait(x, ids, routing_weights, y):
        zero = timing.after(y)
        if is_gathered:
            routing_weights = routing_weights + zero
        if is_gathered and not is_chained:
            x = x.at[0, 0].set(x[0, 0] + zero.astype(x.dtype))  # in place; all of x would be a pass over it
        return x, ids + zero, routing_weights

    # Each device waits for its own part: a value of the whole output would be one more collective. What is gathered
    # waits, all of it, as in a model: else XLA gathers an x that all calls share once, and routings in one piece.
    wait = jax.shard_map(local_wait, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 3)

    def chain(x, weights, ids, routing_weights):
        outputs: list[jax.Array] = []
        for call_ids, call_weights in zip(ids, routing_weights, strict=True):
            if outputs and is_chained:
                x = outputs[-1]
            if outputs and (is_gathered or not is_chained):
                x, call_ids, call_weights = wait(x, call_ids, call_weights, outputs[-1])
            # All of an output is made: of one that nobody reads whole XLA would add up and convert a single element.
            outputs.append(jax.lax.optimization_barrier(op(x, weights, jax_moe.Routing(call_ids, call_weights))))
        return outputs[0], outputs[-1]

    return _captured(chain)


def local_op(case: Case, mesh: Mesh) -> Callable[..., jax.Array]:
    """What each device computes in the replicated form; of the outputs, which differ, the caller gets any one."""

    def local(x, experts, routing):
        offset = jax.lax.axis_index(mesh.axis_names[0]) * experts.down.global_scale.shape[0]
        return jax_moe.fused_moe(
            x, experts, routing, precision=case.precision, expert_offset=offset, out_dtype=jnp.dtype(case.sum_dtype),
            num_experts=mesh.size * experts.down.global_scale.shape[0],
        ).astype(jnp.bfloat16)  # fmt: skip

    def op(x, experts, routing):
        specs = jax.tree.map(lambda sharding: sharding.spec, jax_moe.expert_shardings(experts, mesh))
        everywhere = PartitionSpec(None)
        run = jax.shard_map(
            local, mesh=mesh, in_specs=(everywhere, specs, everywhere), out_specs=everywhere, check_vma=False
        )
        return run(x, experts, routing)

    return op


_captured: Callable[[Callable], Any] = timing.captured  # whatever the program returns

_SENDS = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)


def operations(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How many of each collective a compiled program has, so that the file shows what was timed; and copies."""
    text = compiled.as_text() or ""
    found = collections.Counter(_SENDS.findall(text))
    return dict(found) | {"copy": len(re.findall(r" copy(?:-start)?\(", text))}


@functools.lru_cache(maxsize=16)
def _host_arguments(shape: shapes.LayerShape, tokens: int):
    return jax.device_get(timing.chain_arguments(shape, None, tokens, LENGTH, seed=tokens)[0])


def arguments(shape: shapes.LayerShape, case: Case, mesh: Mesh, weights: jax_moe.Experts) -> timing.Arguments:
    """Random arguments of a case's program, placed; the same values for every case with so many tokens."""
    x, _, ids, routing_weights = _host_arguments(shape, case.tokens)
    sharding = NamedSharding(mesh, tokens_spec(case, mesh))
    x, ids, routing_weights = jax.device_put((x, ids, routing_weights), sharding)
    return x, weights, ids, routing_weights


# --- Collectives ------------------------------------------------------------------------------------------------------

COLLECTIVES: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {
    "all_reduce float32": ("float32", lambda x: exchange.add_up(x, scattered=(), summed=("expert",))),
    "all_reduce bfloat16": ("bfloat16", lambda x: exchange.add_up(x, scattered=(), summed=("expert",))),
    "all_gather": ("bfloat16", lambda x: exchange.gather(x, ("expert",))),
    "reduce_scatter": ("float32", lambda x: exchange.add_up(x, scattered=("expert",), summed=())),
    "all_to_all": ("bfloat16", lambda x: exchange.add_up(x, scattered=("expert",), summed=())),
}
"""Those of ``sharded_moe``, as it calls them: behind the all-to-all each device adds the parts that it got."""


def sent_bytes(name: str, whole: int, n: int) -> float:
    """What a rank sends of an array of ``whole`` bytes, all tokens in it."""
    return whole * (n - 1) / n * (2 if name.startswith("all_reduce") else 1)


def collective_chain(name: str, rows: int, mesh: Mesh) -> Any:
    """The same collective :data:`LENGTH` times, as a function of one number for each device."""
    dtype, collective = COLLECTIVES[name]
    local = rows // mesh.size if name == "all_gather" else rows

    def chain(seed):
        column = jax.lax.broadcasted_iota(jnp.float32, (local, COLUMNS), 1)  # XLA would simplify a constant's sum
        x = (column / COLUMNS + seed).astype(dtype)
        y = collective(x)
        for _ in range(LENGTH - 1):
            x = x.at[0, 0].set(y[0, 0].astype(dtype) / mesh.size)
            y = collective(x)
        return y[:1, :1]

    spec = PartitionSpec("expert")
    return _captured(jax.shard_map(chain, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


# --- Types, for programs that are only lowered ----------------------------------------------------------------------


def prepared_types(shape: shapes.LayerShape, target: str, precision: Any, mesh: Mesh) -> jax_moe.Experts:
    """Shapes and shardings of a target's experts on a mesh, without their values."""
    up, down = (
        (shape.num_experts, *size)
        for size in ((shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.intermediate_size))
    )
    dense = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in (up, up, down)]
    canonical = jax.eval_shape(jax_moe.quantize_experts, *dense)
    gate_up, down = canonical.gate_up, canonical.down
    scales = [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((), up[:1])]  # as random experts have them
    canonical = dataclasses.replace(
        canonical,
        gate_up=dataclasses.replace(gate_up, input_scale=scales[0]),
        down=dataclasses.replace(down, input_scale=scales[1]),
    )
    prepare = functools.partial(jax_moe.prepare, target=target, precision=precision, progress=False)
    if mesh.size == 1:
        return _placed(jax.eval_shape(prepare, canonical), mesh)
    # Over explicit axes a traced array's placement is seen, so that each device prepares its own part.
    explicit = make_mesh(list(mesh.devices.flat), mesh.axis_names[0], AxisType.Explicit)
    with jax.set_mesh(explicit):
        prepared = jax.eval_shape(prepare, _placed(canonical, explicit))
    return _placed(prepared, mesh)


def _placed(types: jax_moe.Experts, mesh: Mesh) -> jax_moe.Experts:
    shardings = jax_moe.expert_shardings(types, mesh)
    return jax.tree.map(lambda t, s: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=s), types, shardings)


def lower_for(shape: shapes.LayerShape, case: Case, mesh: Mesh, weights: jax_moe.Experts):
    """One call of a case lowered for a GPU, which compiles the kernels that the cache lacks."""
    sharding = NamedSharding(mesh, tokens_spec(case, mesh))
    x, ids, routing_weights = (
        jax.ShapeDtypeStruct((case.tokens, size), dtype, sharding=sharding)
        for size, dtype in ((shape.hidden_size, jnp.bfloat16), (shape.top_k, jnp.int32), (shape.top_k, jnp.float32))
    )
    return program(case, mesh).trace(x, weights, [ids], [routing_weights]).lower(lowering_platforms=("cuda",))
