"""``ragged_dot`` and ``linear``: products with NVFP4 weights outside a MoE layer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe import arguments, custom_call, layouts, nvfp4
from jax_moe.experts import CANONICAL, PreparedProjection, Projection
from jax_moe.problem import OUT_DTYPES, Precision
from jax_moe.product import derivative as derivative  # for its rules
from jax_moe.product.primitive import product_p
from jax_moe.product.problem import Product


def ragged_dot(
    x: jax.Array,
    weights: Projection,
    group_sizes: jax.Array,
    *,
    precision: Precision = "w4a16",
    group_offset: jax.Array | int | None = None,
    out_dtype=jnp.bfloat16,
    command_buffer: bool = True,
    batch_invariant: bool = False,
) -> jax.Array:
    """Grouped matrix product with NVFP4 weights, as one XLA custom call: ``jax.lax.ragged_dot`` with 4-bit matrices.

    Rows of x stand group by group. Those of group g are multiplied with its matrix: ``y[t] = x[t] @ W[g].T + bias[g]``.
    ``docs/numerics.md`` says where each rounding happens; ``jax_moe.reference.ragged_dot`` is the same function in
    readable ``jnp``.

    ``jax.vmap`` over x and ``group_sizes`` makes more rows of the same groups. ``jax.grad`` with respect to x goes
    through the weights, which are frozen, in float32 and plain JAX, with one dense matrix in memory at a time.

    Args:
      x: bfloat16 ``[T, C]``; C a multiple of 16.
      weights: ``[G, N, C]``, a projection of a single part (:func:`jax_moe.quantize_projection`); N a multiple of 16.
        On a GPU it must have gone through :func:`jax_moe.prepare`. ``input_scale``: ``[G]``, or ``[]`` for all groups.
      group_sizes: int32 ``[E]``, rows of each group, 0 or more; together T at most. The rows beyond are zeros.
      precision: ``"w4a16"`` multiplies x as it is; ``"w4a4"`` rounds it to NVFP4 with ``weights.input_scale``;
        ``"w4a4_dynamic"`` does so with a scale that it finds for each row.
      group_offset: the group that ``weights`` begin with, an int or an int32 scalar, traced or not. Rows of groups
        outside ``[group_offset, group_offset + G)`` are zeros, which is how a mesh divides groups: add up what its
        devices return. None: 0, and E must be G.
      out_dtype: bfloat16 or float32.
      command_buffer: whether XLA may record the call into a command buffer (a CUDA graph); no effect on a CPU.
      batch_invariant: a row's result is the same bit for bit among any others, however many: as for
        :func:`jax_moe.fused_moe`. It slows a product of one matrix with few rows, where several blocks of threads
        of a GPU may otherwise share the contraction. No effect on a CPU, where it always holds.

    Returns:
      ``[T, N]`` of ``out_dtype``, rounded once.

    Raises:
      TypeError, ValueError: an argument has the wrong type, dtype, shape or value; raised while tracing.
      NotImplementedError: mapped by ``jax.vmap`` over weights or ``group_offset``, or differentiated with respect to
        weights.
    """
    num_rows, in_features = arguments.array("x", x, jnp.bfloat16, ("T", "C"))
    (num_groups,) = arguments.array("group_sizes", group_sizes, jnp.int32, ("E",))
    layout, local_groups, out_features = _check_weights(weights, in_features, precision)
    if group_offset is None:
        if num_groups != local_groups:
            raise ValueError(
                f"group_sizes: got {num_groups} sizes, weights have {local_groups} groups; of only some of the groups, "
                "group_offset says where they begin"
            )
        group_offset = 0
    elif isinstance(group_offset, int | np.integer):
        if not 0 <= group_offset < 2**31:
            raise ValueError(f"group_offset: got {group_offset}, needs 0 <= group_offset < 2**31")
    else:
        arguments.array("group_offset", group_offset, jnp.int32, ())
    if num_groups == 0:
        raise ValueError("group_sizes: got E = 0, needs at least one group")
    arguments.instance("command_buffer", command_buffer, bool)
    arguments.instance("batch_invariant", batch_invariant, bool)

    input_scale = weights.input_scale
    if input_scale is not None and input_scale.ndim == 0:
        input_scale = jnp.broadcast_to(input_scale, (local_groups,))
    given = {
        "x": x,
        "group_sizes": group_sizes,
        "group_offset": jnp.asarray(group_offset, jnp.int32),
        "weights.payload": nvfp4.payload_bytes(weights.payload),
        "weights.block_scale": weights.block_scale,
        "weights.global_scale": weights.global_scale,
        "weights.input_scale": input_scale,
        "weights.bias": weights.bias,
    }
    product = Product(
        precision=precision,
        out_dtype=arguments.dtype("out_dtype", out_dtype, OUT_DTYPES),
        command_buffer=command_buffer,
        batch_invariant=batch_invariant,
        num_rows=num_rows,
        num_groups=num_groups,
        local_groups=local_groups,
        in_features=in_features,
        out_features=out_features,
        layout=layout,
        absent=tuple(name for name, operand in given.items() if operand is None),
    )
    operands = custom_call.vary_alike(*(jnp.asarray(operand) for operand in given.values() if operand is not None))
    return product_p.bind(*operands, product=product)


def _check_weights(weights: Projection, in_features: int, precision: str) -> tuple[str, int, int]:
    """Layout, G and N of weights that fit C and the precision."""
    arguments.instance("weights", weights, Projection)
    arguments.choice("precision", precision, Precision)
    if in_features == 0 or in_features % nvfp4.BLOCK_SIZE:
        raise ValueError(f"x: got C = {in_features}, needs a positive multiple of {nvfp4.BLOCK_SIZE}")
    (groups,) = arguments.array("weights.global_scale", weights.global_scale, jnp.float32, ("G",))
    if groups == 0:
        raise ValueError("weights: got no group, needs at least one")
    prepared = isinstance(weights, PreparedProjection)
    layout = weights.layout if prepared else CANONICAL
    padded = layouts.get(layout).check_matrices(weights, groups, in_features)
    out_features = weights.out_features if prepared else padded
    if out_features == 0 or out_features % nvfp4.BLOCK_SIZE or out_features > padded:
        raise ValueError(f"weights: got N = {out_features}, needs a positive multiple of {nvfp4.BLOCK_SIZE}")
    if weights.bias is not None:
        arguments.array("weights.bias", weights.bias, jnp.float32, (groups, out_features))
    if weights.input_scale is not None:
        shape = (groups,) if weights.input_scale.ndim else ()
        arguments.array("weights.input_scale", weights.input_scale, jnp.float32, shape)
    elif precision == "w4a4":
        raise ValueError(
            "weights.input_scale: got None, precision='w4a4' needs it: for activations x of the layer, "
            "jax_moe.nvfp4.global_scale_for(jax_moe.nvfp4.amax(x)); precision='w4a4_dynamic' needs none"
        )
    return layout, groups, out_features


def linear(
    x: jax.Array,
    weights: Projection,
    *,
    precision: Precision = "w4a16",
    out_dtype=jnp.bfloat16,
    command_buffer: bool = True,
    batch_invariant: bool = False,
) -> jax.Array:
    """The dense layer ``x @ W.T + bias`` with NVFP4 weights: :func:`ragged_dot` of one group, over any leading axes.

    Args:
      x: bfloat16 ``[..., C]``.
      weights: ``[N, C]``: a projection without lead axes, from :func:`jax_moe.quantize_projection` or
        :func:`jax_moe.checkpoints.load_projection`; on a GPU after :func:`jax_moe.prepare`.
      precision, out_dtype, command_buffer, batch_invariant: as for :func:`ragged_dot`.

    Returns:
      ``[..., N]`` of ``out_dtype``.

    Raises:
      TypeError, ValueError, NotImplementedError: as :func:`ragged_dot`.
    """
    arguments.instance("weights", weights, Projection)
    arguments.array("weights.global_scale", weights.global_scale, jnp.float32, ())
    *leading, in_features = arguments.array("x", x, None, ("...", "C"))
    num_rows = math.prod(leading)
    leaves = {
        name: leaf if leaf is None else jnp.asarray(leaf)[None]
        for name in (field.name for field in dataclasses.fields(Projection))
        for leaf in [getattr(weights, name)]
    }
    y = ragged_dot(
        x.reshape(num_rows, in_features),
        dataclasses.replace(weights, **leaves),
        jnp.full((1,), num_rows, jnp.int32),
        precision=precision,
        out_dtype=out_dtype,
        command_buffer=command_buffer,
        batch_invariant=batch_invariant,
    )
    return y.reshape(*leading, y.shape[-1])
