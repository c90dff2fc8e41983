"""Grouped products on sm_100f, run on the emulator: every config, values at random, and products with a mistake."""

import importlib.util
import pathlib
import shutil

import compiled_once
import emulated_call
import emulator
from helpers import assert_bit_equal, compare
import jax.numpy as jnp
import numpy as np
from product_cases import defined, expected, make_case
from ptx import parser
import pytest

from jax_moe.kernels import compiler
from jax_moe.kernels.sm100 import program
from jax_moe.kernels.sm100.specs import SHARED_MEMORY

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here"),
]

TARGET = "sm_100f"
DEVICE = pathlib.Path(program.__file__).with_name("device")
REGISTERS = 65_536  # of a multiprocessor
CONFIGS = [
    pytest.param(precision, index, id=f"{precision}-{config.name}")
    for precision, configs in program.CONFIGS.items()
    for index, config in enumerate(configs)
]


@pytest.mark.parametrize(("precision", "index"), CONFIGS)
def test_every_config_on_an_exact_grid(precision, index):
    """A tile that is full, one that is not, and a group of one row; more units than CTAs; no size is whole blocks.

    N has three blocks of rows: of the last pair of them there is one.
    """
    config = program.CONFIGS[precision][index]
    options = dict(bias=True, out_dtype=jnp.float32) if index % 2 else dict(bias=False, out_dtype=jnp.bfloat16)
    sizes = [config.token_tile + 9, 0, 1]
    case = make_case(index, sizes, sum(sizes) + 3, in_features=336, out_features=304, precision=precision, **options)
    call = emulated_call.prepare_product(case, TARGET, multiprocessors=2, config=config)
    assert_bit_equal(call.run(order=emulator.ORDERS[index % len(emulator.ORDERS)], seed=index), expected(case))

    kernel, _ = compiled_once.kernel_and_ptx(call.program.launches[-1].spec, TARGET)
    assert kernel.stack_bytes <= compiler.MOST_STACK_BYTES
    assert kernel.tensor_core_instructions > 0
    assert -(-kernel.registers // 8) * 8 * config.threads * config.ctas_per_sm <= REGISTERS
    reserved = 1024 * (config.ctas_per_sm > 1)
    assert config.ctas_per_sm * (kernel.shared_bytes + reserved) <= SHARED_MEMORY + reserved


@pytest.mark.parametrize("precision", ["w4a16", "w4a4"])
def test_random_values_are_within_their_bound(precision):
    case = make_case(5, [3, 0, 5, 4], 13, exact=False, in_features=528, out_features=144, precision=precision)
    out = emulated_call.prepare_product(case, TARGET).run(seed=5)
    result = compare(out, *defined(case))
    assert result.passes, str(result)


MISTAKES = {
    "the scale of another group": ("product", "unit.expert, feature,", "Int32(0), feature,"),
    "rows of the next group": ("product", "op.group_ends[unit.expert]", "op.group_ends[op.local_experts - 1]"),
    "rows of the first tile": ("product", "op.row_route[unit.token_tile * self.n]", "op.row_route[0]"),
    "features behind the last": ("product", "feature >= op.out_features", "feature >= op.out_features + 16"),
    "no bias": ("product", "op, self.spec,", "op, dataclasses.replace(self.spec, has_bias=False),"),
    "codes with the first group's scale": ("x_rows", "array(given.input_scale)[group]", "array(given.input_scale)[0]"),
    "groups not waited for": ("x_rows", "griddepcontrol_wait()  # the kernel", "sync_warp()  # the kernel"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name, tmp_path, monkeypatch):
    """A race, an access outside of a buffer, or another result."""
    launch, right, wrong = MISTAKES[name]
    source = {"product": DEVICE / "product.py", "x_rows": DEVICE.parents[1] / "device" / "x_rows.py"}[launch]
    text = source.read_text()
    assert right in text, "the mistake no longer applies"
    module = "mistaken_" + name.replace(" ", "_").replace("'", "")
    (tmp_path / f"{module}.py").write_text("import dataclasses\n" + text.replace(right, wrong))
    monkeypatch.syspath_prepend(tmp_path)

    case = make_case(3, [5, 0, 21, 3], 29, precision="w4a4")
    call = emulated_call.prepare_product(case, TARGET)
    (spec,) = (each.spec for each in call.program.launches if each.name == launch)
    monkeypatch.setattr(type(spec), "implementation", f"{module}:{spec.implementation.partition(':')[2]}")
    _, ptx = compiler.compile_with_ptx(spec, TARGET)
    try:
        out = call.run(kernels={launch: emulator.Kernel(ptx, spec.name)}, seed=3)
    except (emulator.EmulatorError, parser.PTXError) as error:
        print(name, error)
        return
    assert not np.array_equal(out, expected(case))
