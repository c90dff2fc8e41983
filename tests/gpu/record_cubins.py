"""Which machine code has run on a GPU: cubins.json has the digest of every planned kernel's code (``cubin.py``).

    python tests/gpu/record_cubins.py COMMIT        # needs the DSL, no GPU

Run it when `pytest -m gpu` has passed on a GPU with the kernels of COMMIT, and not otherwise: from then on
tests/test_kernels_compile.py fails for a kernel whose machine code is another, until that has run too. Names of files,
modules and classes are no part of it. Without COMMIT it only writes new names of specs: code that is not in the record
stays out.
"""

import importlib.metadata
import json
import pathlib
import sys

FILE = pathlib.Path(__file__).with_name("cubins.json")


def compiler_version() -> str:
    """The version of the DSL; another one may make other machine code."""
    from jax_moe.kernels import compiler

    return importlib.metadata.version(compiler.PACKAGE)


def entry(spec) -> dict[str, object]:
    """What the record has of a kernel: its code, and what a launch must say beside it."""
    from jax_moe.kernels import cache, cubin

    kernel = cache.compiled(spec, "sm_90a")
    return {"code": cubin.code_digest(kernel.image, kernel.symbol), "shared_bytes": kernel.shared_bytes}


def main(commit: str | None) -> None:
    sys.path.insert(0, str(FILE.parents[1]))
    import test_kernels_compile

    record = json.loads(FILE.read_text())
    kernels = {spec.name: entry(spec) for spec in test_kernels_compile.planned_specs()}
    if commit is None:
        known = list(record["kernels"].values())
        kernels = {name: kernel for name, kernel in kernels.items() if kernel in known}
    else:
        record |= {"compiler": compiler_version(), "sources": commit}
    FILE.write_text(json.dumps(record | {"kernels": kernels}, indent=1) + "\n")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [None]))
