"""Which machine code has run on a GPU: cubins.json has the digest of every planned kernel's code (``cubin.py``).

    python tests/gpu/record_cubins.py COMMIT        # needs the DSL, no GPU

Run it when `pytest -m gpu` has passed on a GPU with the kernels of COMMIT, and not otherwise: from then on
tests/test_kernels_compile.py fails for a kernel whose machine code is another, until that has run too. Names of files,
modules and classes are no part of it. Without COMMIT it only writes new names of specs and what known code is made of
now: code that is not in the record stays out. CI compiles all kernels until that has been done, and some afterwards.
"""

import importlib.metadata
import json
import pathlib
import sys

FILE = pathlib.Path(__file__).with_name("cubins.json")
TARGET = "sm_90a"


def compiler_version() -> str:
    """The version of the DSL; another one may make other machine code."""
    from jax_moe.kernels import compiler

    return importlib.metadata.version(compiler.PACKAGE)


def made_of(spec) -> str:
    """A digest of all that decides about the machine code but the compiler, which is the key of the kernel cache."""
    from jax_moe.kernels import cache

    return cache._prefix(spec, TARGET)


def entry(spec) -> dict[str, object]:
    """What the record has of a kernel: its code, what a launch must say beside it, and what it was made of."""
    from jax_moe.kernels import cache, cubin

    kernel = cache.compiled(spec, TARGET)
    code = cubin.code_digest(kernel.image, kernel.symbol)
    return {"code": code, "shared_bytes": kernel.shared_bytes, "made_of": made_of(spec)}


def main(commit: str | None) -> None:
    sys.path.insert(0, str(FILE.parents[1]))
    import test_kernels_compile

    record = json.loads(FILE.read_text())
    kernels = {spec.name: entry(spec) for spec in test_kernels_compile.planned_specs()}
    if commit is None:
        known = [(kernel["code"], kernel["shared_bytes"]) for kernel in record["kernels"].values()]
        kernels = {name: k for name, k in kernels.items() if (k["code"], k["shared_bytes"]) in known}
    else:
        record |= {"compiler": compiler_version(), "sources": commit}
    FILE.write_text(json.dumps(record | {"kernels": kernels}, indent=1) + "\n")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [None]))
