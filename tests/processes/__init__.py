"""Several processes with ``jax.distributed``, one device each: CPUs over gloo, or GPUs over NCCL.

``launch.py`` starts them (also by hand: ``python tests/processes/launch.py --processes 2``), ``worker.py`` is what each
of them runs, ``checks.py`` what is checked there.
"""
