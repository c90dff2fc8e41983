"""The documentation site: ``make docs`` builds it into ``build/docs``, with every warning an error.

Pages are the Markdown files of this folder, and those of REPOSITORY_PAGES, which stand beside the code they are about.
Each public name has a page made of its docstring; ``api.md`` is the list of them. No network is needed.
"""

import os
import pathlib
import re
import shutil
import typing

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import jax_moe

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"

REPOSITORY_PAGES = {
    "CONTRIBUTING.md": "contributing",
    "benchmarks/README.md": "benchmarks",
    "benchmarks/notes-h200.md": "notes-h200",
    "examples/README.md": "examples",
    "ffi/tests/launch_rule/README.md": "launch-rule-model",
    "jax_moe/kernels/README.md": "kernels",
    "jax_moe/kernels/sm90/README.md": "kernels-sm90",
    "jax_moe/kernels/sm100/README.md": "kernels-sm100",
    "tests/emulator/README.md": "emulator",
}
"""Files elsewhere in the repository that are pages of the site too, and their names there."""

project = "jax_moe"
author = "the jax_moe authors"
version = release = jax_moe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"jax_moe {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say the types, with shapes
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Names of other packages, whose pages are not looked up; a name of ours that is not on the API page is an error.
nitpick_ignore_regex = [("py:.*", r"(collections|flax|jax|numpy|pathlib|jax_moe\.checkpoints\.files)\..*")]

_LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def _with_links_of_the_site(text: str, file: pathlib.Path, folder: pathlib.Path) -> str:
    """The Markdown of ``file`` for a page in ``folder``: its links lead to pages, or to copies of other files."""

    def link(match: re.Match) -> str:
        label, anchor = match[1], match[3] or ""
        path = (file.parent / match[2]).resolve()
        if (path / "README.md").exists():
            path = path / "README.md"
        if not path.exists():
            return match[0]  # which the parser reports
        name = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            return f"`{name}`"
        if name in REPOSITORY_PAGES:
            return f"[{label}](/generated/{REPOSITORY_PAGES[name]}.md{anchor})"
        if path.parent == DOCS and path.suffix == ".md":
            return f"[{label}](/{path.name}{anchor})"
        return f"[{label}]({os.path.relpath(path, folder)}{anchor})"

    return _LINK.sub(link, text)


def _copy_repository_pages() -> None:
    shutil.rmtree(GENERATED, ignore_errors=True)  # pages of names that are gone, too
    GENERATED.mkdir()
    for name, page in REPOSITORY_PAGES.items():
        text = _with_links_of_the_site((ROOT / name).read_text(), ROOT / name, GENERATED)
        (GENERATED / f"{page}.md").write_text(text)


def _rewrite_links(app, docname: str, source: list[str]) -> None:
    file = DOCS / f"{docname}.md"
    if file.exists() and file.parent == DOCS:
        source[0] = _with_links_of_the_site(source[0], file, DOCS)


_PYTHONS_OWN = re.compile(
    r"Create new instance of|Alias for field number|Call self as a function|Represent a PEP 604|E\.g\. for int"
)


def _edit_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Links the pages that it names; an alias of types says its choices instead of what Python says of aliases."""
    lines[:] = [re.sub(r"``docs/([\w-]+)\.md``", r":doc:`/\1`", line) for line in lines if not _PYTHONS_OWN.match(line)]
    if choices := typing.get_args(obj):
        names = (f":class:`{each.__name__}`" if isinstance(each, type) else f'``"{each}"``' for each in choices)
        lines[:] = [f"{' or '.join(names)}: an option of :func:`jax_moe.fused_moe`."]


def _show_math(writer, node) -> None:
    """As MathML, which browsers show by themselves: MathJax would be fetched from elsewhere by every reader."""
    block = isinstance(node, nodes.math_block)
    try:
        writer.body.append(tex2mathml(node.astext(), as_block=block))
    except MathError as error:
        logging.getLogger(__name__).warning("%s", error, location=node)
    raise nodes.SkipNode


def setup(app) -> None:
    """Called by Sphinx."""
    _copy_repository_pages()
    app.add_html_math_renderer("mathml", inline_renderers=(_show_math, None), block_renderers=(_show_math, None))
    app.connect("source-read", _rewrite_links)
    app.connect("autodoc-process-docstring", _edit_docstring)
