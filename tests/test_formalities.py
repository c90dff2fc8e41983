"""What a GPU would most likely forgive: early reads, arrivals for other lanes, counts of mbarriers, unwritten bytes.

Each of them is left out of, or altered in, the PTX of a GEMM, and the emulator must object.
"""

import functools
import importlib.util
import re
import shutil
from typing import Any

import emulated_call
import emulator
from helpers import assert_bit_equal, make_exact_case
import jax.numpy as jnp
import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++, which is not here"),
]

TARGETS = ("sm_90a", "sm_100f")
GEMMS = ("gemm1", "gemm2")
_INIT = re.compile(r"mbarrier\.init\.shared\.b64\s+(\[[^\]]+\]), (%\w+);")


@functools.cache
def _case():
    """Stages are used again and again, and tiles are of several widths."""
    sizes: Any = dict(num_experts=3, top_k=2, hidden=512, intermediate=256)
    return make_exact_case(30, tokens=30, out_dtype=jnp.float32, **sizes)


def _config(call, name):
    spec: Any = next(launch.spec for launch in call.program.launches if launch.name == name)
    return spec.config


@functools.cache
def _texts(target):
    call = emulated_call.prepare(_case(), target)
    return {launch.name: emulated_call.ptx(launch.spec, target)[0] for launch in call.program.launches}


def _error(target, name, text):
    """What the emulator objects to; None if nothing."""
    call = emulated_call.prepare(_case(), target)
    try:
        call.run(kernels={name: emulator.Kernel(text, "mutant")}, most_instructions=20_000_000)
    except emulator.EmulatorError as error:
        return str(error)
    return None


@pytest.mark.parametrize("target", TARGETS)
def test_every_byte_that_is_read_was_written(target):
    """Also those of rows behind a tile's width, and weights of padding rows."""
    call = emulated_call.prepare(_case(), target)
    assert len(getattr(_config(call, "gemm2"), "widths", (8, 16))) > 1
    assert_bit_equal(call.run(written=True), _case().run())


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_read_early_is_read_past_l1(target):
    """GEMM2 reads the tile map before, or without, its own wait for the kernel in front."""
    text = _texts(target)["gemm2"]
    error = _error(target, "gemm2", text.replace("ld.relaxed.gpu.global", "ld.global"))
    assert error is not None
    assert "was not waited for" in error
    assert "ld.relaxed" not in _texts(target)["gemm1"]


@pytest.mark.parametrize(("target", "name"), [("sm_90a", "gemm1"), ("sm_90a", "gemm2"), ("sm_100f", "gemm1")])
def test_counts_of_mbarriers_are_their_arrivals_in_a_phase(target, name):
    """One more, and one less, is an error, for an mbarrier of each kind."""
    text = _texts(target)[name]
    survivors = []
    for place in _one_of_each_kind(target, name, text):
        for change in (1, -1):
            init = f"{{ .reg .b32 other; add.s32 other, {place[2]}, {change}; "
            init += f"mbarrier.init.shared.b64 {place[1]}, other; }}"
            if _error(target, name, text[: place.start()] + init + text[place.end() :]) is None:
                survivors.append((place.group(), change))
    assert survivors == []


def _one_of_each_kind(target, name, text):
    """In the order of the code: sm_90a's are those of stages, full and empty, sm_100f's what ``_arrivals`` says."""
    places = list(_INIT.finditer(text))
    if target == "sm_90a":
        return places[:2]
    call = emulated_call.prepare(_case(), target)
    stages = _config(call, name).stages
    assert len(places) == 2 * stages + 24
    units = 2 * stages
    return [places[i] for i in (0, stages, units, units + 8, *range(units + 16, units + 24, 2))]


@pytest.mark.parametrize("name", GEMMS)
def test_a_lane_hands_a_stage_back_for_its_warp(name):
    """sm_90a: a consumer's lanes read codes and scales themselves, and lane 0 arrives."""
    text, dropped = re.subn(
        r"(wgmma\.wait_group\.sync\.aligned\s+\d;\s+)bar\.warp\.sync\s+-1;", r"\1", _texts("sm_90a")[name]
    )
    assert dropped > 2
    error = _error("sm_90a", name, text)
    assert error is not None
    assert "not ordered" in error
