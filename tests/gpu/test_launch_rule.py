"""The launch rule on a real GPU, with small kernels in the GEMMs' places that show in which order they ran.

``add_one`` stands for GEMM2: the output is all ones only if it was zeroed, before GEMM2 and not after, once a call.
The output is large and "GEMM1" short, so that the zeroing is still running when GEMM2 would start without the join;
GEMM2's blocks are small, to fit in beside it, and begin with the end of the output, which is zeroed last.
"""

import re
import threading

import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import ffi

_TOKENS, _HIDDEN = 2048, 16384  # f32: 128 MiB, some 35 us of memset
_CAPTURE = {"xla_gpu_graph_min_graph_size": 1}

_MUTANTS = {
    "no_zeroing": ("cuda/stream_api.h", "driver_.cuMemsetD8Async(Address(destination), 0, bytes, stream)", "0"),
    "no_captured_zeroing": ("cuda/stream_api.h", "bytes / kWord, 1}", "1, 1}"),
    "no_join": ("launch_sequence.h", "= api.AddDependency(stream, zeroed);", "= 0;"),
}


def _steps(build_folder, combine="atomic", size=_TOKENS * _HIDDEN, clocks=1):
    image = calls.launch_kernels(build_folder)
    writer = "write_one" if combine == "ordered" else "add_one"
    last = calls.step(image, writer, f"result:0 i32:{size}", grid=132 * 32, threads=64)
    steps = {
        "sort": calls.step(image, "nothing"),
        "gemm1": calls.step(image, "spin", f"i32:{clocks}"),
        "gemm2": calls.step(image, "nothing") if combine == "ordered" else last,
    }
    return steps | ({"combine": last} if combine == "ordered" else {})


def _ones(build_folder, options=_CAPTURE, combine="atomic", target=ffi.TARGET, clocks=1):
    """A jitted function of x whose result must be all ones."""
    steps = _steps(build_folder, combine, clocks=clocks)
    return calls.jit(lambda x: calls.call(x, steps, combine=combine, target=target)[0], options)


def _x(seed=0, tokens=_TOKENS, hidden=_HIDDEN):
    return jnp.full((tokens, hidden), seed, jnp.bfloat16)


def _wrong(out) -> int:
    return int(jnp.sum(out != 1))  # NaN counts


def _counters() -> np.ndarray:
    return np.array(ffi.counters())


@pytest.mark.parametrize("combine", ["atomic", "ordered"])
@pytest.mark.parametrize("captured", [False, True])
def test_every_call_sees_a_zeroed_output(build_folder, poison, captured, combine):
    """Eager and captured, over 24 sets of addresses, with NaN in all memory that is given out."""
    call = _ones(build_folder, _CAPTURE if captured else {"xla_gpu_enable_command_buffer": ""}, combine)
    before, kept = _counters(), []
    for i in range(24):
        poison(1)
        x = _x(i)
        out = call(x)
        assert _wrong(out) == 0, f"call {i}"
        kept += [x, out] if i % 3 else [x]  # other addresses next time
    eager, recorded, forked = _counters() - before
    if captured:
        assert recorded > 1
        assert eager == 1
        assert forked == (recorded if combine == "atomic" else 0)
    else:
        assert (eager, recorded) == (24, 0)


def test_replays_are_right_and_call_nobody(build_folder):
    call, x = _ones(build_folder), _x()
    wrong = jnp.zeros((), jnp.int32)
    for _ in range(3):
        call(x)
    before = _counters()
    for _ in range(200):
        wrong += jnp.sum(call(x) != 1)
    assert int(wrong) == 0
    assert (_counters() - before).sum() < 100, "the graph was not replayed"


def _edges(graph: str) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Nodes with their labels, and edges, of a graph in dot's language."""
    nodes = dict(re.findall(r'^"(graph_\d+_node_\d+)"\s*\[(.*?)\];', graph, re.M | re.S))
    edges = set(re.findall(r'"(graph_\d+_node_\d+)"\s*->\s*"(graph_\d+_node_\d+)"', graph))
    return nodes, edges


def _reaches(edges, start, end) -> bool:
    return any(a == start and (b == end or _reaches(edges, b, end)) for a, b in edges)


def _joined(graph: str) -> bool:
    """Whether the zeroing and GEMM1 are unordered, and both before GEMM2."""
    nodes, edges = _edges(graph)
    (zero,) = [n for n, label in nodes.items() if "MEMSET" in label.upper() or "jax_moe_zero" in label]
    (gemm1,) = [n for n, label in nodes.items() if "spin" in label]
    (gemm2,) = [n for n, label in nodes.items() if "add_one" in label]
    parallel = not _reaches(edges, zero, gemm1) and not _reaches(edges, gemm1, zero)
    return parallel and _reaches(edges, zero, gemm2) and _reaches(edges, gemm1, gemm2)


@pytest.mark.parametrize("name", _MUTANTS)
def test_a_mutant_of_the_handler_is_caught(build_folder, poison, graphs, name):
    """By its results. Without the join these may be right: blocks start in order. Then by its graph."""
    file, *change = _MUTANTS[name]
    target = calls.register_changed(name, {file: tuple(change)}, build_folder)
    call = _ones(build_folder, target=target)
    wrong = 0
    for i in range(8):
        poison(1)
        wrong += _wrong(call(_x(i)))
    print(f"{name}: {wrong} wrong values")
    assert wrong > 0 or not all(map(_joined, graphs())), "the mutant survived"


def test_the_captured_graph_has_the_zeroing_beside_gemm1(build_folder, graphs):
    call = _ones(build_folder)
    for i in range(3):
        call(_x(i)).block_until_ready()
    dumped = graphs()
    assert dumped, "nothing was captured"
    for graph in dumped:
        assert len(_edges(graph)[0]) == 4, graph
        assert _joined(graph), graph


@pytest.mark.parametrize(("hidden", "zeroing"), [(16, "jax_moe_zero"), (1024, "jax_moe_zero"), (1040, "MEMSET")])
def test_a_kernel_zeroes_up_to_4096_bytes_beside_gemm1(build_folder, poison, graphs, hidden, zeroing):
    steps, kept = _steps(build_folder, size=hidden), []
    call = calls.jit(lambda x: calls.call(x, steps)[0], _CAPTURE)
    for i in range(24):
        poison(0.1)
        kept.append(call(_x(i, tokens=1, hidden=hidden)))  # other addresses next time
        assert _wrong(kept[-1]) == 0, f"call {i}"
    dumped = graphs()
    assert dumped, "nothing was captured"
    for graph in dumped:
        assert zeroing.upper() in graph.upper()
        assert _joined(graph), graph


def test_ordered_mode_has_no_zeroing_in_its_graph(build_folder, graphs):
    call = _ones(build_folder, combine="ordered")
    for i in range(3):
        assert _wrong(call(_x(i))) == 0
    dumped = graphs()
    assert dumped
    assert not any("MEMSET" in graph.upper() or "jax_moe_zero" in graph for graph in dumped)


@pytest.mark.parametrize("captured", [False, True])
def test_other_lists_of_launches(build_folder, poison, captured):
    """The first launch adds; and another adds after it."""
    add = _steps(build_folder)["gemm2"]
    options = _CAPTURE if captured else {"xla_gpu_enable_command_buffer": ""}
    for count in (1, 2):
        steps = {f"add_{i}": add for i in range(count)}
        call = calls.jit(lambda x, steps=steps: calls.call(x, steps)[0] - (len(steps) - 1), options)
        for i in range(8):
            poison(1)
            assert _wrong(call(_x(i))) == 0


def test_the_other_target_is_never_captured(build_folder):
    before = _counters()
    call = _ones(build_folder, target=ffi.NO_CAPTURE_TARGET)
    for i in range(5):
        assert _wrong(call(_x(i))) == 0
    assert list(_counters() - before) == [5, 0, 0]


def test_a_call_without_tokens_can_be_captured(build_folder):
    steps = _steps(build_folder)
    call = calls.jit(lambda x: (calls.call(x, steps)[0], x + 1), _CAPTURE)
    for i in range(3):
        out, _ = call(_x(i, tokens=0))
        assert out.shape == (0, _HIDDEN)


def test_graphs_that_were_evicted_are_captured_again(build_folder):
    first, second = _ones(build_folder), jax.jit(lambda x: jnp.sin(x) @ x.T, compiler_options=_CAPTURE)
    small = jnp.ones((64, 64))
    for i in range(6):
        x = _x(i)
        assert _wrong(first(x)) == 0
        second(small + i)
        assert _wrong(first(x)) == 0


def test_several_calls_in_one_program_and_a_scan(build_folder):
    steps = _steps(build_folder)

    def layers(x):
        outs = [calls.call(x + i, steps)[0] for i in range(3)]
        scanned, _ = jax.lax.scan(lambda carry, i: (carry + calls.call(x + i, steps)[0], None), outs[0], jnp.arange(4))
        return outs, scanned

    call = calls.jit(layers, _CAPTURE)
    for i in range(4):
        outs, scanned = call(_x(i))
        assert [_wrong(out) for out in outs] == [0, 0, 0]
        assert _wrong(scanned - 4) == 0


def test_donated_inputs_may_become_outputs(build_folder):
    steps = _steps(build_folder)
    call = calls.jit(lambda x, old: (calls.call(x, steps)[0], old * 2)[0] + 0 * old, _CAPTURE, donate_argnums=1)
    old = jnp.full((_TOKENS, _HIDDEN), 7.0)
    for i in range(6):
        old = call(_x(i), old)
        assert _wrong(old) == 0


def test_two_threads(build_folder):
    """Two call sites, each run from two threads at a time, eager and captured as it comes."""
    functions = [_ones(build_folder, clocks=1 + i) for i in range(2)]
    failures = []
    if calls.why_not_run():  # here, because a thread cannot skip a test
        functions[0](_x())

    def work(number):
        for i in range(12):
            wrong = _wrong(functions[number % 2](_x(i)))
            if wrong:
                failures.append((number, i, wrong))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_two_devices_in_one_process(build_folder):
    calls.devices(2)
    steps = _steps(build_folder)
    call = calls.jit(lambda x: calls.call(x, steps)[0], _CAPTURE)
    for i in range(6):
        xs = [jax.device_put(_x(i), device) for device in jax.devices()[:2]]
        outs = [call(x) for x in xs]
        assert [_wrong(out) for out in outs] == [0, 0]


def test_an_unaligned_import_is_refused(build_folder):
    """XLA takes a DLPack array that starts at any element; the kernels load 16 bytes at a time."""
    steps = _steps(build_folder, size=16 * 64)
    call = calls.jit(lambda x: calls.call(x, steps)[0], {})
    if calls.why_not_run():
        call(_x(tokens=16, hidden=64))
    torch = pytest.importorskip("torch")
    storage = torch.ones(16 * 64 + 8, dtype=torch.bfloat16, device="cuda")
    for offset in (0, 8, 1):
        view = storage[offset : offset + 16 * 64].reshape(16, 64)
        if offset % 8 == 0:
            assert _wrong(call(jax.dlpack.from_dlpack(view))) == 0
        else:
            # By XLA today, before the handler would.
            with pytest.raises(jax.errors.JaxRuntimeError, match=r"must be a multiple of 10|its data starts at"):
                call(jax.dlpack.from_dlpack(view)).block_until_ready()
        assert _wrong(call(jax.dlpack.from_dlpack(view.clone()))) == 0
