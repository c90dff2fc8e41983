"""Lints all planned kernels of all targets, some minutes: ``PYTHONPATH=tests python -m lint [TARGET ...]``."""

import sys

from ptx import parser

from jax_moe.kernels import compiler
from jax_moe.kernels.targets import TARGETS
from lint.check import check
from lint.compiled import all_specs

failed = 0
for target in sys.argv[1:] or TARGETS:
    specs = all_specs(target)
    for spec in specs:
        findings = check(parser.parse(compiler.ptx(spec, target)), spec.overlap, spec.cluster)
        failed += bool(findings)
        for finding in findings:
            print(finding)
    print(f"{target}: {len(specs)} kernels")
sys.exit(failed > 0)
