"""Lints all planned kernels of all targets, some minutes: ``PYTHONPATH=tests python -m lint [TARGET ...]``."""

import sys

from jax_moe.kernels.targets import TARGETS
from lint.check import check
from lint.compiled import all_specs, compiled

failed = 0
for target in sys.argv[1:] or TARGETS:
    specs = all_specs(target)
    for spec in specs:
        findings = check(compiled(spec, target)[1], spec.overlap, spec.cluster)
        compiled.cache_clear()
        failed += bool(findings)
        for finding in findings:
            print(finding)
    print(f"{target}: {len(specs)} kernels")
sys.exit(failed > 0)
