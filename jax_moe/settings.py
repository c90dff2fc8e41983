"""The ``JAX_MOE_*`` variables of the environment, each once; ``doctor`` and ``docs/settings.md`` list what is here."""

import dataclasses
import os
import pathlib

import platformdirs


@dataclasses.dataclass(frozen=True)
class Setting:
    """A variable of the environment.

    Attributes:
      name: of the variable.
      meaning: what it does when it is set.
      default: what holds when it is not set, or empty.
    """

    name: str
    meaning: str
    default: str

    def value(self) -> str | None:
        """Of the variable; None if it is not set or empty, which mean the same."""
        return os.environ.get(self.name) or None


CACHE_DIR = Setting("JAX_MOE_CACHE_DIR", "the folder in which compiled GPU kernels are kept", "the user's cache folder")
DEBUG = Setting(
    "JAX_MOE_DEBUG",
    "1 checks expert ids while the program runs: it raises on a negative id and, where `num_experts=E` is given, on an "
    "id of E or more. Read when a call is traced; 0 is off",
    "off",
)
FFI_LIBRARY = Setting("JAX_MOE_FFI_LIBRARY", "another build of the FFI library", "the installed one")
GRAPH_DUMP = Setting(
    "JAX_MOE_GRAPH_DUMP",
    "an existing folder: each captured call writes its CUDA graph there as a Graphviz file",
    "nothing is written",
)
CPU_KERNELS = Setting(
    "JAX_MOE_CPU_KERNELS",
    "`avx512`, `avx2`, or anything else for the portable code: the code that the CPU handler runs, if the CPU can",
    "the fastest that the CPU can run",
)

SETTINGS = (CACHE_DIR, DEBUG, FFI_LIBRARY, GRAPH_DUMP, CPU_KERNELS)
"""All of them. The last two are read by the FFI library, once a process."""


def cache_folder() -> pathlib.Path:
    """The folder for what is made once and kept."""
    return pathlib.Path(CACHE_DIR.value() or platformdirs.user_cache_dir("jax_moe"))


def debugging() -> bool:
    """Whether calls that are traced now check their expert ids."""
    return DEBUG.value() not in (None, "0")


def ffi_library() -> pathlib.Path | None:
    """The FFI library to open; None: the installed one."""
    path = FFI_LIBRARY.value()
    return None if path is None else pathlib.Path(path)
