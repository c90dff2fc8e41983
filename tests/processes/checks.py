"""What is checked with several processes: all gives what it gives in one, and each process does its part only."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import re

import checkpoint_writer as writer
from flax import nnx
import helpers
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import jax_moe
from jax_moe import nn
from processes.world import assert_near, assert_same, spread, World

FORMS = {
    "tokens everywhere": ("expert", {}),
    "tokens spread": ("expert", {"data_axis": "expert"}),
    "tensor parallel": ("tensor", {}),
}
MODES = (("w4a16", "atomic"), ("w4a4", "ordered"))
EXPERTS, HIDDEN, INTERMEDIATE = 8, 64, 128  # of make_exact_case, and of a small checkpoint


def _case(**options) -> helpers.Case:
    return helpers.make_exact_case(1, tokens=32, out_dtype=jnp.float32, **options)


def _place(world: World, experts: jax_moe.Experts, axis: str) -> jax_moe.Experts:
    # NumPy's, because of a jax.Array that goes to every device, JAX makes one that has no addressable_shards.
    host = jax.tree.map(np.asarray, experts)
    return jax.device_put(host, jax_moe.expert_shardings(host, world.mesh(axis)))


# --- Loading ------------------------------------------------------------------------------------------------------


def loading(world: World) -> None:
    """Each process has its part of a layer, and little more than that was read of its copy of the files."""
    if world.compiles:
        return
    sizes = {"experts": 16, "hidden": 1024, "intermediate": 512}
    for form, model_type, tool in (("per expert", "qwen3_moe", "modelopt"), ("fused", "llama4_text", "fused")):
        folder = world.folder / tool / str(jax.process_index())
        writer.checkpoint(folder, model_type, tool, **sizes)
        whole = jax_moe.load_experts(folder, 0)
        for axis in ("expert", "tensor"):
            mesh = world.mesh(axis)
            before = _bytes_read(folder)
            experts = jax_moe.load_experts(folder, 0, mesh=mesh)
            jax.block_until_ready(experts)
            assert_same(experts, whole)
            if before is not None:
                read = _bytes_read() - before
                _check_bytes(
                    f"{form}, {axis}", read, experts, whole, all_of_down=axis == "tensor", fused=tool == "fused"
                )
    folder, prepared = world.folder / "modelopt" / str(jax.process_index()), world.folder / f"out-{jax.process_index()}"
    jax_moe.checkpoints.convert(folder, prepared, layout="sm_90a", progress_bar=False)
    whole = jax_moe.load_experts(prepared, 0)
    for axis in ("expert", "tensor"):
        before = _bytes_read(prepared)
        experts = jax_moe.load_experts(prepared, 0, mesh=world.mesh(axis))
        assert_same(experts, whole)
        if before is not None:
            read = _bytes_read() - before
            _check_bytes(f"converted, {axis}", read, experts, whole, all_of_down=axis == "tensor")
    subset = jax.make_mesh((1,), ("expert",), devices=world.devices[:1])
    experts = jax_moe.load_experts(folder, 0, mesh=subset)  # in processes that it has no device of, too
    assert len(jax.tree.leaves(experts)[0].addressable_shards) == (world.devices[0] in jax.local_devices())


def _check_bytes(name, read, experts, whole, *, all_of_down=False, fused=False) -> None:
    def size(tree) -> int:
        return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)

    part, everything = size(experts), size(whole)
    needs = part
    if all_of_down:  # a slice of its rows shares pages with the others
        needs = part - size(experts.down) + size(whole.down)
    if all_of_down and fused:
        needs = everything
    print(f"loading, {name}: read {read} bytes for {part} of {everything}")
    assert part < 0.6 * everything
    assert needs * 0.9 < read < needs * 1.05 + 200_000  # headers, scales of all experts, the ends of pages


def _bytes_read(folder: pathlib.Path | None = None) -> int | None:
    """What this process has read from storage so far; None where that cannot be measured.

    ``folder``: whose files are not to be in memory from now on.
    """
    for file in () if folder is None else folder.glob("*.safetensors"):
        _forget(file)
        before = _from_storage()
        file.read_bytes()
        if _from_storage() - before < 0.9 * file.stat().st_size:
            print(f"NOT MEASURED: {folder} is on no storage that Linux counts reads from")
            return None
        _forget(file)
    return _from_storage()


def _forget(file: pathlib.Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _from_storage() -> int:
    lines = pathlib.Path("/proc/self/io").read_text().splitlines() if os.path.exists("/proc/self/io") else []
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


# --- The verbs ----------------------------------------------------------------------------------------------------


def preparing(world: World) -> None:
    """``prepare`` of slices of I and back, and the error that looks at all of them; saving() does it with experts."""
    if world.compiles:
        return
    experts = _case().experts
    prepared = jax_moe.prepare(_place(world, experts, "tensor"), "sm_90a", "w4a16")
    assert_same(jax_moe.unprepare(prepared, HIDDEN, INTERMEDIATE), experts)
    with pytest.raises(ValueError, match="prepared in another number of slices"):
        jax_moe.unprepare(prepared, HIDDEN, INTERMEDIATE - 16 * len(world.devices))


def calls(world: World) -> None:
    """``sharded_moe`` has the bits of one process's ``fused_moe`` where sums are exact, whatever is where."""
    for precision, combine in MODES:
        case = _case(precision=precision, combine=combine)
        one = world.prepare(case.experts, precision)
        expected = world.alone(lambda *a: jax_moe.fused_moe(*a, **case.options), case.x, one, case.routing)  # noqa: B023
        for name, (axis, names) in FORMS.items():
            mesh = world.mesh(axis)
            experts = world.prepare(_place(world, case.experts, axis), precision)
            tokens = NamedSharding(mesh, P(names.get("data_axis")))
            x, routing = jax.tree.map(lambda array: spread(array, tokens), (case.x, case.routing))  # noqa: B023

            def run(x, experts, routing):
                return jax_moe.sharded_moe(x, experts, routing, mesh=mesh, **names, **case.options)  # noqa: B023

            for y in world.run(run, x, experts, routing, eagerly=precision == "w4a16" and axis == "expert"):
                assert y.sharding.is_equivalent_to(tokens, 2), name
                assert_same(y, expected)
    if not world.compiles:
        # Arrays that every process has for itself are the same everywhere; debug mode looks at all ids, once.
        os.environ["JAX_MOE_DEBUG"] = "1"
        assert_same(run(case.x, experts, case.routing), expected)
        jax.effects_barrier()
        del os.environ["JAX_MOE_DEBUG"]


def calibrating(world: World) -> None:
    """``calibrate`` finds the scales of one process, from tokens that are everywhere or spread."""
    if world.compiles:
        return
    case = helpers.make_case(2, tokens=24, hidden=HIDDEN, intermediate=INTERMEDIATE, num_experts=EXPERTS)
    experts = helpers.without_input_scales(case.experts)
    expected = jax_moe.calibrate(experts, case.x, case.routing)
    for axis in ("expert", "tensor"):
        placed = _place(world, experts, axis)
        tokens = NamedSharding(world.mesh(axis), P(axis))
        spread_tokens = jax.tree.map(lambda array: spread(array, tokens), (case.x, case.routing))  # noqa: B023
        for x, routing in ((case.x, case.routing), spread_tokens):
            got = jax_moe.calibrate(placed, x, routing)
            for projection in ("gate_up", "down"):
                found, wanted = (getattr(e, projection).input_scale for e in (got, expected))
                for shard in found.addressable_shards:
                    # The order of sums depends on the shapes.
                    np.testing.assert_allclose(shard.data, np.asarray(wanted)[shard.index], rtol=1e-4)
            again = jax_moe.calibrate(got, x, routing)  # scales that are there are raised, where they are
            assert_same(again.down.input_scale, multihost_utils.process_allgather(got.down.input_scale, tiled=True))
        # Every process says the same of a batch that is no good.
        for bad, message in ((np.nan, "x: got NaN or infinity"), (0, "x: got only zeros")):
            x = spread(np.full_like(case.x, bad), tokens)
            with pytest.raises(ValueError, match=message):
                jax_moe.calibrate(placed, x, case.routing)
        huge = dataclasses.replace(placed.gate_up, global_scale=placed.gate_up.global_scale * 1e38)
        with pytest.raises(ValueError, match=r"x: expert \d makes NaN or infinity"):
            jax_moe.calibrate(dataclasses.replace(placed, gate_up=huge), case.x, case.routing)


def refusing(world: World) -> None:
    """What would gather weights or be wrong is an error in every process, and the same one."""
    if world.compiles:
        return
    case, mesh = _case(), world.mesh("expert")
    placed = _place(world, case.experts, "expert")
    if not world.on_gpus:  # there it wants prepared experts first
        with pytest.raises(ValueError, match=r"fused_moe: this call is spread over \d devices"):
            jax_moe.fused_moe(case.x, placed, case.routing, **case.options)
    with pytest.raises(ValueError, match="prepare: the program is spread over"):
        jax.jit(lambda experts: jax_moe.prepare(experts, "sm_90a", "w4a16"))(placed)
    dense = spread(np.ones((EXPERTS, 32, 32), np.float32), NamedSharding(mesh, P("expert")))
    with pytest.raises(ValueError, match="up: got an array spread over"):
        jax_moe.quantize_experts(None, dense, dense)
    elsewhere = spread(case.experts.down.payload, NamedSharding(mesh, P(None, "expert")))
    moved = dataclasses.replace(placed, down=dataclasses.replace(placed.down, payload=elsewhere))
    for verb in (
        lambda: jax_moe.sharded_moe(case.x, moved, case.routing, mesh=mesh, **case.options),
        lambda: jax_moe.prepare(moved, "sm_90a", "w4a16"),
        lambda: jax_moe.calibrate(moved, case.x, case.routing),
    ):
        with pytest.raises(ValueError, match=r"experts\.down\.payload: got sharding"):
            verb()


# --- Modules and checkpoints --------------------------------------------------------------------------------------


def _write_model(world: World) -> pathlib.Path:
    """A checkpoint of one layer with a shared expert, which all processes read."""
    folder = world.folder / "model"
    if jax.process_index() == 0:
        rng = np.random.default_rng(3)
        layer = writer.random_layer(3, EXPERTS, 2, HIDDEN, INTERMEDIATE)
        tensors = writer.per_expert(layer, "deepseek_v3", "modelopt", 0)
        tensors |= writer.router("deepseek_v3", 0, EXPERTS, HIDDEN)
        for name, shape in (
            ("gate_proj", (32 * 4, HIDDEN)),
            ("up_proj", (32 * 4, HIDDEN)),
            ("down_proj", (HIDDEN, 128)),
        ):
            weight = rng.normal(size=shape).astype(writer.BF16)
            tensors[f"model.layers.0.mlp.shared_experts.{name}.weight"] = weight
        config = writer.config_of("deepseek_v3", EXPERTS, HIDDEN, INTERMEDIATE) | {
            "n_shared_experts": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        }  # fmt: skip
        writer.write(folder, config, tensors)
    world.barrier("the model is written")
    return folder


def modules(world: World) -> None:
    """``nn.MoE`` on the mesh: each process loads its part; exact sums have the bits of one process."""
    folder, rng = _write_model(world), np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(16, HIDDEN)), jnp.float32)
    expected = world.alone(*_functional(_from_checkpoint(world, folder, None)), x)
    case = _case()
    weight = jnp.asarray(rng.normal(size=(EXPERTS, HIDDEN)), jnp.float32)
    one = nn.MoE(world.prepare(case.experts), jax_moe.Router(weight, k=1))  # one expert's weight is exactly 1
    exact = world.alone(*_functional(one), case.x)
    for axis in ("expert", "tensor"):
        mesh = world.mesh(axis)
        everywhere = NamedSharding(mesh, P())
        module = _from_checkpoint(world, folder, mesh)
        for y in world.run(*_functional(module), spread(x, everywhere), eagerly=axis == "tensor"):
            assert_near(y, expected, 2e-2)  # bfloat16
        router = jax_moe.Router(spread(weight, everywhere), k=1)
        module = nn.MoE(world.prepare(_place(world, case.experts, axis)), router)  # the mesh is that of the experts
        for y in world.run(*_functional(module), spread(case.x, everywhere), eagerly=False):
            if world.on_gpus:  # where XLA's softmax of one value is 1 or a unit off, as it fuses it
                assert_near(y, exact, 2**-8)
            else:
                assert_same(y, exact)


def documented(world: World) -> None:
    """What ``docs/several-processes.md`` shows."""
    if world.compiles or world.on_gpus:
        print("NOT RUN: documented, its kernels are not among those of the other checks")
        return
    folder = _write_model(world)
    page = pathlib.Path(__file__).parents[2] / "docs" / "several-processes.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(16, HIDDEN)), jnp.bfloat16)
    names = {"directory": folder, "local_x": np.split(np.asarray(x), jax.process_count())[jax.process_index()]}
    for block in blocks:
        exec(block, names)
    experts, options = jax_moe.load_experts(folder, 0), jax_moe.checkpoints.moe_options(folder, 0)
    router = jax_moe.checkpoints.load_router(folder, 0)
    expected = world.alone(lambda x: jax_moe.fused_moe(x, experts, router(x), **options), x)
    assert_near(names["y"], expected, 1e-2)
    (part,) = names["parts"]
    assert part.shape == names["local_x"].shape
    assert isinstance(names["layer"], nn.MoE)


def _from_checkpoint(world: World, folder: pathlib.Path, mesh: jax.sharding.Mesh | None) -> nn.MoE:
    return nn.MoE.from_checkpoint(folder, 0, mesh=mesh, target=world.compiles, progress=False)


def _functional(module: nn.MoE) -> tuple[Callable, nnx.State]:
    graph, state = nnx.split(module)
    return lambda state, x: nnx.merge(graph, state)(x), state


def saving(world: World) -> None:
    """orbax saves experts from all processes, each its part, and restores them: as they were, or on another mesh."""
    if world.compiles:
        return
    try:
        import orbax.checkpoint
    except ImportError:
        print("NOT RUN: saving, orbax-checkpoint is not installed")
        return
    case = _case()
    placed = _place(world, case.experts, "expert")
    routing = jax.tree.map(lambda array: spread(array, NamedSharding(world.mesh("expert"), P())), case.routing)
    prepared = jax_moe.prepare(placed, "sm_90a", "w4a16")
    other = jax_moe.expert_shardings(case.experts, world.mesh("tensor"))
    like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        for name, saved in (("canonical", (placed, routing)), ("prepared", prepared)):
            checkpointer.save(world.folder / "orbax" / name, saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(world.folder / "orbax" / name, saved)
            assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, saved)
            expected = (case.experts, case.routing)
            if name == "prepared":
                assert restored.layout == prepared.layout
                restored, expected = jax_moe.unprepare(restored, HIDDEN, INTERMEDIATE), case.experts
            assert_same(restored, expected)
        moved, _ = checkpointer.restore(
            world.folder / "orbax" / "canonical", (jax.tree.map(like, case.experts, other), routing)
        )
        assert_same(moved, case.experts)
        assert moved.down.payload.sharding.spec == other.down.payload.spec


CHECKS = (loading, preparing, calls, calibrating, refusing, modules, documented, saving)
