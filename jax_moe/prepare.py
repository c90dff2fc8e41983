"""Repacking canonical weights into a GPU's kernel layout, once, at load."""

from collections.abc import Iterable
import dataclasses
import functools

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jax_moe import arguments, nvfp4, placement, stacking
from jax_moe.experts import CANONICAL, Experts, Projection, SM_90A
from jax_moe.kernels.sm90 import layout
from jax_moe.progress import track

_E4M3_NAN = 0x7F
_SIGN_BIT = 8
_ZERO = 0  # e5m3 code of a zero scale
_E5M3_FIRST = 13  # e5m3 exponent of 2**-9, the smallest e4m3: see layout.SCALE_EXPONENT


def prepare(experts: Experts, target: str | None = None, *, progress: bool = True) -> Experts:
    """Repacks one layer's experts for the kernels of ``target``; done once, when the weights are loaded.

    Works where the weights are, one expert at a time: beside the input and the result, memory holds a few copies of
    one expert. On a mesh, weights that are placed as :func:`jax_moe.expert_shardings` says stay so, and each device
    repacks its own, with its slice of I padded to whole tiles. Inside ``jax.jit`` a placement over automatic axes is
    not seen: there, a program for several devices is refused. Every size is padded to whole 128 x 64 blocks here, so
    that the kernels need not branch on it.

    Args:
      experts: canonical layout, or that of the target already: then they are returned as they are.
      target: "sm_90a" (H100, H200) or "canonical" (CPUs). None is what JAX's default device needs, so that a program
        may call this wherever it runs.
      progress: show a progress bar on a terminal, if it takes longer than a second and is not on a mesh.

    Returns:
      Experts with ``layout=target``: ``payload`` is uint8 ``[E, row_blocks, k_blocks, 4608]`` with the codes *and*
      block scales of 128 x 64 blocks, ``block_scale`` is None, and ``gate_up.bias`` is padded to whole blocks of I.
      The tiles of I are axis 1 of ``gate_up.payload`` (64 values of I each where there is a gate,
      128 otherwise) and axis 2 of ``down.payload`` (64 values each): shard over experts, or over these.

      A block scale that is NaN makes the *global* scale of its expert and projection NaN, because the prepared
      scales have no NaN. Otherwise every weight keeps its value exactly.

    Raises:
      TypeError: not Experts.
      ValueError: unknown target, no kernels for the default device, or the experts are prepared for another target,
        of several layers, or placed on a mesh in another way; traced for several devices outside ``jax.shard_map``.
    """
    arguments.instance("experts", experts, Experts)
    if target is None:
        target = _default_target()
    if target not in (CANONICAL, SM_90A):
        raise ValueError(f"target: got {target!r}, needs {SM_90A!r} or {CANONICAL!r}")
    if target == experts.layout:
        return experts
    if experts.layout != CANONICAL:
        raise ValueError(
            f"experts.layout: got {experts.layout!r}, needs {CANONICAL!r}: jax_moe.unprepare(experts, ...)"
        )
    _check_rank(experts, "[E, P, I, H/2]", "jax.vmap(jax_moe.prepare) repacks")
    for name, projection in (("gate_up", experts.gate_up), ("down", experts.down)):
        if projection.block_scale is None:
            raise ValueError(f"experts.{name}.block_scale: got None, canonical experts need it")
    if placement.find(experts).mesh is not None:
        return _prepare_in_place(experts)
    return _prepare(experts, progress)


def _check_rank(experts: Experts, shape: str, advice: str) -> None:
    """Raises unless the experts are those of one layer; ``advice`` says what does the same to stacked ones."""
    for name, projection in (("gate_up", experts.gate_up), ("down", experts.down)):
        arguments.instance(f"experts.{name}", projection, Projection)
    rank = len(getattr(experts.gate_up.payload, "shape", ()))
    if rank != 4:
        raise ValueError(
            f"experts.gate_up.payload: got {rank} axes, needs {shape}, the experts of one layer; {advice} "
            "stacked layers"
        )


def _prepare(experts: Experts, progress: bool, tensor_axes: tuple[str, ...] = ()) -> Experts:
    """``tensor_axes``: inside ``shard_map``, the mesh axes that share out I."""
    gate_up, down = experts.gate_up, experts.down
    num_experts, projections, intermediate, _ = gate_up.payload.shape
    gated = projections == 2
    prepared_gate_up = _prepare_projection(
        gate_up, gated, track(range(num_experts), "prepare gate_up", enabled=progress), tensor_axes
    )
    lifted = dataclasses.replace(down, payload=down.payload[:, None], block_scale=down.block_scale[:, None])
    prepared_down = _prepare_projection(
        lifted, False, track(range(num_experts), "prepare down", enabled=progress), tensor_axes
    )
    if gate_up.bias is not None:
        row_blocks = prepared_gate_up.payload.shape[1]
        padding = row_blocks * layout.BLOCK_ROWS // projections - intermediate
        bias = jnp.pad(gate_up.bias, ((0, 0), (0, 0), (0, padding)))
        prepared_gate_up = dataclasses.replace(prepared_gate_up, bias=bias)
    return Experts(gate_up=prepared_gate_up, down=prepared_down, layout=SM_90A)


def _prepare_local(where: placement.Placement, experts: Experts) -> Experts:
    """What one device holds. A slice of I is padded to whole tiles of gate_up and of down alike: they must match."""
    if where.slices > 1:
        experts = _pad_intermediate(experts, layout.BLOCK_ROWS // experts.gate_up.payload.shape[1])
    return _prepare(experts, progress=False, tensor_axes=where.tensor_axes)


_prepare_in_place = placement.InPlace(
    "prepare",
    _prepare_local,
    lambda where, experts: where.specs(
        Experts(*(dataclasses.replace(p, block_scale=None) for p in (experts.gate_up, experts.down)), layout=SM_90A)
    ),
)


def _pad_intermediate(experts: Experts, multiple: int) -> Experts:
    """Pads I of canonical experts with weights and biases of zero."""
    gate_up, down = experts.gate_up, experts.down
    padding = -gate_up.payload.shape[2] % multiple

    def pad(array: jax.Array, count: int) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[2] = (0, count)  # I, in every one of these arrays
        return jnp.pad(array, widths)

    return dataclasses.replace(
        experts,
        gate_up=dataclasses.replace(
            gate_up,
            payload=pad(nvfp4.payload_bytes(gate_up.payload), padding),
            block_scale=pad(gate_up.block_scale, padding),
            bias=None if gate_up.bias is None else pad(gate_up.bias, padding),
        ),
        down=dataclasses.replace(
            down,
            payload=pad(nvfp4.payload_bytes(down.payload), padding // 2),
            block_scale=pad(down.block_scale, padding // nvfp4.BLOCK_SIZE),
        ),
    )


def _default_target() -> str:
    device = jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform != "gpu":
        return CANONICAL
    capability = device.compute_capability
    if capability != "9.0":
        raise ValueError(f"target: got None on a GPU of compute capability {capability}, kernels exist for 9.0 alone")
    return SM_90A


def unprepare(experts: Experts, hidden_size: int, intermediate_size: int) -> Experts:
    """The inverse of :func:`prepare`: canonical experts with the same values, bit for bit where no block scale was
    negative, NaN, or zero over nonzero codes.

    On a mesh they stay where they are, as in :func:`prepare`. I must be in as many slices now as when it was prepared.

    Args:
      experts: prepared for sm_90a, of one layer.
      hidden_size, intermediate_size: H and I without padding.

    Raises:
      TypeError: not Experts, or a size is not an int.
      ValueError: the experts are not prepared, not of these sizes, prepared in another number of slices of I (not seen
        under ``jax.jit``), of several layers, or placed on a mesh in another way than :func:`jax_moe.expert_shardings`
        says; traced for several devices outside ``jax.shard_map``.
    """
    arguments.instance("experts", experts, Experts)
    if experts.layout != SM_90A:
        raise ValueError(f"experts.layout: got {experts.layout!r}, needs {SM_90A!r}")
    hidden_size = arguments.integer("hidden_size", hidden_size)
    intermediate_size = arguments.integer("intermediate_size", intermediate_size)
    _check_rank(experts, "[E, row_blocks, k_blocks, 4608]", "jax.vmap(lambda e: jax_moe.unprepare(e, H, I)) unpacks")
    slices = placement.find(experts).slices
    _check_sizes(experts, hidden_size, intermediate_size, slices)
    canonical, cut = _unprepare_in_place(experts, hidden_size, intermediate_size // slices)
    if not isinstance(cut, jax.core.Tracer) and cut.any():
        raise ValueError(
            f"intermediate_size: got {intermediate_size}, but weights stand where the padding of I in {slices} slices "
            "would be: these experts were prepared in another number of slices"
        )
    return canonical


def _check_sizes(experts: Experts, hidden_size: int, intermediate_size: int, slices: int) -> None:
    """Raises unless ``prepare`` makes experts of this size of such canonical ones, I in ``slices`` slices."""
    block, size = layout.BLOCK_K, nvfp4.BLOCK_SIZE
    blocks = experts.gate_up.payload.shape[2]
    if -(-hidden_size // block) != blocks or hidden_size % size:
        least, most = (blocks - 1) * block + size, blocks * block
        raise ValueError(f"hidden_size: got {hidden_size}, needs a multiple of {size} from {least} to {most}")
    tile = layout.BLOCK_ROWS // experts.gate_up.global_scale.shape[1]
    tiles, blocks = experts.gate_up.payload.shape[1] // slices, experts.down.payload.shape[2] // slices
    # A slice is padded to whole tiles; where I is in one piece, down keeps to its own smaller blocks.
    unit = tile if slices > 1 else block
    most = blocks * block
    least = most - unit + size
    part = intermediate_size // slices
    if intermediate_size % (slices * size) or not least <= part <= most or -(-part // tile) != tiles:
        raise ValueError(
            f"intermediate_size: got {intermediate_size}, needs a multiple of {slices * size} from {slices * least} to "
            f"{slices * most}"
        )


def _unprepare_local(
    where: placement.Placement, experts: Experts, hidden_size: int, intermediate_size: int
) -> tuple[Experts, jax.Array]:
    """The canonical experts, and whether that cut off anything but padding: bool ``[1]``."""
    gate_up, down = experts.gate_up, experts.down
    projections = gate_up.global_scale.shape[1]
    codes, scales = jax.lax.map(functools.partial(_unpack_expert, projections=projections), gate_up.payload)
    bias = None if gate_up.bias is None else gate_up.bias[:, :, :intermediate_size]
    cut = jnp.any(codes[:, :, intermediate_size:])[None]
    canonical_gate_up = dataclasses.replace(
        gate_up,
        payload=nvfp4.pack(codes[:, :, :intermediate_size, :hidden_size]),
        block_scale=scales[:, :, :intermediate_size, : hidden_size // nvfp4.BLOCK_SIZE],
        bias=bias,
    )
    codes, scales = jax.lax.map(functools.partial(_unpack_expert, projections=1), down.payload)
    canonical_down = dataclasses.replace(
        down,
        payload=nvfp4.pack(codes[:, 0, :hidden_size, :intermediate_size]),
        block_scale=scales[:, 0, :hidden_size, : intermediate_size // nvfp4.BLOCK_SIZE],
    )
    return Experts(gate_up=canonical_gate_up, down=canonical_down, layout=CANONICAL), cut


_unprepare_in_place = placement.InPlace(
    "unprepare",
    _unprepare_local,
    lambda where, experts: (
        where.specs(
            Experts(
                *(dataclasses.replace(p, block_scale=p.payload) for p in (experts.gate_up, experts.down)),
                layout=CANONICAL,
            )
        ),
        jax.sharding.PartitionSpec((*where.expert_axes, *where.tensor_axes) or None),
    ),
)


def _prepare_projection(projection: Projection, gated: bool, indices: Iterable[int], tensor_axes) -> Projection:
    """``projection`` with leaves ``[E, P, N, C/2]`` and ``[E, P, N, C/16]``."""
    operands = nvfp4.payload_bytes(projection.payload), projection.block_scale
    operands = placement.refuse_to_gather("prepare", operands)
    payload, nan = stacking.map_in_turn(lambda expert: _pack_expert(*expert, gated=gated), operands, indices)
    if tensor_axes:  # the other slices' scales count too
        nan = jax.lax.pmax(nan.astype(jnp.int32), tensor_axes) > 0
    if projection.global_scale.ndim == 1:
        nan = nan[:, 0]
    return dataclasses.replace(
        projection,
        payload=payload,
        block_scale=None,
        global_scale=jnp.where(nan, jnp.nan, projection.global_scale),
    )


@functools.partial(jax.jit, static_argnames="gated")
def _pack_expert(payload: jax.Array, block_scale: jax.Array, *, gated: bool) -> tuple[jax.Array, jax.Array]:
    """One expert: ``[P, N, C/2]``, ``[P, N, C/16]`` to ``[row_blocks, k_blocks, 4608]``, and which of P have a NaN."""
    projections, rows, _ = payload.shape
    rows_per_block = layout.BLOCK_ROWS // projections
    codes = nvfp4.unpack(payload)
    bits = jax.lax.bitcast_convert_type(block_scale, jnp.uint8)
    magnitude = bits & 0x7F
    # The prepared scales have neither sign nor e4m3's NaN, and a zero one is not zero but leaves its codes to be.
    flip = jnp.where(bits >> 7 == 1, jnp.uint8(_SIGN_BIT), jnp.uint8(0))
    codes = codes.reshape(*bits.shape, nvfp4.BLOCK_SIZE) ^ flip[..., None]
    codes = jnp.where((magnitude == 0)[..., None], jnp.uint8(0), codes).reshape(projections, rows, -1)
    scales = jnp.asarray(_E5M3_OF_E4M3)[magnitude]

    pad_rows = -rows % rows_per_block
    pad_k = -codes.shape[2] % layout.BLOCK_K
    codes = jnp.pad(codes, ((0, 0), (0, pad_rows), (0, pad_k)))
    scales = jnp.pad(scales, ((0, 0), (0, pad_rows), (0, pad_k // nvfp4.BLOCK_SIZE)), constant_values=_ZERO)
    k_blocks = codes.shape[2] // layout.BLOCK_K

    # [P, N, C] -> [row_block, k_block, P * rows_per_block, 64], rows in the order of the register layout
    def blocks(array: jax.Array, width: int) -> jax.Array:
        array = array.reshape(projections, -1, rows_per_block, k_blocks, width)
        array = array.transpose(1, 3, 0, 2, 4).reshape(-1, k_blocks, layout.BLOCK_ROWS, width)
        return jnp.take(array, jnp.asarray(_row_order(gated)), axis=2)

    codes = blocks(codes, layout.BLOCK_K)  # rows are now [half, warp, group, upper]
    codes = codes.reshape(*codes.shape[:2], 2, 4, 8, 2, 4, 2, 4, 2)  # ..., upper, [step, k >= 8, quad, upper_value]
    codes = codes.transpose(
        0, 1, 2, 3, 4, 8, 6, 7, 5, 9
    )  # row_block, k_block, half, warp, group, quad, step, pair, value
    codes = codes.reshape(*codes.shape[:7], 4, 2).astype(jnp.uint32)
    words = jnp.zeros(codes.shape[:7], jnp.uint32)
    for pair in range(4):
        for value in range(2):
            for bit in range(4):
                place = layout.code_bit(pair, value, bit)
                words |= ((codes[..., pair, value] >> bit) & 1) << place

    scales = blocks(scales, layout.BLOCK_K // nvfp4.BLOCK_SIZE).reshape(-1, k_blocks, 2, 4, 8, 2, 4)
    scales = scales.transpose(0, 1, 3, 4, 2, 5, 6).astype(jnp.uint32)  # warp, group, half, upper, step
    scale_words = jnp.zeros(scales.shape[:-1], jnp.uint32)
    for step in range(4):
        for bit in range(8):
            scale_words |= ((scales[..., step] >> bit) & 1) << layout.scale_bit(step, bit)

    def as_bytes(array: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(array.reshape(*array.shape[:2], -1), jnp.uint8).reshape(
            -1, k_blocks, array[0, 0].size * 4
        )

    return jnp.concatenate([as_bytes(words), as_bytes(scale_words)], axis=-1), jnp.any(
        magnitude == _E4M3_NAN, axis=(1, 2)
    )


def _unpack_expert(payload: jax.Array, *, projections: int) -> tuple[jax.Array, jax.Array]:
    """Inverse of ``_pack_expert``, padding included: codes ``[P, N, C]`` and e4m3 scales ``[P, N, C/16]``."""
    row_blocks, k_blocks, _ = payload.shape
    words = jax.lax.bitcast_convert_type(payload.reshape(row_blocks, k_blocks, -1, 4), jnp.uint32)
    words, scale_words = jnp.split(words, [layout.CODE_BYTES // 4], axis=-1)
    words = words.reshape(row_blocks, k_blocks, 2, 4, 8, 4, 4)
    codes = jnp.stack(
        [
            jnp.stack(
                [
                    sum((words >> layout.code_bit(pair, value, bit) & 1) << bit for bit in range(4))
                    for value in range(2)
                ],
                -1,
            )
            for pair in range(4)
        ],
        axis=-2,
    )  # row_block, k_block, half, warp, group, quad, step, pair, value
    codes = codes.reshape(*codes.shape[:7], 2, 2, 2).transpose(0, 1, 2, 3, 4, 8, 6, 7, 5, 9)
    codes = codes.reshape(row_blocks, k_blocks, layout.BLOCK_ROWS, layout.BLOCK_K).astype(jnp.uint8)
    scale_words = scale_words.reshape(row_blocks, k_blocks, 4, 8, 2, 2).transpose(0, 1, 4, 2, 3, 5)
    scales = jnp.stack(
        [sum((scale_words >> layout.scale_bit(step, bit) & 1) << bit for bit in range(8)) for step in range(4)], axis=-1
    ).reshape(row_blocks, k_blocks, layout.BLOCK_ROWS, 4)

    order = np.argsort(_row_order(projections == 2))

    def matrix(array: jax.Array) -> jax.Array:
        array = jnp.take(array, jnp.asarray(order), axis=2)
        array = array.reshape(row_blocks, k_blocks, projections, -1, array.shape[-1]).transpose(2, 0, 3, 1, 4)
        return array.reshape(projections, -1, k_blocks * array.shape[-1])

    return matrix(codes), jax.lax.bitcast_convert_type(jnp.asarray(_E4M3_OF_E5M3)[matrix(scales)], jnp.float8_e4m3fn)


def _row_order(gated: bool) -> np.ndarray:
    """Row of the block (projection major) that stands at each place of ``[half, warp, group, upper]``."""
    order = []
    for half in range(2):
        for warp in range(4):
            for group in range(8):
                for upper in range(2):
                    projection, row = layout.row_in_block(half, warp, group, upper, gated)
                    order.append(projection * (layout.BLOCK_ROWS // 2) + row)
    return np.array(order, np.int32)


def _scale_tables() -> tuple[np.ndarray, np.ndarray]:
    """e4m3 bits without sign -> e5m3 (NaN maps to the largest), and back."""
    to_e5m3 = np.zeros(128, np.uint8)
    for bits in range(1, 127):
        exponent, mantissa = bits >> 3, bits & 7
        if exponent == 0:  # subnormal: mantissa * 2**-9
            shift = 3 - (mantissa.bit_length() - 1)
            to_e5m3[bits] = (_E5M3_FIRST + 3 - shift) << 3 | (mantissa << shift & 7)
        else:  # (1 + mantissa/8) * 2**(exponent - 7)
            to_e5m3[bits] = (_E5M3_FIRST + 2 + exponent) << 3 | mantissa
    to_e5m3[_E4M3_NAN] = to_e5m3[_E4M3_NAN - 1]
    back = np.zeros(256, np.uint8)
    back[to_e5m3[:127]] = np.arange(127, dtype=np.uint8)
    return to_e5m3, back


_E5M3_OF_E4M3, _E4M3_OF_E5M3 = _scale_tables()
