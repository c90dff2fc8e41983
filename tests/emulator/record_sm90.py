"""Runs the calls of ``recorded_calls.py`` on a Hopper GPU and keeps their outputs, with what made them.

    JAX_MOE_CACHE_DIR=cache python tests/emulator/record_sm90.py --compile    # where CuTe DSL is; needs no GPU
    JAX_MOE_CACHE_DIR=cache python3 tests/emulator/record_sm90.py OUTDIR      # on the GPU; needs no DSL

from the root of the checkout, with ``PYTHONPATH=.`` where the package is not installed. The second writes
``OUTDIR/sm90_outputs.npz``: copy it to ``tests/emulator/``. It has an output for each call, and as text the commit, the
device, and the digests of the kernels' machine code.
"""

import argparse
import functools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from emulator import recorded_calls  # noqa: E402
import jax_moe  # noqa: E402
from jax_moe.kernels import cache, cubin, lowering  # noqa: E402


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", nargs="?", help="where to put what was recorded")
    arguments.add_argument("--compile", action="store_true", help="only fill the cache of kernels")
    arguments.add_argument("--commit", default=_commit(), help="of the sources, where git cannot tell")
    given = arguments.parse_args()
    if not given.compile and given.folder is None:
        arguments.error("a folder is needed, or --compile")
    outputs, kernels = {}, {}
    for name, make in recorded_calls.CALLS.items():
        case = make()
        experts = jax_moe.prepare(case.experts, "sm_90a", progress=False)
        call = jax.jit(functools.partial(jax_moe.fused_moe, **case.options))
        call.trace(case.x, experts, case.routing).lower(lowering_platforms=("cuda",))
        for spec in _specs(case, experts):
            kernel = cache.compiled(spec, "sm_90a")
            kernels[spec.name] = cubin.code_digest(kernel.image, kernel.symbol)
        if not given.compile:
            outputs[name] = np.asarray(call(case.x, experts, case.routing))
            assert np.isfinite(outputs[name]).all(), name
        print(name, "compiled" if given.compile else outputs[name].shape, flush=True)
    if given.compile:
        return
    device = jax.devices()[0]
    assert device.platform == "gpu", "no GPU here"
    about = {"commit": given.commit, "device": device.device_kind, "jax": jax.__version__, "kernels": kernels}
    path = pathlib.Path(given.folder) / recorded_calls.FILE.name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, about=np.array(json.dumps(about)), **outputs)
    print(f"{path}: {len(outputs)} outputs of {device.device_kind}, commit {given.commit}")


def _specs(case, experts):
    from jax_moe import check
    from jax_moe.problem import Options

    static = {"weight_on": "output", "command_buffer": True} | case.options
    offset = static.pop("expert_offset", 0)
    problem = check.check(case.x, experts, case.routing, Options(**static), expert_offset=offset, num_experts=None)
    return [launch.spec for launch in lowering.launches(problem)]


def _commit() -> str:
    ran = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return ran.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
