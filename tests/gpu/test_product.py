"""``ragged_dot`` on a GPU against its definition, bit for bit where all sums are exact."""

import importlib

import calls
import helpers
import jax.numpy as jnp
import numpy as np
from product_cases import defined, expected, make_case, ProductCase
import pytest

from jax_moe import ffi

program = importlib.import_module(calls.target().program.__module__)
_CAPTURE = {"xla_gpu_graph_min_graph_size": 1}
_EAGER = {"xla_gpu_enable_command_buffer": ""}
_SIZES = dict(in_features=336, out_features=400)  # neither is a multiple of a weight block
_VARIANTS = (
    dict(precision="w4a16", out_dtype=jnp.bfloat16, bias=False),
    dict(precision="w4a4", out_dtype=jnp.float32, bias=True),
    dict(precision="w4a16", out_dtype=jnp.float32, bias=True),
    dict(precision="w4a4", out_dtype=jnp.bfloat16, bias=False),
    dict(precision="w4a4_dynamic", out_dtype=jnp.float32, bias=True),
    dict(precision="w4a4_dynamic", out_dtype=jnp.bfloat16, bias=False),
)[: 6 if "w4a4_dynamic" in calls.target().layouts else 4]
"""Every two of the first four that are neighbours have each type, and a bias or none."""
_PRECISIONS = list(dict.fromkeys(variant["precision"] for variant in _VARIANTS))


def _sizes(rng, groups: int, rows: int) -> np.ndarray:
    """Of so many groups, some of them empty; they may leave some rows over."""
    shares = rng.dirichlet(np.full(groups, 0.7))
    used = rows - rng.integers(0, 1 + rows // 8)
    return rng.multinomial(used, shares).astype(np.int32)


def _arguments(case: ProductCase):
    return case.x, jnp.asarray(case.group_sizes), jnp.int32(case.group_offset)


def _run(case: ProductCase, poison, times=3, compiler_options=_CAPTURE, **options) -> np.ndarray:
    """The last of some results: with capture, the first call is eager, then one is captured, then there are replays."""
    function, weights = calls.product(case, **options)
    op = calls.jit(function, compiler_options)
    for _ in range(times):
        poison(0.25)
        out = op(*_arguments(case), weights)
    return np.asarray(out)


@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("groups", [1, 8, 128])
@pytest.mark.parametrize("rows", [1, 9, 33, 150, 513, 2049, 8192])
def test_exact_products_have_the_bits_of_their_definition(poison, rows, groups, precision):
    rng = np.random.default_rng(rows + groups)
    # A quarter of the groups is elsewhere, on either side.
    local, offset = (groups, 0) if groups == 1 else (groups - groups // 4, groups // 8)
    sizes = _sizes(rng, groups, rows) if groups > 1 else [rows]
    variant = next(v for v in _VARIANTS[2 * (rows % 2) :] if v["precision"] == precision)
    case = make_case(rows, sizes, rows, local_groups=local, group_offset=offset, **_SIZES, **variant)
    outs = [_run(case, poison, compiler_options=options) for options in (_EAGER, _CAPTURE)]
    wanted = expected(case) + 0
    for out in outs:
        helpers.assert_bit_equal(out + 0, wanted)  # zeros may differ in sign: 0 - 0 depends on the order


@pytest.mark.parametrize("variant", range(len(_VARIANTS)))
@pytest.mark.parametrize("rows", [5, 300])
def test_random_values_are_within_their_bound(poison, rows, variant):
    sizes = _sizes(np.random.default_rng(rows), 8, rows)
    case = make_case(rows, sizes, rows, exact=False, in_features=2880, out_features=1536, **_VARIANTS[variant])
    out = _run(case, poison)
    result = helpers.compare(out, *defined(case))
    assert result.passes, str(result)


_FORMS = []
if hasattr(program, "linear_form"):  # sm_90a's
    for index, config in enumerate((*program.CONFIGS, program.FEW_UNITS)):
        _FORMS += [(config, 1), (config, program.SPLITS[1 + index % 3])]


@pytest.mark.parametrize("form", _FORMS, ids=lambda form: f"{form[0].name}-{form[1]}")
def test_one_matrix_in_every_form(poison, monkeypatch, form):
    """Whatever would be chosen: CTAs that share a contraction of 17 blocks, rows behind the group's, hostile sizes."""
    monkeypatch.setattr(program, "linear_form", lambda *_: form)
    tile = form[0].token_tile
    for rows, size, offset in ((1, 1, 0), (tile + 1, tile - 3, 0), (3 * tile, 2**31 - 1, 0), (5, -7, 0), (5, 5, 1)):
        case = make_case(rows, [size], rows, group_offset=offset, local_groups=1, in_features=1088, out_features=400,
                         **_VARIANTS[_FORMS.index(form) // 2 % 2])  # fmt: skip
        helpers.assert_bit_equal(_run(case, poison) + 0, expected(case) + 0)


@pytest.mark.skipif(not _FORMS, reason="needs a Hopper GPU: others have no such form")
def test_replays_of_sums_that_ctas_share(poison, monkeypatch):
    """They are added in one order, however late each is, and nobody reads what another has not yet written."""
    monkeypatch.setattr(program, "linear_form", lambda *_: (program.CONFIGS[1], 4))
    case = make_case(8, [16], 16, exact=False, in_features=4096, out_features=4096, **_VARIANTS[2])
    function, weights = calls.product(case)
    op, first = calls.jit(function, _CAPTURE), None
    for i in range(500):
        if i % 100 == 0:
            poison(0.25)
        out = np.asarray(op(*_arguments(case), weights))
        first = out if first is None else first
        helpers.assert_bit_equal(out, first)
    result = helpers.compare(first, *defined(case))
    assert result.passes, str(result)


_HOSTILE = {
    "negative": dict(group_sizes=[-3, 4, -(2**31), 5], rows=12),
    "beyond the rows": dict(group_sizes=[3, 2**31 - 1, 7, 2**31 - 1], rows=40),
    "no group": dict(group_sizes=[4, 3], rows=64, group_offset=9, local_groups=2),
    "before the first": dict(group_sizes=[4, 3], rows=64, group_offset=-(2**31), local_groups=3),
    "half of them": dict(group_sizes=[4, 30], rows=64, group_offset=-2, local_groups=5),
    "thousands": dict(group_sizes=[1] * 3000, rows=2500, group_offset=700, local_groups=2000),
}


@pytest.mark.parametrize("variant", range(2))
@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_sizes_and_offsets(poison, name, variant):
    case = make_case(3, **_HOSTILE[name], in_features=64, out_features=48, **_VARIANTS[variant])
    helpers.assert_bit_equal(_run(case, poison) + 0, expected(case) + 0)


@pytest.mark.parametrize("options", [_EAGER, _CAPTURE], ids=["eager", "captured"])
def test_many_addresses_sizes_and_offsets(poison, options):
    """Sizes and offset are data: one program, one captured graph, another answer each time."""
    case, rng, kept = (
        make_case(4, [0] * 12, 300, local_groups=7, **_SIZES, **_VARIANTS[1]),
        np.random.default_rng(4),
        [],
    )
    function, weights = calls.product(case)
    op = calls.jit(function, options)
    for i in range(24):
        x = jnp.roll(case.x, i, axis=0)
        now = helpers.dataclasses.replace(case, x=x, group_sizes=_sizes(rng, 12, 300), group_offset=i % 7 - 1)
        poison(0.25)
        out = op(*_arguments(now), weights)
        kept += [x, out] if i % 3 else [x]
        helpers.assert_bit_equal(np.asarray(out) + 0, expected(now) + 0)


def test_products_in_one_program_are_captured_and_never_forked(poison, graphs):
    cases = [make_case(seed, [100, 60, 90], 260, **_SIZES, **_VARIANTS[seed % 2]) for seed in range(4)]
    made = [calls.product(case) for case in cases]

    def program(arguments, weights):
        return [function(*a, w) for (function, _), a, w in zip(made, arguments, weights, strict=True)]

    op = calls.jit(program, _CAPTURE)
    before = ffi.counters()
    for _ in range(3):
        poison(0.25)
        outs = op([_arguments(case) for case in cases], [weights for _, weights in made])
    counted = [b - a for a, b in zip(before, ffi.counters(), strict=True)]
    for case, out in zip(cases, outs, strict=True):
        helpers.assert_bit_equal(np.asarray(out) + 0, expected(case) + 0)
    assert counted[1] >= len(cases)
    assert counted[2] == 0
    assert graphs()
    assert not any("MEMSET" in graph.upper() for graph in graphs())


def test_the_other_target_is_never_captured(poison):
    case = make_case(5, [30, 3], 40, **_SIZES, **_VARIANTS[0])
    before = ffi.counters()
    helpers.assert_bit_equal(_run(case, poison, command_buffer=False) + 0, expected(case) + 0)
    after = ffi.counters()
    assert (after.captured, after.eager) == (before.captured, before.eager + 3)


@pytest.mark.parametrize("variant", range(4))
def test_rows_of_no_local_group_are_never_read(poison, variant):
    case = make_case(6, [30, 40, 50], 150, group_offset=1, local_groups=1, **_SIZES, **_VARIANTS[variant])
    x = case.x.at[:30].set(jnp.nan).at[70:].set(jnp.nan)
    helpers.assert_bit_equal(_run(helpers.dataclasses.replace(case, x=x), poison) + 0, expected(case) + 0)


def test_a_product_between_others_reads_what_they_wrote(poison):
    """Overlapping launches: x, sizes and offset come from the operation right before, and the result goes on."""
    case = make_case(7, [3, 40, 0, 21], 70, **_SIZES, **_VARIANTS[1])
    function, weights = calls.product(case)

    def program(x, sizes, offset, weights):
        out = function(x * 1, sizes + 0 * offset, offset, weights)
        again = function(jnp.roll(x, 1, axis=0), jnp.roll(sizes, 1), offset + jnp.isnan(out[0, 0]), weights)
        return out, again

    op = calls.jit(program, _CAPTURE)
    rolled = helpers.dataclasses.replace(case, x=jnp.roll(case.x, 1, axis=0), group_sizes=np.roll(case.group_sizes, 1))
    for _ in range(6):
        poison(0.25)
        outs = op(*_arguments(case), weights)
    for out, one in zip(outs, (case, rolled), strict=True):
        helpers.assert_bit_equal(np.asarray(out) + 0, expected(one) + 0)
