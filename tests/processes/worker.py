"""One of the processes that ``launch.py`` starts."""

import argparse
import faulthandler
import os
import pathlib
import signal
import sys
import time

import jax


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("address", "folder", "only", "compile"):
        parser.add_argument(f"--{name}")
    for name in ("process", "processes", "die"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--idle", action="store_true")
    parser.add_argument("--timeout", type=float)
    options = parser.parse_args()
    # Whatever hangs, and should the launcher be gone: this thread needs neither the GIL nor JAX.
    faulthandler.dump_traceback_later(options.timeout + 30, exit=True)

    begin = time.monotonic()
    if not options.compile:
        start(options)
    from processes import checks, world

    devices = jax.devices()
    compiles = options.compile
    here = world.World(devices, pathlib.Path(options.folder), compiles)
    print(f"process {jax.process_index()} of {jax.process_count()}: {jax.local_devices()} of {devices}, "
          f"jax {jax.__version__}", flush=True)  # fmt: skip
    if options.die is not None:
        die_in_the_middle(here, options.die, options.idle)
    for check in checks.CHECKS:
        if options.only in (None, check.__name__):
            since, busy = time.monotonic(), time.process_time()
            check(here)
            took, busy = time.monotonic() - since, time.process_time() - busy
            print(f"ok: {check.__name__}, {took:.1f} s, {busy:.1f} s of them on a CPU", flush=True)
    if not compiles:
        jax.distributed.shutdown()
    print(f"done after {time.monotonic() - begin:.1f} s", flush=True)


def start(options: argparse.Namespace) -> None:
    """Makes the processes one program."""
    on_cpus = os.environ.get("JAX_PLATFORMS") == "cpu"
    if on_cpus:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # One that is killed is missed after the heartbeat's time; a machine may be slower than that where nobody is.
    jax.distributed.initialize(
        coordinator_address=options.address,
        num_processes=options.processes,
        process_id=options.process,
        local_device_ids=None if on_cpus else [options.process],
        initialization_timeout=60,
        heartbeat_timeout_seconds=100 if options.die is None else 10,
        shutdown_timeout_seconds=60 if options.die is None else 10,
        coordinator_bind_address=options.address,
    )
    if not on_cpus and (jax.devices()[0].platform != "gpu" or jax.local_device_count() != 1):
        sys.exit(f"needs a GPU for each process, got {jax.local_devices()} of {jax.devices()}")


def die_in_the_middle(here, process: int, idle: bool) -> None:
    """Calls ``sharded_moe`` again and again until ``process`` is killed; then the others must not wait for ever.

    ``idle``: the others are not in a call then, but sleep for longer than the heartbeat's time.
    """
    import helpers

    import jax_moe

    case, mesh = helpers.make_exact_case(1, tokens=32, out_dtype=jax.numpy.float32), here.mesh("expert")
    experts = here.prepare(jax.device_put(case.experts, jax_moe.expert_shardings(case.experts, mesh)))
    run = jax.jit(lambda *arrays: jax_moe.sharded_moe(*arrays, mesh=mesh, **case.options))
    for step in range(1_000_000):
        jax.block_until_ready(run(case.x, experts, case.routing))
        if step < 5:
            print(f"step {step}", flush=True)
        if step == 5 and jax.process_index() == process:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 5 and idle:
            time.sleep(120)
    sys.exit("nobody was missed")


if __name__ == "__main__":
    main()
