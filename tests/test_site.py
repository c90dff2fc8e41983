"""The documentation site builds without a warning, has a page for each public name, and its links lead somewhere.

Links to other sites are for ``make docs-links``: they need a network.
"""

from html.parser import HTMLParser
import os
import pathlib
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import helpers
import pytest
from test_api import listed, SECTIONS

for package in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(package, reason=f"{package} is not installed (the extra docs)")
pytest.importorskip("flax", reason="flax is not installed: the site has a page for jax_moe.nn")

DOCS = pathlib.Path(__file__).parents[1] / "docs"


class Page(HTMLParser):
    """What a page of the site links to, and the places in it that a link may lead to."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.links |= {value for name in ("href", "src") if (value := given.get(name))}
        self.ids |= {given["id"]} if given.get("id") else set()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("site")
    path = os.pathsep.join(filter(None, [str(helpers.PACKAGE_FOLDER), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-E", "-d", folder / "trees"]
    ran = subprocess.run(
        [*map(str, command), "-b", "html", str(DOCS), str(folder / "html")],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / "html"


def test_every_public_name_has_a_page(site):
    names = {f"{module}.{name}" for module in SECTIONS for name in listed(module)}
    assert len(names) > 60
    assert [name for name in sorted(names) if name not in Page(site / "generated" / f"{name}.html").ids] == []


def test_links_inside_the_site_lead_somewhere(site):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 80
    broken = []
    for path, page in pages.items():
        for link in page.links:
            scheme, place, target, _, anchor = urlsplit(link)
            if scheme or place:
                continue
            found = (path.parent / unquote(target)).resolve() if target else path
            if not found.exists() or (anchor and found in pages and unquote(anchor) not in pages[found].ids):
                broken.append((path.relative_to(site).as_posix(), link))
    assert broken == []


def test_a_reader_needs_nothing_from_elsewhere(site):
    """The published form is a folder: no script, style or picture comes from another site."""

    class Fetched(Page):
        def handle_starttag(self, tag, attrs):
            given = dict(attrs)
            if tag in ("script", "img", "iframe") or (tag == "link" and given.get("rel") == "stylesheet"):
                super().handle_starttag(tag, attrs)

    fetched = {link for path in site.rglob("*.html") for link in Fetched(path).links}
    assert {link for link in fetched if urlsplit(link).netloc} == set()
