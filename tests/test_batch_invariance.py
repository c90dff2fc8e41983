"""``batch_invariant``: what takes the option, plans of one order on a GPU, sums in one order on a mesh.

That a token has the same bits in any batch is for test_determinism.py, and of a GPU for the file of that name there.
"""

import dataclasses
import functools
import itertools

import cuda_call
import frozen
from helpers import make_exact_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statement
from test_exchange import BF16, F32, HALF, INVARIANT, moved, PARCELS, random_case, REPLICATED, run_on, same, SPREAD
from test_sharded_moe import Layout, make_mesh

import jax_moe
from jax_moe import shapes
from jax_moe.kernels import targets
from jax_moe.kernels.sm90 import program
from jax_moe.kernels.sm90.target import SM90


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
def test_a_cpu_needs_no_option_for_that(precision):
    """It takes it, and gives the same bits."""
    case = frozen.case(37).with_options(precision=precision, combine="ordered", out_dtype=jnp.float32)
    assert frozen.digest(case.run(batch_invariant=True)) == frozen.FUSED_MOE[f"{precision}-ordered"]


@pytest.mark.parametrize("axes", [{}, {"data": 2}], ids=["one device", "mesh"])
def test_contributions_in_any_order_have_no_bits_to_keep(axes):
    case = random_case(0, tokens=4)
    op = functools.partial(jax_moe.sharded_moe, mesh=make_mesh(**axes)) if axes else jax_moe.fused_moe
    with pytest.raises(ValueError, match="batch_invariant: got True with combine='atomic', needs combine='ordered'"):
        op(case.x, case.experts, case.routing, batch_invariant=True)
    with pytest.raises(TypeError, match="batch_invariant: got str, needs bool"):
        op(case.x, case.experts, case.routing, combine="ordered", batch_invariant="yes")


def test_a_module_passes_it_on():
    pytest.importorskip("flax.nnx", reason="flax is not installed; jax_moe.nn needs it")
    from jax_moe.nn import MoE

    case = random_case(1)
    router = jax_moe.checkpoints.Router(jnp.ones((8, 64), jnp.float32), k=2)
    assert MoE(case.experts, router, **INVARIANT).options.batch_invariant
    with pytest.raises(ValueError, match="needs combine='ordered'"):
        MoE(case.experts, router, batch_invariant=True)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_products_are_planned_with_it(batch_invariant):
    """What is traced says so; from there on it is test_batch_invariant_calls_have_plans_of_one_order."""
    x, weights = jnp.ones((3, 32), jnp.bfloat16), jax_moe.quantize_projection(np.ones((1, 16, 32), np.float32))
    one, sizes = jax.tree.map(lambda leaf: leaf[0], weights), jnp.asarray([3], jnp.int32)
    for op, *arguments in ((jax_moe.ragged_dot, x, weights, sizes), (jax_moe.linear, x, one)):
        traced = jax.make_jaxpr(functools.partial(op, batch_invariant=batch_invariant))(*arguments)
        assert f"batch_invariant={batch_invariant}" in str(traced)


# --- Plans of a GPU -----------------------------------------------------------------------------------------------


def _k_warpgroups(call) -> set[int]:
    """How many warpgroups share the contraction, of each product that a call makes."""
    specs = [launch.spec for launch in cuda_call.program(call).launches]
    return {spec.config.k_warpgroups for spec in specs if spec.tensor_core_ptx}


@pytest.mark.parametrize("card", [SM90.cards[0], SM90.cards[1], SM90.cards[-1]], ids=lambda card: card.name)
def test_batch_invariant_calls_have_plans_of_one_order(card):
    """For any T, on one GPU and on some of many; without the option, some have another."""
    assert {config.k_warpgroups for config in program.BATCH_INVARIANT} == {1}
    counts = [*range(1, 300), *np.geomspace(300, 20000, 30, dtype=int)]
    usual = set()
    with targets.planned_for(card):
        for model, tokens in itertools.product(shapes.MODELS.values(), map(int, counts)):
            layer = cuda_call.problem(
                num_tokens=tokens, top_k=model.top_k, local_experts=model.num_experts, hidden_size=model.hidden_size,
                intermediate_size=model.intermediate_size, combine="ordered", batch_invariant=True,
            )  # fmt: skip
            on_a_mesh = dataclasses.replace(layer, local_experts=model.num_experts // 8, num_experts=model.num_experts)
            product = cuda_call.product(
                num_rows=tokens, num_groups=1, local_groups=1, in_features=model.hidden_size,
                out_features=model.intermediate_size, batch_invariant=True,
            )  # fmt: skip
            for call in (layer, on_a_mesh, product):
                assert _k_warpgroups(call) == {1}
            if tokens in (1, 2, 64):
                usual |= _k_warpgroups(dataclasses.replace(layer, batch_invariant=False))
    assert usual >= {2, 4}


# --- Sums in the order of devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "sum_dtype", "expected"),
    [
        (REPLICATED, jnp.float32, [("all_to_all", F32), ("all_reduce", F32)]),
        (REPLICATED, jnp.bfloat16, [("all_to_all", BF16), ("all_reduce", BF16)]),
        (SPREAD, jnp.float32, [PARCELS, ("all_to_all", F32)]),
        (SPREAD, jnp.bfloat16, [PARCELS, ("all_to_all", BF16)]),
        # Two parts have one sum, whoever adds them.
        (HALF, jnp.float32, [PARCELS, ("all_to_all", F32), ("all_reduce", F32 // 4)]),
        (Layout({"expert": 2}), jnp.float32, [("all_reduce", F32)]),
        (Layout({"expert": 2}, {"data_axis": "expert"}), jnp.float32, [PARCELS, ("reduce_scatter", F32 // 2)]),
        (Layout({"data": 8}), jnp.float32, []),
    ],
    ids=str,
)
def test_what_travels_where_calls_are_batch_invariant(layout, sum_dtype, expected):
    case = make_exact_case(precision="w4a4").with_options(**INVARIANT)
    assert moved(layout, case, sum_dtype=sum_dtype) == sorted(expected)


@pytest.mark.parametrize("sum_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "layout",
    [REPLICATED, SPREAD, Layout({"expert": 4}), Layout({"expert": 3})],  # of three, slices are padded
    ids=str,
)
def test_batch_invariant_parts_are_added_in_the_order_of_devices(layout, sum_dtype):
    """Bit for bit what NumPy gives, which for float32 parts another order does not.

    XLA's CPU backend would add in that order anyway: that it is not asked to is what the test above shows.
    """
    devices = layout.axes["expert"]
    case = random_case(3, num_experts=2 * devices, top_k=6 if devices > 2 else 2).with_options(**INVARIANT)
    parts = []
    for first in range(0, 2 * devices, 2):
        experts = jax.tree.map(lambda leaf, e=first: leaf[e : e + 2] if leaf.ndim else leaf, case.experts)
        part = dataclasses.replace(case, experts=experts).run(expert_offset=first, out_dtype=sum_dtype)
        parts.append(np.float32(part))

    expected = functools.reduce(np.add, parts)
    if sum_dtype == jnp.float32:
        assert (functools.reduce(np.add, reversed(parts)) != expected).any()
    elif layout is not SPREAD:  # the sum travels too
        expected = statement.bfloat16(expected)
    same(run_on(layout, case, sum_dtype=sum_dtype), expected)
