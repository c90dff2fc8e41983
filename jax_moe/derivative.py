"""The derivative of ``fused_moe`` with respect to x and the routing weights: through experts that stay as they are.

It is one linear map, from tangents of x and the weights to that of the output, and its transpose: a primitive, so that
vmap folds into tokens here as it does for the op. Both are plain JAX on any device, and made of the oracle's own
arithmetic (``reference.expert_mlp``), applied to a tile of routes of one expert after another. So only one expert is
dequantised at a time, and only for routes that are there: about 2 (forward) or 3 (reverse) times the multiplications of
the op, in float32.
"""

import functools

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp

from jax_moe import custom_call, eager, primitive, reference
from jax_moe.experts import CANONICAL, Experts, Projection
from jax_moe.operands import fill, OPERANDS
from jax_moe.preparation import unprepare
from jax_moe.problem import Problem

_X, _WEIGHTS = map(OPERANDS.index, ("x", "routing_weights"))

derivative_p = Primitive("jax_moe_fused_moe_derivative")
"""``[dy] = derivative_p.bind(*operands, dx, dweights, problem=..., transposed=False)``, and
``[dx, dweights] = derivative_p.bind(*operands, dy, problem=..., transposed=True)``, with the operands of the op."""
derivative_p.multiple_results = True


def jvp(primals, tangents, *, problem: Problem):
    """The rule of ``primitive.fused_moe_p``.

    Raises:
      NotImplementedError: anything but x and the routing weights has a tangent.
    """
    _refuse_others(tangents, (_X, _WEIGHTS))
    y = primitive.fused_moe_p.bind(*primals, problem=problem)
    linear = [ad.instantiate_zeros(tangents[i]) for i in (_X, _WEIGHTS)]
    problem = problem.without_parcels()
    given = primals[: problem.num_operands]
    return y, derivative_p.bind(*given, *linear, problem=problem, transposed=False)[0]


def _refuse_others(tangents, active) -> None:
    for i, tangent in enumerate(tangents):
        if i not in active and not isinstance(tangent, ad.Zero) and tangent.dtype != jax.dtypes.float0:
            raise NotImplementedError(
                "fused_moe: differentiated with respect to its experts, which are frozen: NVFP4 weights have no "
                "gradient to follow. Differentiate with respect to x and routing.weights only "
                "(jax.lax.stop_gradient(experts) stops the others), or train dense weights."
            )


@derivative_p.def_abstract_eval
def _result_types(*operands, problem: Problem, transposed: bool):
    x, weights = operands[_X], operands[_WEIGHTS]
    # update() keeps what shard_map knows of them: over which mesh axes they vary.
    return [x.update(), weights.update()] if transposed else [x.update(dtype=problem.out_dtype)]


def _apply(*operands, problem: Problem, transposed: bool, max_tiles: int | None = None):
    """The linear map. ``max_tiles`` makes the number of tiles static, so that JAX can differentiate this in turn."""
    x, expert_ids, weights, offset, *weight_operands = fill(operands[: problem.num_operands], problem.absent, None)
    linear = operands[problem.num_operands :]
    if problem.num_tokens == 0:
        return [jnp.zeros_like(x), jnp.zeros_like(weights)] if transposed else [x.astype(problem.out_dtype)]
    num_tiles, tile = _tiles(expert_ids, offset, problem)
    slots = expert_ids.shape[1]

    def rows_of(array, places):  # zeros in rows without a route, whose place is beyond the end
        return array.at[places].get(mode="fill", fill_value=0).astype(jnp.float32)

    def add_tile(index, totals):
        expert, routes = tile(index)
        tokens = routes // slots
        primals = rows_of(x, tokens), rows_of(weights.reshape(-1), routes)
        contribution = functools.partial(_contribution, _one_expert(weight_operands, expert, problem), problem)
        if transposed:
            _, transpose = jax.vjp(contribution, *primals)
            dx, dweights = transpose(rows_of(linear[0], tokens))
            return totals[0].at[tokens].add(dx, mode="drop"), totals[1].at[routes].add(dweights, mode="drop")
        tangents = rows_of(linear[0], tokens), rows_of(linear[1].reshape(-1), routes)
        _, dy = jax.jvp(contribution, primals, tangents)
        return (totals[0].at[tokens].add(dy, mode="drop"),)

    shapes = [x.shape, (weights.size,)] if transposed else [x.shape]
    _, *totals = custom_call.vary_alike(x, *[jnp.zeros(shape, jnp.float32) for shape in shapes])
    totals = jax.lax.fori_loop(0, num_tiles if max_tiles is None else max_tiles, add_tile, tuple(totals))
    if transposed:
        return [totals[0].astype(x.dtype), totals[1].reshape(weights.shape)]
    return [totals[0].astype(problem.out_dtype)]


def _contribution(expert: Experts, problem: Problem, x: jax.Array, weights: jax.Array) -> jax.Array:
    """float32 ``[R, H]``: what rows ``[R, H]`` with weights ``[R]``, all of one expert, add to the output."""
    mlp = functools.partial(
        reference.expert_mlp,
        activation=problem.activation,
        precision=problem.precision,
        x_is_rounded=problem.x_form != "bfloat16",
    )
    if problem.weight_on == "input":
        return mlp(reference.weighted_input(x, weights), expert, 0)
    return weights[:, None] * mlp(x, expert, 0)


def _one_expert(operands, expert: jax.Array, problem: Problem) -> Experts:
    """Canonical experts, of which there is one, from the ten weight operands."""

    def select(leaf):
        return leaf if leaf is None or leaf.ndim == 0 else slice_of_one(leaf, expert)

    def projection(operands) -> Projection:
        return Projection(*map(select, operands))

    experts = Experts(projection(operands[:5]), projection(operands[5:]), layout=problem.layout)
    if problem.layout == CANONICAL:
        return experts
    return unprepare(experts, problem.hidden_size, problem.intermediate_size)


def slice_of_one(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """``leaf[index : index + 1]`` of a leaf of weights."""
    # XLA's CPU backend widens float8 to slice it: behind the barrier what it slices, without it all of the leaf.
    leaf, _ = jax.lax.optimization_barrier((leaf, index))
    return jax.lax.dynamic_slice_in_dim(leaf, index, 1)


def _tiles(expert_ids: jax.Array, offset: jax.Array, problem: Problem):
    """How many tiles the routes to local experts make, and a function of a tile's number: its expert and its routes.

    Routes are numbers ``[R]`` in 0 .. T*K - 1, or T*K in the rows of a tile that has no more.
    """
    ids, rows = expert_ids.reshape(-1), _rows_of_a_tile(problem)
    local = ids - offset  # may wrap for an id that does not exist
    is_local = (ids >= offset) & (local >= 0) & (local < problem.local_experts)
    local = jnp.where(is_local, local, problem.local_experts)
    order = jnp.argsort(local)
    counts = jnp.zeros(problem.local_experts, jnp.int32).at[local].add(1, mode="drop")
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    tiles = -(-counts // rows)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)

    def tile(index):
        expert = jnp.minimum(jnp.searchsorted(ends, index, side="right"), problem.local_experts - 1)
        first = starts[expert] + (index - ends[expert] + tiles[expert]) * rows
        places = first + jnp.arange(rows, dtype=jnp.int32)
        routes = order.at[places].get(mode="clip")
        return expert, jnp.where(places < starts[expert + 1], routes, ids.size)

    return ends[-1], tile


def _rows_of_a_tile(problem: Problem) -> int:
    return rows_of_a_tile(problem.num_routes, problem.num_experts or problem.local_experts)


def rows_of_a_tile(num_rows: int, num_groups: int) -> int:
    """About the rows that an expert, or group, has: then tiles are padded to twice the rows at most."""
    if not isinstance(num_rows, int):  # exported for any T
        return 64
    return min(max(1 << (num_rows // num_groups).bit_length(), 8), 128)


def _second_jvp(primals, tangents, *, problem: Problem, transposed: bool):
    """The derivative of the linear map, which is not linear in x and the weights."""
    active = [_X, _WEIGHTS, *range(problem.num_operands, len(primals))]
    _refuse_others(tangents, active)
    max_tiles = problem.num_routes // _rows_of_a_tile(problem) + problem.local_experts

    def apply(*values):
        operands = list(primals)
        for i, value in zip(active, values, strict=True):
            operands[i] = value
        return _apply(*operands, problem=problem, transposed=transposed, max_tiles=max_tiles)

    return jax.jvp(apply, [primals[i] for i in active], [ad.instantiate_zeros(tangents[i]) for i in active])


def _transpose(cotangents, *operands, problem: Problem, transposed: bool):
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    fixed, linear = operands[: problem.num_operands], operands[problem.num_operands :]
    results = derivative_p.bind(*fixed, *cotangents, problem=problem, transposed=not transposed)
    wanted = [r if ad.is_undefined_primal(o) else None for r, o in zip(results, linear, strict=True)]
    return [None] * len(fixed) + wanted


def _lower(ctx, *operands, problem: Problem, transposed: bool):
    custom_call.refuse_partitioning(ctx.module_context.axis_context, problem)
    apply = functools.partial(_apply, problem=problem, transposed=transposed)
    return mlir.lower_fun(apply, multiple_results=True)(ctx, *operands)


derivative_p.def_impl(functools.partial(eager.run_eagerly, derivative_p))
mlir.register_lowering(derivative_p, _lower)
batching.primitive_batchers[derivative_p] = functools.partial(primitive.fold_into_tokens, derivative_p)
ad.primitive_jvps[derivative_p] = _second_jvp
ad.primitive_transposes[derivative_p] = _transpose
