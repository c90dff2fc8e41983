"""Programs that ``exported_by_9c126a9/export.py`` made: they run to the bit, or are refused by their version."""

import pathlib
import re

import helpers
import jax
import jax.export
import numpy as np
import pytest

import jax_moe

pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers to deserialise")

FOLDER = pathlib.Path(__file__).parent / "exported_by_9c126a9"
PROGRAMS = ("w4a16-atomic", "w4a4-ordered", "relu2-on-input")


def load(name: str) -> jax.export.Exported:
    return jax.export.deserialize(bytearray((FOLDER / f"{name}.exported").read_bytes()))


def array(data: np.ndarray, aval) -> jax.Array:
    return jax.numpy.asarray(data.view(aval.dtype).reshape(aval.shape))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_for_cpus_runs_as_it_did(name):
    program, stored = load(name), np.load(FOLDER / f"{name}.npz")
    leaves = [array(stored[f"operand{number}"], aval) for number, aval in enumerate(program.in_avals)]
    operands, _ = jax.tree.unflatten(program.in_tree, leaves)
    _, experts, routing = operands
    assert isinstance(experts, jax_moe.Experts)
    assert isinstance(routing, jax_moe.Routing)
    then = array(stored["result"], program.out_avals[0])
    assert np.isfinite(then.astype(np.float32)).all()
    helpers.assert_bit_equal(program.call(*operands), then)


def test_a_program_for_gpus_says_its_version():
    """It deserialises anywhere; the handler of that custom-call target says what becomes of it."""
    program = load("cuda")
    assert program.platforms == ("cuda",)
    assert re.findall(r"custom_call @(\w+)", program.mlir_module()) == ["jax_moe_fused_moe_v1"]
    (_, experts, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    assert experts.layout == "sm_90a"
