"""``jax_moe.ragged_dot`` and ``jax_moe.linear`` on a CPU: against ``jax.lax.ragged_dot`` and the oracle."""

import dataclasses
import functools

import helpers
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statement

import jax_moe
from jax_moe import layouts, nvfp4


def exact_weights(rng, groups: int, n: int, c: int, *, bias=False) -> jax_moe.Projection:
    """Matrices of small integers times powers of two: every partial sum of a product with such an x is exact."""
    lead = (groups,)
    codes = rng.integers(0, 16, (*lead, n, c)).astype(np.uint8)
    scales = 2.0 ** rng.integers(-1, 2, (*lead, n, c // 16))
    return jax_moe.Projection(
        nvfp4.pack(jnp.asarray(codes)),
        jnp.asarray(scales, jnp.float8_e4m3fn),
        jnp.asarray(2.0 ** rng.integers(-2, 3, lead), jnp.float32),
        jnp.asarray(2.0 ** rng.integers(-3, 2, lead), jnp.float32),
        jnp.asarray(rng.integers(-8, 9, (*lead, n)), jnp.float32) if bias else None,
    )


def exact_x(rng, rows: int, c: int, precision="w4a16") -> jax.Array:
    x = jnp.asarray(rng.integers(-8, 9, (rows, c)) / 4, jnp.bfloat16)
    return x.at[:, 0].set(21 / 8) if precision == "w4a4_dynamic" else x  # its scale of each row is a power of two


def dense(weights: jax_moe.Projection) -> np.ndarray:
    return np.asarray(nvfp4.dequantize(weights.payload, weights.block_scale, weights.global_scale[:, None]), np.float64)


def expected(x, weights, sizes, *, precision="w4a16", offset=0) -> np.ndarray:
    """float64, from the definition: which rows a group has, and its matrix."""
    x = np.asarray(x, np.float64)
    matrices = dense(weights)
    out = np.zeros((x.shape[0], matrices.shape[1]))
    for group, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        local = group - offset
        if not 0 <= local < len(matrices):
            continue
        mine = slice(end - size, end)
        scale = None if weights.input_scale is None else weights.input_scale[local]
        out[mine] = rounded(x[mine], scale, precision) @ matrices[local].T
        if weights.bias is not None:
            out[mine] += np.asarray(weights.bias[local], np.float64)
    return out


def rounded(x: np.ndarray, scale, precision: str) -> np.ndarray:
    if precision == "w4a16":
        return x
    if precision == "w4a4_dynamic":
        scales = statement.row_scales(x.astype(np.float32))
        return statement.dequantize(*statement.quantize(x, scales)) * scales[:, None].astype(np.float64)
    return np.asarray(ROUND(jnp.asarray(np.resize(x, (128, x.shape[1])), jnp.float32), scale), np.float64)[: len(x)]


ROUND = jax.jit(lambda x, scale: nvfp4.dequantize(*nvfp4.quantize(x, scale), scale))


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=10, deadline=None)
def test_rows_are_multiplied_with_the_matrix_of_their_group(data):
    """Bit for bit: all sums are exact, and the output is rounded once."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups, c, n = draw(st.integers(1, 5)), 16 * draw(st.sampled_from([1, 3, 5])), 16 * draw(st.sampled_from([1, 2, 9]))
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 100]), min_size=groups, max_size=groups))
    rows = sum(sizes) + draw(st.sampled_from([0, 0, 1, 9]))
    local = draw(st.integers(1, groups))
    offset = draw(st.integers(0, groups - local))
    precision = draw(st.sampled_from(["w4a16", "w4a4", "w4a4_dynamic"]))
    dtype = draw(st.sampled_from([jnp.bfloat16, jnp.float32]))
    weights = exact_weights(rng, local, n, c, bias=draw(st.booleans()))
    x = exact_x(rng, rows, c, precision)
    got = jax_moe.ragged_dot(
        x, weights, jnp.asarray(sizes, jnp.int32), precision=precision, group_offset=offset, out_dtype=dtype
    )
    want = jnp.asarray(expected(x, weights, sizes, precision=precision, offset=offset), jnp.float32).astype(dtype)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


SIZES = [3, 0, 5, 1]
ROWS, C, N = 12, 48, 32


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    return exact_x(rng, ROWS, C), exact_weights(rng, len(SIZES), N, C, bias=True), jnp.asarray(SIZES, jnp.int32)


def assert_equal(got, want):
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.asarray(want, np.float64))


@pytest.mark.parametrize("precision", ["w4a16", "w4a4", "w4a4_dynamic"])
def test_the_oracle_is_the_same_function(case, precision):
    case = exact_x(np.random.default_rng(0), ROWS, C, precision), *case[1:]
    got = jax.jit(jax_moe.reference.ragged_dot, static_argnames=("precision", "out_dtype"))(
        *case, precision=precision, out_dtype=jnp.float32
    )
    assert_equal(got, expected(*case, precision=precision))


def test_it_means_what_jax_lax_ragged_dot_means(case):
    """On the dequantised matrices, transposed; only a call without a bias has its like there."""
    x, weights, sizes = case
    weights = dataclasses.replace(weights, bias=None)
    rhs = jnp.asarray(dense(weights).swapaxes(1, 2), jnp.float32)
    want = jax.lax.ragged_dot(x.astype(jnp.float32), rhs, sizes, precision=jax.lax.Precision.HIGHEST)
    assert_equal(jax_moe.ragged_dot(x, weights, sizes, out_dtype=jnp.float32), want)


@pytest.mark.parametrize("sizes", [[-2, 3, -1, 4], [5, 100, 7, 1], [2**31 - 1] * 4, [0] * 4], ids=str)
def test_sizes_that_do_not_fit_are_cut(case, sizes):
    """A caller's bug: no row is read or written that is not there, and none is left as it was."""
    x, weights, _ = case
    got = jax_moe.ragged_dot(x, weights, jnp.asarray(sizes, jnp.int32), out_dtype=jnp.float32)
    cut, left = [], ROWS
    for size in sizes:
        cut.append(min(max(size, 0), left))
        left -= cut[-1]
    assert_equal(got, expected(x, weights, cut))
    many = jnp.stack([jnp.asarray(sizes, jnp.int32)] * 2)
    call = functools.partial(jax_moe.ragged_dot, out_dtype=jnp.float32)
    for axes, given in ((None, many[0]), (0, many)):
        assert_equal(jax.vmap(call, in_axes=(0, None, axes))(jnp.stack([x, x]), weights, given)[1], got)
    grad, cut_grad = (
        jax.grad(lambda x, sizes=sizes: call(x, weights, sizes).sum())(x)
        for sizes in (many[0], jnp.asarray(cut, jnp.int32))
    )
    assert_equal(grad, cut_grad)


@pytest.mark.parametrize("offset", [0, 2, 3, 4, 1000, 2**31 - 1])
def test_groups_from_an_offset(case, offset):
    x, weights, sizes = case
    two = jax.tree.map(lambda leaf: leaf[:2], weights)
    run = jax.jit(jax_moe.ragged_dot, static_argnames="out_dtype")
    got = run(x, two, sizes, group_offset=jnp.int32(offset), out_dtype=jnp.float32)
    assert_equal(got, expected(x, two, SIZES, offset=offset))


def test_a_program_is_one_custom_call_and_zeroes_nothing_else(case):
    text = jax.jit(jax_moe.ragged_dot).lower(*case).as_text()
    assert text.count("stablehlo.custom_call") == 1
    assert jax_moe.ffi.PRODUCT_TARGET in text


def test_the_devices_of_a_mesh_add_up(case):
    """Each has two of the groups: what the others' rows get there is exactly zero."""
    x, weights, sizes = case
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec

    def local(x, weights, sizes):
        offset = 2 * jax.lax.axis_index("expert")
        y = jax_moe.ragged_dot(x, weights, sizes, group_offset=offset, out_dtype=jnp.float32)
        return jax.lax.psum(y, "expert")

    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("expert"), P()), out_specs=P())
    assert_equal(jax.jit(run)(x, weights, sizes), expected(*case))
    placed = jax.device_put(weights, jax.sharding.NamedSharding(mesh, P("expert")))
    with pytest.raises(ValueError, match="ragged_dot: this call is spread over 2 devices"):
        jax.jit(jax_moe.ragged_dot)(x, placed, sizes)


@pytest.mark.parametrize("precision", ["w4a16", "w4a4", "w4a4_dynamic"])
def test_gradient_through_frozen_weights(case, precision):
    """Forward and reverse mode are the matrices themselves, rounding or not; and the second derivative is that of what
    is around."""
    x, weights, sizes = case
    cotangent = jnp.asarray(np.random.default_rng(1).integers(-4, 5, (ROWS, N)), jnp.float32)

    def call(x):
        return jax_moe.ragged_dot(x, weights, sizes, precision=precision, out_dtype=jnp.float32)

    _, vjp = jax.vjp(call, x)
    want = np.zeros((ROWS, C))
    for group, (end, size) in enumerate(zip(np.cumsum(SIZES), SIZES, strict=True)):
        want[end - size : end] = np.asarray(cotangent, np.float64)[end - size : end] @ dense(weights)[group]
    assert_equal(vjp(cotangent)[0], jnp.asarray(want, jnp.bfloat16))
    _, dy = jax.jvp(call, (x,), (x,))
    assert_equal(dy, expected(x, dataclasses.replace(weights, bias=None), SIZES))

    def loss(x):
        return (call(x) ** 2).sum()

    hessian_x = jax.jvp(jax.grad(loss), (x,), (x,))[1]
    assert_equal(hessian_x, vjp(2 * dy)[0])
    with pytest.raises(NotImplementedError, match=r"differentiated with respect to weights\.global_scale"):
        jax.grad(lambda scale: jax_moe.ragged_dot(x, dataclasses.replace(weights, global_scale=scale), sizes).sum(),
                 allow_int=True)(weights.global_scale)  # fmt: skip


@pytest.mark.parametrize("axes", [(0, None), (1, 0), (None, 0)], ids=str)
def test_vmap_makes_more_rows(case, axes):
    x, weights, sizes = case
    xs = jnp.stack([x, x[::-1], 2 * x], axes[0]) if axes[0] is not None else x
    many = jnp.asarray([SIZES, [0, 12, 0, 0], [1, 2, 3, 4]], jnp.int32) if axes[1] is not None else sizes

    def call(x, sizes):
        return jax_moe.ragged_dot(x, weights, sizes, out_dtype=jnp.float32)

    got = jax.vmap(call, in_axes=axes)(xs, many)
    for i in range(3):
        one = xs if axes[0] is None else jnp.take(xs, i, axes[0])
        assert_equal(got[i], expected(one, weights, SIZES if axes[1] is None else np.asarray(many)[i]))
    grads = jax.vmap(jax.grad(lambda x, sizes: call(x, sizes).sum()), in_axes=axes)(xs, many)
    assert_equal(grads[1], jax.grad(lambda x: call(x, many[1] if axes[1] == 0 else sizes).sum())(
        xs if axes[0] is None else jnp.take(xs, 1, axes[0])))  # fmt: skip


def test_vmap_over_weights_is_refused(case):
    x, weights, sizes = case
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weights)
    with pytest.raises(NotImplementedError, match="ragged_dot: vmap over weights"):
        jax.vmap(lambda weights: jax_moe.ragged_dot(x, weights, sizes))(stacked)


@pytest.mark.parametrize("shape", [(C,), (5, C), (2, 3, C), (0, C)], ids=str)
def test_linear(shape):
    rng = np.random.default_rng(2)
    weights = jax.tree.map(lambda leaf: leaf[0], exact_weights(rng, 1, N, C, bias=True))
    lifted = jax.tree.map(lambda leaf: leaf[None], weights)
    for precision in ("w4a16", "w4a4", "w4a4_dynamic"):
        x = exact_x(rng, 6, C, precision)[: int(np.prod(shape[:-1], dtype=int))].reshape(shape)
        got = jax.jit(jax_moe.linear, static_argnames="precision")(x, weights, precision=precision)
        rows = x.reshape(-1, C)
        want = jnp.asarray(expected(rows, lifted, [len(rows)], precision=precision), jnp.bfloat16)
        assert_equal(got, want.reshape(*shape[:-1], N))


def test_linear_over_stacked_layers():
    """As a model scans its layers."""
    rng = np.random.default_rng(3)
    layers = dataclasses.replace(exact_weights(rng, 3, C, C), input_scale=None)
    x = exact_x(rng, 4, C)
    got, _ = jax.lax.scan(lambda x, weights: (jax_moe.linear(x, weights), None), x, layers)
    want = x
    for i in range(3):
        want = jax_moe.linear(want, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
    assert_equal(got, want)


def test_quantize_projection():
    dense_weights = np.random.default_rng(4).normal(size=(2, N, C)).astype(np.float32)
    weights = jax_moe.quantize_projection(dense_weights, bias=dense_weights[:, :, 0])
    one = jax_moe.quantize_projection(dense_weights[1])
    experts = jax_moe.quantize_experts(
        None, dense_weights.swapaxes(1, 2)[:, :, :N], dense_weights[:, :N], progress=False
    )
    assert_equal(dense(weights), dense(experts.down))
    assert_equal(dense(weights)[1], dense(jax.tree.map(lambda leaf: leaf[None], one))[0])
    assert weights.bias.dtype == jnp.float32
    with pytest.raises(ValueError, match="C a multiple of 16"):
        jax_moe.quantize_projection(dense_weights[..., :40])


@pytest.mark.parametrize(("target", "precision"), [("sm_90a", "w4a16"), ("sm_100f", "w4a16"), ("sm_100f", "w4a4")])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_prepared_matrices_have_the_same_values(target, precision, lead):
    """Unprepared they are what they were, eagerly and under jit."""
    rng = np.random.default_rng(5)
    flat = exact_weights(rng, int(np.prod(lead, dtype=int)), 144, 80, bias=True)
    weights = jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), flat)
    prepared = jax_moe.prepare(weights, target, precision)
    assert isinstance(prepared, jax_moe.PreparedProjection)
    assert (prepared.out_features, prepared.global_scale.shape) == (144, lead)
    for unprepare in (jax_moe.unprepare, jax.jit(jax_moe.unprepare, static_argnums=1)):
        again = unprepare(prepared, 80)
        assert type(again) is jax_moe.Projection
        jax.tree.map(helpers.assert_bit_equal, again, weights)
    last = prepared.payload.reshape(-1, *prepared.payload.shape[-3:])[-1]
    unpacked = layouts.get(prepared.layout).unpack_matrix(last, 144, 80)  # as the derivative does
    jax.tree.map(helpers.assert_bit_equal, unpacked, (flat.payload[-1], flat.block_scale[-1]))
    for size, message in ((64, "weights stand where the padding"), (72, "a multiple of 16"), (0, "from 16 to")):
        with pytest.raises(ValueError, match=f"hidden_size: got {size}, .*{message}"):
            jax_moe.unprepare(prepared, size)
    assert jax_moe.prepare(prepared, target, precision) is prepared
    assert jax_moe.prepare(weights, "canonical") is weights
    if lead == (2,):
        with pytest.raises(ValueError, match="on a CPU ragged_dot needs 'canonical'"):
            jax_moe.ragged_dot(exact_x(rng, 3, 80), prepared, jnp.asarray([1, 2], jnp.int32))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros((3, C), np.float32)}, TypeError, "x: got dtype float32"),
        ({"x": jnp.zeros((3, 40), jnp.bfloat16)}, ValueError, "x: got C = 40, needs a positive multiple of 16"),
        ({"x": jnp.zeros((3, 64), jnp.bfloat16)}, ValueError, r"weights\.payload: got shape"),
        ({"group_sizes": jnp.zeros(4, jnp.float32)}, TypeError, "group_sizes: got dtype float32"),
        ({"group_sizes": jnp.zeros(5, jnp.int32)}, ValueError, "group_sizes: got 5 sizes, weights have 4 groups"),
        ({"group_offset": -1}, ValueError, "group_offset: got -1"),
        ({"group_offset": 1.0}, TypeError, "group_offset: got float"),
        ({"precision": "w8"}, ValueError, "precision: got 'w8'"),
        ({"out_dtype": jnp.float16}, TypeError, "out_dtype: got float16"),
        ({"batch_invariant": 1}, TypeError, "batch_invariant: got int, needs bool"),
        ({"weights": None}, TypeError, "weights: got NoneType, needs Projection"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_errors_name_the_argument(case, changes, error, message):
    x, weights, sizes = case
    arguments = {"x": x, "weights": weights, "group_sizes": sizes} | changes
    with pytest.raises(error, match=message):
        jax_moe.ragged_dot(**arguments)


def test_a_cpu_is_batch_invariant_anyway(case):
    x, weights, sizes = case
    assert_equal(jax_moe.ragged_dot(x, weights, sizes, batch_invariant=True), jax_moe.ragged_dot(x, weights, sizes))


def test_w4a4_needs_a_scale(case):
    x, weights, sizes = case
    with pytest.raises(ValueError, match=r"weights\.input_scale: got None"):
        jax_moe.ragged_dot(x, dataclasses.replace(weights, input_scale=None), sizes, precision="w4a4")
    one = dataclasses.replace(weights, input_scale=jnp.float32(0.5))
    each = dataclasses.replace(weights, input_scale=jnp.full(len(SIZES), 0.5, jnp.float32))
    assert_equal(*(jax_moe.ragged_dot(x, w, sizes, precision="w4a4") for w in (one, each)))


def test_exported_and_loaded(case):
    exported = jax.export.export(jax.jit(jax_moe.ragged_dot), disabled_checks=jax_moe.export_checks())(*case)
    again = jax.export.deserialize(exported.serialize())
    assert_equal(again.call(*case), jax_moe.ragged_dot(*case))
