"""The op among JAX's own transformations, caches and modes."""

import concurrent.futures
import dataclasses
import subprocess
import sys

import cuda_call
import helpers
from helpers import make_case
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe
from jax_moe import eager, ffi, primitive


@pytest.fixture(scope="module")
def case():
    return make_case(0)


def moe(case):
    """The op as a function of arrays alone."""
    return lambda x, experts, routing: jax_moe.fused_moe(x, experts, routing, **case.options)


# --- Transformations ----------------------------------------------------------------------------------------------


def test_one_custom_call(case):
    hlo = jax.jit(moe(case)).lower(case.x, case.experts, case.routing).compile().as_text()
    assert hlo.count(f'custom_call_target="{ffi.TARGET}"') == 1


def test_eager_calls_of_one_shape_share_a_program(case):
    case.run()
    before = len(_compilations(case.run))
    assert before == 0


def _compilations(function) -> list[str]:
    """The programs that XLA compiles while ``function`` runs."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return seen


def test_compilations_are_counted():
    """Else the tests that want none would say nothing; the second is a program that conftest.py's cache has."""
    for _ in range(2):
        assert _compilations(lambda: jax.jit(lambda x: x * 3 + 1)(np.float32(1)))


def test_cond(case):
    """Under lax.cond only the branch that is taken runs."""

    @jax.jit
    def maybe(use, x, experts, routing):
        return jax.lax.cond(use, moe(case), lambda x, *_: x, x, experts, routing)

    helpers.assert_bit_equal(maybe(True, case.x, case.experts, case.routing), case.run())
    helpers.assert_bit_equal(maybe(False, case.x, case.experts, case.routing), case.x)


def test_while_loop(case):
    """A decode loop: each step reads what the step before wrote."""

    def step(state):
        i, x = state
        return i + 1, moe(case)(x, case.experts, case.routing)

    expected = case.x
    for _ in range(3):
        expected = moe(case)(expected, case.experts, case.routing)
    _, x = jax.jit(lambda x: jax.lax.while_loop(lambda s: s[0] < 3, step, (0, x)))(case.x)
    helpers.assert_bit_equal(x, expected)


@pytest.mark.parametrize("combine", ["atomic", "ordered"])
def test_donation(case, combine):
    """The donated input's buffer becomes the output's while the call still reads x: XLA must not alias the two."""
    case = case.with_options(combine=combine)
    expected = case.run()
    x = jnp.copy(case.x)
    run = jax.jit(moe(case), donate_argnums=0)
    helpers.assert_bit_equal(run(x, case.experts, case.routing), expected)
    x = jnp.copy(case.x)
    residual = jax.jit(lambda x, *rest: x + moe(case)(x, *rest), donate_argnums=0)
    helpers.assert_bit_equal(residual(x, case.experts, case.routing), case.x + expected)
    assert x.is_deleted()


def test_grad_around_a_stopped_call(case):
    """What the error advises: gradients of everything else, with the call's inputs stopped."""

    def loss(scale):
        stopped = jax.lax.stop_gradient(case.x * scale)
        return (moe(case)(stopped, case.experts, case.routing).astype(jnp.float32) * scale).sum()

    gradient = jax.grad(loss)(jnp.bfloat16(1))
    np.testing.assert_allclose(np.float32(gradient), case.run().astype(np.float32).sum(), rtol=0.02)


def test_shapes_without_running(case):
    shape = jax.eval_shape(moe(case), case.x, case.experts, case.routing)
    assert (shape.shape, shape.dtype) == (case.x.shape, jnp.bfloat16)


# --- Export and caches --------------------------------------------------------------------------------------------

_EXPORTED = """
import sys, jax, numpy as np, jax_moe, helpers
case = helpers.make_case(0)
with open(sys.argv[1], "rb") as file:
    run = jax.export.deserialize(bytearray(file.read()))
helpers.assert_bit_equal(run.call(case.x, case.experts, case.routing), case.run())
print("equal")
"""


def test_exports_to_a_fresh_process(case, tmp_path):
    """The program takes Experts and Routing, so these must survive serialising too."""
    run = jax.jit(moe(case))
    with pytest.raises(ValueError, match="custom call"):
        jax.export.export(run)(case.x, case.experts, case.routing)
    exported = jax.export.export(run, disabled_checks=jax_moe.export_checks())(case.x, case.experts, case.routing)
    path = tmp_path / "program"
    path.write_bytes(exported.serialize())
    assert helpers.run_python(_EXPORTED, path) == "equal\n"


def test_programs_of_version_1_run_on_a_cpu(case):
    run = jax.jit(moe(case))
    arguments = case.x, case.experts, case.routing
    exported = jax.export.export(run, disabled_checks=jax_moe.export_checks())(*arguments)
    module = exported.mlir_module_serialized
    assert module.count(ffi.TARGET.encode()) == 1
    old = dataclasses.replace(
        exported, mlir_module_serialized=module.replace(ffi.TARGET.encode(), b"jax_moe_fused_moe_v1")
    )
    helpers.assert_bit_equal(old.call(*arguments), exported.call(*arguments))


_CACHED = """
import logging, sys, jax, jax_moe, helpers
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
seen = {"/jax/compilation_cache/cache_hits": 0, "/jax/compilation_cache/cache_misses": 0}
def listen(event, **_):
    if event in seen: seen[event] += 1
jax.monitoring.register_event_listener(listen)
case = helpers.make_case(0)
jax.block_until_ready(jax.jit(lambda *a: jax_moe.fused_moe(*a))(case.x, case.experts, case.routing))
jax.block_until_ready(jax_moe.fused_moe(case.x, case.experts, case.routing, combine="ordered"))
print(*seen.values())
"""


def test_the_persistent_cache_hits(tmp_path):
    """A second process finds every program of the first one and compiles nothing."""
    hits, misses = map(int, helpers.run_python(_CACHED, tmp_path).split())
    assert misses >= 2
    again_hits, again_misses = map(int, helpers.run_python(_CACHED, tmp_path).split())
    assert (again_hits, again_misses) == (hits + misses, 0)


# --- Importing ----------------------------------------------------------------------------------------------------


def test_importing_starts_no_backend():
    """jax's own proxy: the platform can still be chosen, which is refused or too late once a backend exists."""
    program = """
import jax, jax_moe
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
jax.config.update("jax_num_cpu_devices", 3)
assert len(jax.devices()) == 3
assert xla_bridge.backends_are_initialized()
"""
    helpers.run_python(program)


def test_importing_is_quick():
    """Under 0.3 s beyond jax's own import. The CPU time of one in five: neighbours make it longer, never shorter."""
    program = (
        "import time, jax, jax.numpy; start = time.process_time(); import jax_moe; print(time.process_time() - start)"
    )
    assert any(float(helpers.run_python(program)) < 0.3 for _ in range(5))


def test_importing_does_not_need_the_optional_packages():
    program = """
import sys, jax
for name in ("flax", "orbax", "orbax.checkpoint", "cutlass", "torch", "matplotlib", "safetensors", "hypothesis"):
    sys.modules[name] = None  # importing it is an ImportError
import jax_moe
loaded = {"typer", "rich"} & set(sys.modules)  # the command line's alone
assert not loaded, loaded
"""
    helpers.run_python(program)


# --- Modes --------------------------------------------------------------------------------------------------------

_EVERYTHING = """
import jax, jax.numpy as jnp, numpy as np, jax_moe, helpers
from jax_moe import nvfp4, reference
for activation in helpers.ACTIVATIONS:
    case = helpers.make_case(1, activation=activation, bias=True)
    case.check()
for options in ({"precision": "w4a4"}, {"weight_on": "input", "precision": "w4a4"}, {"combine": "ordered"},
                {"out_dtype": jnp.float32}, {"expert_offset": 1}):
    case = helpers.make_case(1, bias=True, **options)
    case.check()
case.check(reference.fused_moe)
rng = np.random.default_rng(0)
dense = [rng.normal(size=shape).astype(np.float32) for shape in [(4, 32, 48), (4, 32, 48), (4, 48, 32)]]
biases = {"gate_bias": np.zeros((4, 32)), "up_bias": np.zeros((4, 32)), "down_bias": np.zeros((4, 48))}
experts = jax_moe.quantize_experts(*dense, **biases)
logits = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
for method in (jax_moe.Softmax(), jax_moe.Sigmoid(), jax_moe.Llama4(), jax_moe.DeepSeekV3(2, 1)):
    bias = jnp.zeros(4) if isinstance(method, jax_moe.DeepSeekV3) else None
    routing = jax_moe.route(logits, 2, method, bias=bias)
    assert (routing.expert_ids.dtype, routing.weights.dtype) == (jnp.int32, jnp.float32)
for weight_on in ("output", "input"):
    calibrated = jax_moe.calibrate(experts, case.x, routing, weight_on=weight_on)
    jax_moe.fused_moe(case.x, calibrated, routing, precision="w4a4", weight_on=weight_on)
assert {leaf.dtype.name for leaf in jax.tree.leaves(calibrated)} == {"uint8", "float8_e4m3fn", "float32"}
mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"))
x, routing = jax.tree.map(lambda a: a[:4], (case.x, routing))
y = jax_moe.sharded_moe(x, calibrated, routing, mesh=mesh, precision="w4a4")
assert (y.dtype, y.shape) == (jnp.bfloat16, (4, 48))
assert nvfp4.dequantize(calibrated.down.payload, calibrated.down.block_scale).dtype == jnp.float32
print("done")
"""


@pytest.mark.parametrize("modes", [{"JAX_NUMPY_DTYPE_PROMOTION": "strict"}, {"JAX_ENABLE_X64": "1"}], ids=str)
def test_everything_works_in(modes):
    """Strict promotion and 64-bit mode, with warnings as errors, in a process that is so from the start."""
    assert helpers.run_python(_EVERYTHING, JAX_NUM_CPU_DEVICES="8", **modes) == "done\n"


def test_debug_mode_reports_an_id_of_nobody(case):
    program = """
import jax, jax.numpy as jnp, jax_moe, helpers
case = helpers.make_case(0)
jax_moe.fused_moe(case.x, case.experts, case.routing).block_until_ready()
routing = jax_moe.Routing(case.routing.expert_ids.at[3, 1].set(-7), case.routing.weights)
try:
    jax.block_until_ready(jax.jit(jax_moe.fused_moe)(case.x, case.experts, routing))
    jax.effects_barrier()
except Exception as error:
    assert "routing.expert_ids: got -7 for token 3, slot 1" in str(error), error
    print("reported")
"""
    assert helpers.run_python(program, JAX_MOE_DEBUG="1") == "reported\n"


@pytest.mark.parametrize("off", ["0", ""])
def test_without_debug_mode_an_id_of_nobody_is_skipped(case, monkeypatch, off):
    monkeypatch.setenv("JAX_MOE_DEBUG", off)
    routing = jax_moe.Routing(case.routing.expert_ids.at[3, 1].set(-7), case.routing.weights)
    jax.block_until_ready(jax.jit(moe(case))(case.x, case.experts, routing))
    jax.effects_barrier()


def test_disable_jit_runs_the_op_all_the_same():
    case = make_case(1)
    with jax.disable_jit():
        got = case.run()
    helpers.assert_bit_equal(got, case.run())


def test_logs_and_profiles_say_fused_moe():
    assert eager._jitted(primitive.fused_moe_p, problem=cuda_call.problem()).__name__ == "fused_moe"


def test_two_threads_at_once():
    """Concurrent calls of several shapes and options, each many times: every result is the one it has alone."""
    cases = [
        make_case(seed, tokens=tokens, precision=precision, combine=combine)
        for seed, (tokens, precision, combine) in enumerate(
            [(3, "w4a16", "atomic"), (70, "w4a4", "atomic"), (40, "w4a16", "ordered"), (40, "w4a16", "atomic")]
        )
    ]
    expected = [case.run() for case in cases]

    def work(offset):
        for i in range(40):
            index = (i + offset) % len(cases)
            helpers.assert_bit_equal(cases[index].run(), expected[index])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, offset) for offset in range(4)]:
            future.result()


def test_without_a_library_all_but_the_op_works(tmp_path):
    """A checkout that is not built can be read in a REPL; the op says what is missing."""
    program = """
import jax.numpy as jnp, numpy as np
import jax_moe
experts = jax_moe.quantize_experts(np.ones((4, 16, 16)), np.ones((4, 16, 16)), np.ones((4, 16, 16)), progress=False)
jax_moe.prepare(experts, "sm_90a", progress=False)
x, routing = jnp.ones((3, 16), jnp.bfloat16), jax_moe.route(jnp.zeros((3, 4)), 2)
jax_moe.reference.fused_moe(x, experts, routing)
print("imported")
jax_moe.fused_moe(x, experts, routing)
"""
    environment = {
        "PYTHONPATH": str(helpers.PACKAGE_FOLDER),
        "JAX_MOE_FFI_LIBRARY": str(tmp_path / "no.so"),
        "PATH": "",
    }
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout) == (1, "imported\n")
    assert f"ImportError: jax_moe: the FFI library is missing, looked in {tmp_path / 'no.so'}." in ran.stderr
