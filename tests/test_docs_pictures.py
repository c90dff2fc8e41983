"""The table of ``docs/pictures.md`` has what its script computes."""

import importlib.util
import pathlib
import re

SCRIPT = pathlib.Path(__file__).parents[1] / "docs" / "pictures.py"


def test_the_page_has_the_errors_that_its_script_computes():
    spec = importlib.util.spec_from_file_location("pictures", SCRIPT)
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    arrays = pictures.layer()
    assert arrays["tokens"].sum() == pictures.TOKENS * pictures.TOP_K

    def rows(text: str) -> dict[str, tuple[float, float]]:
        found = re.findall(r"^\| ([\w, ]+) \| ([\d.]+)% \| ([\d.]+) \|$", text, re.MULTILINE)
        return {name: (float(percent), float(correlation)) for name, percent, correlation in found}

    page, computed = rows(pictures.PAGE.read_text()), rows(pictures.errors(arrays))
    assert page.keys() == computed.keys()
    assert len(page) == 3
    for name, (percent, correlation) in page.items():
        # fp32 sums in another order move the last digit, where it is at the edge of its rounding.
        assert abs(percent - computed[name][0]) < 0.11, name
        assert abs(correlation - computed[name][1]) < 0.0011, name
