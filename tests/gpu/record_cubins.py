"""Which machine code has run on a GPU: cubins.json has the SHA-256 of every planned kernel's cubin.

    python tests/gpu/record_cubins.py COMMIT        # needs the DSL, no GPU

Run it when `pytest -m gpu` has passed on a GPU with the kernels of COMMIT, and not otherwise: from then on
tests/test_kernels_compile.py fails for a kernel whose machine code is another, until that has run too.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import sys

FILE = pathlib.Path(__file__).with_name("cubins.json")

sys.path.insert(0, str(FILE.parents[1]))


def compiler() -> str:
    """The version of the DSL; another one may make other machine code."""
    from jax_moe.kernels import compile

    return importlib.metadata.version(compile.COMPILER)


def digest(spec) -> str:
    from jax_moe.kernels import compile

    return hashlib.sha256(compile.compiled(spec, "sm_90a").image).hexdigest()


if __name__ == "__main__":
    import test_kernels_compile

    (commit,) = sys.argv[1:]
    digests = {spec.name: digest(spec) for spec in test_kernels_compile.planned_specs()}
    record = {"compiler": compiler(), "sources": commit, "sha256": digests}
    FILE.write_text(json.dumps(record, indent=1) + "\n")
