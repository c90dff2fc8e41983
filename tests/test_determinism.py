"""What docs/determinism.md promises, on a CPU; what it promises of a GPU is in tests/gpu/test_determinism.py.

XLA chooses other code for other shapes only where it optimises, and conftest.py keeps it from that: what depends on
XLA's arithmetic runs in a process that compiles as users do.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import shutil

import cuda_call
import emulated_call
import frozen
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import shapes
from jax_moe.kernels import targets
from jax_moe.kernels.sm90 import program
from jax_moe.kernels.sm90.target import SM90
from jax_moe.kernels.target import Card

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "determinism.md").read_text()
MODES = [(precision, combine) for precision in ("w4a16", "w4a4") for combine in ("atomic", "ordered")]


# --- fused_moe on a CPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [dict(precision=p, combine=c) for p, c in MODES]
    + [dict(weight_on="input", precision="w4a4"), dict(weight_on="input", out_dtype=jnp.bfloat16)],
    ids=lambda options: "-".join(f"{getattr(v, '__name__', v)}" for v in options.values()),
)
def test_a_token_has_the_same_bits_in_any_batch(options):
    """Alone, among others, in another place: an expert has 1 to 200 rows, so tiles and blocks of rows are all kinds."""
    case = frozen.case(330).with_options(**{"out_dtype": jnp.float32} | options)
    expected = case.run()
    order = np.argsort(frozen.numbers((330,), 4), kind="stable")
    for chosen in ([329], range(7, 15), range(100, 297), order):
        helpers.assert_bit_equal(frozen.rows(case, chosen).run(), expected[np.asarray(chosen)])
    # Where its neighbours are others: the same call, the same number of tokens.
    others = dataclasses.replace(case, x=case.x.at[1:].set(-case.x[:-1]))
    helpers.assert_bit_equal(others.run()[:1], expected[:1])


def test_ordered_and_atomic_differ_where_a_token_has_three_experts():
    """What is not promised: the one sums in the order of slots, the CPU's other one in that of experts."""
    case = frozen.case(40).with_options(out_dtype=jnp.float32)
    assert (case.run(combine="ordered") != case.run(combine="atomic")).any()
    case = dataclasses.replace(case, routing=jax.tree.map(lambda a: a[:, :2], case.routing))
    helpers.assert_bit_equal(case.run(combine="ordered"), case.run(combine="atomic"))


def test_eager_and_jitted_calls_have_the_same_bits():
    case = frozen.case(9).with_options(precision="w4a4", combine="ordered")
    jitted = jax.jit(functools.partial(jax_moe.fused_moe, **case.options))
    helpers.assert_bit_equal(np.asarray(jitted(case.x, case.experts, case.routing)), case.run())


@pytest.mark.parametrize(("precision", "combine"), MODES)
def test_the_cpu_gives_what_it_always_gave(precision, combine):
    """With every jaxlib, on every machine and in every process: the numbers are the handler's alone."""
    case = frozen.case(37).with_options(precision=precision, combine=combine, out_dtype=jnp.float32)
    assert frozen.digest(case.run()) == frozen.FUSED_MOE[f"{precision}-{combine}"]


# --- On a mesh ----------------------------------------------------------------------------------------------------


def _sharded(case, axes: dict, **options) -> np.ndarray:
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    experts = jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh))
    run = jax.jit(functools.partial(jax_moe.sharded_moe, mesh=mesh, **case.options, **options))
    return np.asarray(run(case.x, experts, case.routing))


@pytest.mark.parametrize(("precision", "combine"), [MODES[0], MODES[3]])
def test_tokens_that_are_spread_have_the_bits_of_one_device(precision, combine):
    case = frozen.case(24, hidden=64).with_options(precision=precision, combine=combine)
    helpers.assert_bit_equal(_sharded(case, {"data": 4}), case.run())


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(("precision", "combine"), [MODES[1], MODES[2]])
def test_two_experts_a_token_on_any_devices_have_the_bits_of_one(precision, combine, spread):
    """At most two parts are not zero, and two numbers have one sum."""
    case = frozen.case(24, hidden=64, num_experts=8, top_k=2)
    case = case.with_options(precision=precision, combine=combine, out_dtype=jnp.float32)
    got = _sharded(case, {"expert": 4}, **({"data_axis": "expert"} if spread else {}))
    helpers.assert_bit_equal(got + np.float32(0), case.run() + np.float32(0))


# --- What XLA computes --------------------------------------------------------------------------------------------

_AS_USERS_COMPILE = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
import frozen
from jax_moe import exchange, nvfp4
from jax.sharding import PartitionSpec as P

logits = jnp.asarray(frozen.floats((96, 128), 5)) * 2

def same(a, b):
    return jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), a, b))

eager, found = frozen.every_route(logits), {}
third = jnp.float32(1 / 3)
tripled = frozen.every_route(logits * third)
got = jax.jit(frozen.every_route)(logits[:1])
found |= {f"{name}, one token": same(got[name], jax.tree.map(lambda a: a[:1], eager[name])) for name in got}
got = jax.jit(lambda logits: frozen.every_route(logits * third))(logits)
found |= {f"{name}, of a product": same(got[name], tripled[name]) for name in got}

x, scale = jnp.asarray(frozen.floats((512, 256), 6), jnp.bfloat16), jnp.float32(1 / 700)
codes = nvfp4.quantize(x, scale)
for count in (1, 33, 512):
    got = jax.jit(nvfp4.quantize)(x[:count], scale)
    found[f"quantize, jitted, {count} rows"] = same(
        [a.view(jnp.uint8) for a in got], [a[:count].view(jnp.uint8) for a in codes]
    )

mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
def add_up(parts):
    run = lambda part: exchange.add_up(part[0], scattered=("expert",), summed=())
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))(parts)
parts = jnp.asarray(frozen.floats((8, 512, 256), 7), jnp.bfloat16)
total = add_up(parts)
for count in (8, 64):
    found[f"bfloat16 parts of {count} tokens"] = same(add_up(parts[:, :count]), total[:count])
json.dump({"found": {name: bool(is_same) for name, is_same in found.items()},
           "digests": frozen.route_digests(eager)}, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def as_users_compile(tmp_path_factory):
    path = tmp_path_factory.mktemp("determinism") / "found.json"
    helpers.run_python(_AS_USERS_COMPILE, path, XLA_FLAGS="")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", [*frozen.METHODS, *frozen.SCORES])
def test_a_route_has_the_same_bits_whatever_the_batch(as_users_compile, name):
    """Eager, jitted, fused with what makes the logits; 1 token, which XLA treats like a scalar, and 96, for which it
    has another ``exp`` on a CPU."""
    found = {key: is_same for key, is_same in as_users_compile["found"].items() if key.startswith(f"{name}, ")}
    assert len(found) == 2
    assert [key for key, is_same in found.items() if not is_same] == []


@pytest.mark.parametrize("name", [*frozen.METHODS, *frozen.SCORES])
def test_routes_are_what_they_always_were(as_users_compile, name):
    """With every jaxlib: nothing that rounds is XLA's."""
    assert as_users_compile["digests"][name] == frozen.ROUTES[name]


@pytest.mark.parametrize("what", ["quantize", "bfloat16 parts"])
def test_what_xla_computes_has_the_same_bits_for_any_tokens(as_users_compile, what):
    found = {key: is_same for key, is_same in as_users_compile["found"].items() if key.startswith(what)}
    assert len(found) > 1
    assert [key for key, is_same in found.items() if not is_same] == []


def test_the_scale_of_x_is_that_of_its_largest_value():
    """A maximum has no order; a batch in parts has the same."""
    case = frozen.case(16, hidden=64)
    scale = jax_moe.calibrate(helpers.without_input_scales(case.experts), case.x, case.routing).gate_up.input_scale
    helpers.assert_bit_equal(scale, np.abs(np.float32(case.x)).max() / np.float32(6 * 448))


# --- Plans of a GPU -----------------------------------------------------------------------------------------------

CARDS = SM90.cards[:2]
"""An H200 and an H100 SXM: those that the page has figures of."""


@functools.cache
def first_tokens_of_the_other_order(card: Card, top_k: int, num_experts: int) -> int:
    """The least T whose plan sums in one order of all blocks; below it, all plans sum even and odd blocks apart."""
    ways = [program.best_config(card, tokens, top_k, num_experts).k_warpgroups for tokens in range(1, 1025)]
    first = ways.index(1)
    assert ways == [2] * first + [1] * (1024 - first)
    return first + 1


def test_the_page_says_where_the_order_of_sums_changes():
    table = re.findall(r"^\| ([\w.-]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    assert len(table) > 3
    for name, num_experts, top_k, *tokens in table:
        model = shapes.MODELS[name]
        assert (model.num_experts, model.top_k) == (int(num_experts), int(top_k))
        for card, first in zip(CARDS, tokens, strict=True):
            assert first_tokens_of_the_other_order(card, model.top_k, model.num_experts) == int(first)


def test_the_page_says_where_the_order_of_a_linear_changes():
    """4096 x 4096: k warpgroups, and CTAs that share a unit, are what the order depends on."""
    said = re.search(
        r"4096 inputs and outputs it changes at T = ([\d, ]+) on an H200, and at T = ([\d, ]+) on an H100", PAGE
    )
    for card, changes in zip(CARDS, said.groups(), strict=True):
        orders = []
        for rows in range(1, 1500):
            config, split = program.linear_form(card, rows, 4096 // 128, 4096 // 64)
            orders.append((config.k_warpgroups, split))
        assert [i + 1 for i in range(1, len(orders)) if orders[i] != orders[i - 1]] == list(
            map(int, changes.split(","))
        )


def test_the_page_says_which_few_tokens_have_orders_of_their_own():
    table = dict(re.findall(r"^\| ([\w.-]+) \| ([\d, ]+|none) \|$", PAGE, re.MULTILINE))
    assert set(table) == set(shapes.MODELS)
    for name, model in shapes.MODELS.items():
        problem = functools.partial(
            cuda_call.problem, local_experts=model.num_experts, top_k=model.top_k, hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size, activation=jax_moe.SwiGLU(),
        )  # fmt: skip
        for card in CARDS:
            with targets.planned_for(card):
                launches = {tokens: cuda_call.program(problem(num_tokens=tokens)).launches for tokens in range(1, 65)}
            few = [
                str(tokens)
                for tokens, each in launches.items()
                if any(
                    getattr(launch.spec, "config", None) in (program.FEW_UNITS, program.SPLIT_UNITS) for launch in each
                )
            ]
            assert table[name] == (", ".join(few) or "none")


@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here")
def test_plans_of_hopper_sum_in_two_orders(monkeypatch):
    """Widths, warpgroups that share tokens, stages: none of these is seen in the sums; two k warpgroups are.

    The plans for few rows of both orders, and a wide one; tests/gpu/test_determinism.py has all plans.
    """
    case = helpers.make_case(4, tokens=23, num_experts=3, top_k=2, hidden=400, intermediate=208, combine="ordered",
                             out_dtype=jnp.float32)  # fmt: skip
    results = {1: [], 2: []}
    for config in (*program.CONFIGS[:2], *program.BATCH_INVARIANT[:3]):
        monkeypatch.setattr(program, "best_config", lambda *_, config=config, **__: config)
        results[config.k_warpgroups].append(emulated_call.prepare(case, "sm_90a").run(order="random", seed=1))
    assert [len(same) for same in results.values()] == [3, 2]
    for first, *others in results.values():
        for other in others:
            helpers.assert_bit_equal(other, first)
    assert (results[1][0] != results[2][0]).any()  # which is why the page promises nothing across the two
