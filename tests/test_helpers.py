"""The comparison against mutants of the op, and the claims that the case generators make."""

import dataclasses
import pathlib
import types

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
import statement

import jax_moe
from jax_moe import reference


def _swap_gate_and_up(case):
    gate_up = case.experts.gate_up
    swapped = {name: getattr(gate_up, name)[:, ::-1] for name in ("payload", "block_scale", "global_scale")}
    return dataclasses.replace(
        case, experts=dataclasses.replace(case.experts, gate_up=dataclasses.replace(gate_up, **swapped))
    )


def _change_weights(name, leaf, change):
    def mutant(case):
        projection = getattr(case.experts, name)
        projection = dataclasses.replace(projection, **{leaf: change(getattr(projection, leaf))})
        return dataclasses.replace(case, experts=dataclasses.replace(case.experts, **{name: projection}))

    return mutant


def _change_routing(change):
    return lambda case: dataclasses.replace(case, routing=change(case.routing))


def _double_one(array):
    index = tuple(0 for _ in array.shape)
    return array.at[index].multiply(2)


def _double_one_block(array):
    """The exponent of an e4m3 code is bit 3 and up: 8 more is twice the value, for the values that cases have."""
    codes = np.asarray(array).view(np.uint8).copy()
    codes[(0,) * codes.ndim] += 8
    return jnp.asarray(codes.view(array.dtype))


def _flip_nibbles(payload):
    return payload.at[..., 0].set(payload[..., 0] << 4 | payload[..., 0] >> 4)


_MUTANTS = {
    "a dropped slot": _change_routing(lambda r: dataclasses.replace(r, weights=r.weights.at[0, 0].set(0))),
    "a slot's weight given to the next": _change_routing(lambda r: dataclasses.replace(r, weights=r.weights[:, ::-1])),
    "another expert": _change_routing(lambda r: dataclasses.replace(r, expert_ids=(r.expert_ids.at[0, 0].add(1)) % 4)),
    "gate and up swapped": _swap_gate_and_up,
    "gate's global scale for up too": _change_weights(
        "gate_up", "global_scale", lambda s: jnp.broadcast_to(s[:, :1], s.shape)
    ),
    "one global scale off by 2": _change_weights("down", "global_scale", _double_one),
    "one block scale of gate off by 2": _change_weights("gate_up", "block_scale", _double_one_block),
    "one block scale of down off by 2": _change_weights("down", "block_scale", _double_one_block),
    "two codes swapped": _change_weights("gate_up", "payload", _flip_nibbles),
    "no gate bias": _change_weights("gate_up", "bias", lambda b: b.at[:, 0].set(0)),
    "no down bias": _change_weights("down", "bias", lambda b: b * 0),
}


@pytest.fixture(scope="module", params=["w4a16", "w4a4", "w4a4_dynamic"])
def case(request):
    # Every expert gets tokens, so that a mutant of any expert shows.
    return helpers.make_case(7, tokens=24, hidden=64, intermediate=64, bias=True, precision=request.param)


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", _MUTANTS)
def test_the_comparison_catches(name, case, out_dtype):
    wrong = _MUTANTS[name](case).run(out_dtype=out_dtype)
    with pytest.raises(AssertionError, match="relative Frobenius error"):
        helpers.assert_matches(wrong, case.with_options(out_dtype=out_dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y / 2,
        lambda y: y * (1 + 1 / 64),
        lambda y: y * 0,
        lambda y: np.roll(y, 1, axis=0),
        lambda y: np.roll(y, 1, axis=1),
        lambda y: np.where(np.arange(len(y))[:, None] == 3, y * 0, y),
        lambda y: np.where(np.arange(y.size).reshape(y.shape) == 5, np.nan, y).astype(y.dtype),
    ],
    ids=["halved", "1/64 too large", "zeros", "rows shifted", "columns shifted", "one row zero", "one NaN"],
)
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
def test_the_comparison_catches_an_output(change, case, out_dtype):
    case = case.with_options(out_dtype=out_dtype)
    right = case.run()
    helpers.assert_matches(right, case)
    with pytest.raises(AssertionError, match="relative Frobenius error"):
        helpers.assert_matches(change(right).astype(right.dtype), case)


def test_the_comparison_wants_exact_zeros_where_no_expert_is_local():
    case = helpers.make_case(1, expert_offset=0, all_experts=4)
    case = dataclasses.replace(
        case, routing=dataclasses.replace(case.routing, expert_ids=case.routing.expert_ids.at[2].set(99))
    )
    right = case.run()
    helpers.assert_matches(right, case)
    right = right.copy()
    right[2, 3] = 1e-30
    with pytest.raises(AssertionError, match="worst row 2"):
        helpers.assert_matches(right, case)


@pytest.mark.parametrize(
    ("precision", "weight_on", "activation"),
    [
        *[("w4a16", "output", activation) for activation in helpers.ACTIVATIONS],
        ("w4a16", "input", jax_moe.SwiGLU()),
        ("w4a4", "output", jax_moe.GeGLU()),
        ("w4a4", "input", jax_moe.ReLU2()),
        ("w4a4_dynamic", "output", jax_moe.SwiGLU()),
        ("w4a4_dynamic", "input", jax_moe.ReLU2()),
    ],
    ids=str,
)
def test_the_readable_oracle_matches_the_definition(precision, weight_on, activation):
    case = helpers.make_case(
        3, bias=True, activation=activation, precision=precision, weight_on=weight_on, out_dtype=jnp.float32
    )
    case.check(reference.fused_moe)


@pytest.mark.parametrize("precision", ["w4a16", "w4a4", "w4a4_dynamic"])
def test_the_bounds_are_tight(precision):
    """A bound that allows anything would pass everything: at this size it is a few times what is measured."""
    case = helpers.make_case(2, tokens=24, hidden=64, intermediate=64, precision=precision, out_dtype=jnp.float32)
    options = {k: v for k, v in case.options.items() if k != "out_dtype"}
    result = helpers.compare(case.run(), *statement.moe(case.x, case.experts, case.routing, **options))
    assert result.frobenius_bound < {"w4a16": 1e-3, "w4a4": 4e-3, "w4a4_dynamic": 4e-3}[precision], str(result)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_exact_cases_are_exact(precision, gated, weight_on):
    """Every term is a multiple of a grid, and the sum of their magnitudes below 2^24 of it, so no sum rounds."""
    case = helpers.make_exact_case(gated=gated, precision=precision, weight_on=weight_on)
    assert _bits_needed(case) <= 24
    value, _ = statement.moe(case.x, case.experts, case.routing, **case.options)
    assert np.count_nonzero(value) > value.size / 2
    np.testing.assert_array_equal(case.run(out_dtype=jnp.float32).astype(np.float64), value)


def _bits_needed(case) -> int:
    """Bits between the finest term and the largest sum of magnitudes, over GEMM1, GEMM2 and the combine."""
    gate_up, down = case.experts.gate_up, case.experts.down
    first, second = (
        statement.dequantize(statement.unpack(p.payload), p.block_scale).astype(np.float64) for p in (gate_up, down)
    )
    activation, precision, weight_on = (case.options[name] for name in ("activation", "precision", "weight_on"))

    def rounded(values, scale):
        """What a GEMM multiplies, its global scale included."""
        values = values.astype(np.float32)
        if precision == "w4a16":
            return statement.bfloat16(values).astype(np.float64)
        return statement.dequantize(*statement.quantize(values, scale)) * np.float64(scale)

    bits, combined, grids = [], np.zeros(case.x.shape), []
    for expert in range(len(second)):
        token, slot = np.nonzero(np.asarray(case.routing.expert_ids) == expert)
        rows, weight = np.asarray(case.x, np.float32)[token], np.asarray(case.routing.weights)[token, slot][:, None]
        if weight_on == "input":
            rows, weight = rows * weight, np.ones_like(weight)
        pre = []
        for part in range(first.shape[1]):
            matrix = first[expert, part] * float(gate_up.global_scale[expert, part])
            terms = rounded(rows, gate_up.input_scale)[:, None] * matrix
            bias = np.broadcast_to(np.asarray(gate_up.bias, np.float64)[expert, part], terms.shape[:2])
            terms = np.concatenate([terms, bias[..., None]], axis=-1)
            bits.append(np.log2(np.abs(terms).sum(-1).max() / _grid(terms)))
            pre.append(terms.sum(-1))
        h = statement.activate(activation, *pre)
        matrix = second[expert] * float(down.global_scale[expert])
        terms = rounded(h, np.asarray(down.input_scale)[expert])[:, None] * matrix
        bias = np.broadcast_to(np.asarray(down.bias, np.float64)[expert], terms.shape[:2])
        terms = np.concatenate([terms, bias[..., None]], axis=-1) * weight[..., None]
        np.add.at(combined, token, np.abs(terms).sum(-1))
        grids.append(_grid(terms))
    return int(np.ceil(max(*bits, np.log2(combined.max() / min(grids)))))


def _grid(values) -> float:
    """The largest power of two that divides all of them."""
    mantissas, exponents = np.frexp(np.abs(values[values != 0]))
    integers = (mantissas * 2**53).astype(np.int64)
    return float((2.0 ** (exponents - 53) * (integers & -integers)).min())


def test_programs_fail_loudly():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        helpers.run_python("1 / 0")
    assert jax_moe.__name__ in helpers.run_python("import jax_moe; print(jax_moe.__name__)")


def test_each_value_once_leaves_every_value_and_every_test(pytestconfig):
    """What ``--each-value-once`` leaves out are combinations: no value of a parameter, and no test, is lost."""
    (conftest,) = (
        plugin for plugin in pytestconfig.pluginmanager.get_plugins() if hasattr(plugin, "_whose_values_were_seen")
    )

    class Item:
        def __init__(self, test, **params):
            self.path, self.cls, self.originalname = pathlib.Path("test_it.py"), None, test
            if params:
                self.callspec = types.SimpleNamespace(params=params)

    cases = [Item(test, a=a, b=b) for test in ("one", "two") for a in range(3) for b in "xyz"]
    left_out = conftest._whose_values_were_seen([*cases, Item("plain"), Item("alone", a=0)])
    kept = [item for item in cases if item not in left_out]
    for test in ("one", "two"):
        values = [item.callspec.params for item in kept if item.originalname == test]
        assert {value["a"] for value in values} == {0, 1, 2}
        assert {value["b"] for value in values} == {"x", "y", "z"}
        assert len(values) < 9
    assert all(item.originalname in ("one", "two") for item in left_out)
