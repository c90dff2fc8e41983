"""Figures in the documentation are those of ``benchmarks/results`` and of the programs that printed them."""

import importlib.util
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def results(name: str, card: str = "h200") -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{card}-{name}.json").read_text())["results"]


def microseconds(rows: list[dict]) -> dict[tuple[str, int], float]:
    """By method, or model where there is only one method, and tokens."""
    return {(row["method"], row["tokens"]): 1e6 * row["seconds"] for row in rows}


def is_rounded(text: str, value: float) -> bool:
    """Whether a page may write ``value`` so: the nearest number of as many decimals."""
    decimals = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-decimals * (1 + 1e-9)


def rows_of(page: str, heading: str) -> dict[int, list[str]]:
    """The table below a heading that leads with tokens, by these."""
    text = (DOCS / page).read_text().partition(f"\n{heading}\n")[2]
    table = re.search(r"^\| T \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    return {int(tokens): rest for tokens, *rest in cells}


def test_the_table_of_one_model():
    ours = {row["tokens"]: row for row in results("qwen3-235b-a22b")}
    peers = results("bf16-peers")
    torch, ragged = (
        {r["tokens"]: 1e6 * r["seconds"] for r in peers if r["method"] == name} for name in ("torch", "ragged_dot")
    )
    table = rows_of("hopper.md", "## Speed")
    assert table.keys() == ours.keys()
    for tokens, (time, floor, _, peer, slower, _, much_slower) in table.items():
        assert is_rounded(time.removesuffix(" us"), 1e6 * ours[tokens]["seconds"]), time
        assert is_rounded(floor, ours[tokens]["ratio"]), floor
        assert is_rounded(peer.removesuffix(" us"), torch[tokens]), peer
        assert is_rounded(slower, torch[tokens] / (1e6 * ours[tokens]["seconds"])), slower
        assert not much_slower or is_rounded(much_slower, ragged[tokens] / (1e6 * ours[tokens]["seconds"])), much_slower


def test_the_table_of_variants_and_what_choosing_makes_of_it():
    times = microseconds(results("qwen3-235b-a22b-variants"))
    text = (DOCS / "choosing.md").read_text()
    slower = []
    for tokens, cells in rows_of("hopper.md", "### Variants").items():
        exact = [times[f"jax_moe {variant}", tokens] for variant in ("w4a16/atomic", "w4a4/atomic", "w4a16/ordered")]
        for cell, value in zip(cells, exact, strict=True):
            time, *percent = re.findall(r"[-+]?[\d.]+", cell)
            assert is_rounded(time, value), cell
            assert not percent or is_rounded(percent[0], 100 * (value / exact[0] - 1)), cell
        slower.append(f"{100 * (exact[2] / exact[0] - 1):.1f}%")
        if tokens != 2048:
            assert f"{exact[0]:.0f} and {exact[1]:.0f} us" in text
    assert f"{slower[0]} more for 512 tokens, {slower[1]} for 2048, {slower[2]} for 8192" in text


def test_the_table_of_other_models():
    rows = {(row["model"], row["tokens"]): row for row in results("other-models")}
    models = ("qwen3-30b-a3b", "deepseek-r1-ep8", "mixtral-8x7b", "gpt-oss-120b")
    for tokens, cells in rows_of("hopper.md", "### Other models").items():
        for model, cell in zip(models, cells, strict=True):
            time, floor = cell.split(", ")
            assert is_rounded(time, 1e6 * rows[model, tokens]["seconds"]), (model, cell)
            assert is_rounded(floor, rows[model, tokens]["ratio"]), (model, cell)


@pytest.mark.parametrize(("card", "heading"), [("h200", "Compared with another 4-bit kernel"), ("h100", "On an H100")])
def test_the_tables_with_humming(card, heading):
    rows = {(row["model"], row["method"], row["tokens"]): row for row in results("with-humming", card)}
    text = (DOCS / "hopper.md").read_text().partition(f"### {heading}\n")[2].partition("###")[0]
    header, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    counts = [int(cell) for cell in re.findall(r"\d+", header)]
    methods = {"ours": ("jax_moe w4a16/atomic", "seconds"), "x floor": ("jax_moe w4a16/atomic", "ratio")}
    methods["humming"] = ("humming", "seconds")
    model, seen = "", []
    for line in lines:
        name, what, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        model = name or model
        method, key = methods[what]
        for count, cell in zip(counts, cells, strict=True):
            row = rows[model, method, count]
            assert is_rounded(cell, row[key] * (1e6 if key == "seconds" else 1)), (model, what, count)
            seen.append((model, method, count))
    assert set(seen) == rows.keys()
    peers = [key for key in rows if key[1] == "humming"]
    shares = [rows[m, methods["ours"][0], t]["seconds"] / rows[m, p, t]["seconds"] for m, p, t in peers]
    said = f"{min(shares):.2f} to {max(shares):.2f} of"
    assert f"Ours takes {said} humming's time" in text
    readme = (ROOT / "README.md").read_text()
    if card == "h200":
        assert f"the whole call takes {said} its time" in readme
    else:
        ratios = [rows["qwen3-235b-a22b", methods["ours"][0], count]["ratio"] for count in counts]
        assert f"this layer takes {min(ratios):.2f} to {max(ratios):.2f} times what that card allows" in readme


def test_the_readme_on_several_gpus():
    rows = [row for row in results("scaling-qwen3-235b-a22b") if row["precision"] == "w4a16"]
    alone = {row["tokens"]: row["seconds"] for row in rows if row["devices"] == 1}

    def best(tokens: int, devices: int) -> str:
        times = [row["seconds"] for row in rows if row["tokens"] == tokens and row["devices"] == devices
                 and row["form"] == "replicated"]  # fmt: skip
        return f"{100 * alone[tokens] / devices / min(times):.0f}%"

    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"8192 tokens reach {best(8192, 2)} of linear scaling on two H200s and {best(8192, 4)} on four" in text
    assert f"8 tokens reach {best(8, 2)} and {best(8, 4)}" in text


def test_what_quantisation_costs_is_what_the_examples_printed():
    row = re.search(r"^\| bits per byte .*$", (DOCS / "choosing.md").read_text(), re.MULTILINE)[0]
    printed = re.findall(r"│ MoE, .*│ +([\d.]+) │", (ROOT / "examples" / "language_model.py").read_text())
    assert re.findall(r"\d\.\d{3}", row) == printed
    assert len(printed) == 3
    row = re.search(r"^\| error of a layer .*$", (DOCS / "choosing.md").read_text(), re.MULTILINE)[0]
    printed = re.findall(r"│ w4a\d+ +│ ordered │ +\S+ │ +(\S+) │", (ROOT / "examples" / "quickstart.py").read_text())
    assert re.findall(r"\d+%", row) == [f"{100 * float(error):.0f}%" for error in printed]


def test_the_pictures_have_the_errors_that_their_script_computes():
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
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


def tables_of(page: str, heading: str) -> list[tuple[list[str], list[list[str]]]]:
    """The headers and the cells of all tables below a heading, up to the next of its level."""
    level = heading.split()[0]
    text = (DOCS / page).read_text().partition(f"\n{heading}\n")[2].partition(f"\n{level} ")[0]
    found = []
    for header, lines in re.findall(r"^(\|.*)\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines.splitlines())]
        found.append((rows[0], rows[1:]))
    return found


def test_the_tables_of_products():
    names = ("groups", "in_features", "out_features", "tokens", "method")
    rows = {tuple(row[name] for name in names): row for row in results("products")}
    rows |= {tuple(row[name] for name in names): row for row in results("products-ragged-dot")}
    kinds = iter([(128, 4096, 3072), (128, 1536, 4096), (8, 4096, 28672), (1, 4096, 4096), (1, 4096, 14336)])
    seen = 0
    for header, lines in tables_of("grouped-product.md", "## How fast"):
        for column in range(1, len(header), 2):
            kind = next(kinds)
            assert [int(n) for n in re.findall(r"\d+", header[column])][-1] == kind[-1]
            for tokens, *cells in lines:
                time, ratio = cells[column - 1].split(", ")
                ours, peer = (rows[*kind, int(tokens), method] for method in ("w4a16", "bf16"))
                assert is_rounded(ratio, ours["ratio"]), (kind, tokens)
                for text, row in ((time, ours), (cells[column], peer)):
                    number, unit = text.split()
                    assert is_rounded(number, row["seconds"] * {"us": 1e6, "ms": 1e3}[unit]), (kind, tokens, text)
                    seen += 1
    assert seen == len(rows)


def test_the_tables_of_several_gpus():
    """Those of w4a4 and w4a16 side by side, and of deepseek-r1."""
    names = ("scaling-qwen3-235b-a22b-w4a4", "scaling-deepseek-r1", "scaling-deepseek-r1-w4a4")
    rows = {
        (row["model"], row["precision"], row["tokens"], row["devices"], row["form"]): row
        for name in names
        for row in results(name)
    }
    seen = set()
    for header, lines in tables_of("scaling.md", "## Measured"):
        is_deepseek = header[0] in ("w4a16", "w4a4") and header[2:] == [
            "2 replicated", "2 spread", "4 replicated", "4 spread"
        ]  # fmt: skip
        if not is_deepseek and not header[0].startswith("qwen3-235b-a22b, spread"):
            continue
        for what, *cells in lines:
            precision = header[0] if is_deepseek else what.split(",")[0]
            model, tokens = "deepseek-r1" if is_deepseek else "qwen3-235b-a22b", int(what.split()[-1])
            for head, cell in zip(header[1:], cells, strict=True):
                devices, *form = head.removesuffix(" GPU").split()
                key = model, precision, tokens, int(devices), "one GPU" if devices == "1" else (*form, "spread")[0]
                time, _, efficiency = cell.partition(" (")
                assert is_rounded(time, 1e6 * rows[key]["seconds"]), key
                assert not efficiency or is_rounded(f"0{efficiency[:-1]}", rows[key]["efficiency"]), key
                seen.add(key)
    assert seen == rows.keys()


def test_the_table_of_a_whole_model():
    rows = {(row["method"], row["what"], row["batch"]): row for row in results("whole-model-qwen3-30b-a3b")}
    methods = {"loop, w4a16": "jax_moe w4a16 loop", "scan, w4a16": "jax_moe w4a16 scan",
               "transformers, bfloat16": "transformers"}  # fmt: skip
    ((_, lines),) = [t for t in tables_of("whole-model.md", "## How fast") if "weights" in t[0]]
    seen = set()
    for name, weights, *cells in lines:
        for cell, key in zip(cells, (("decode", 1), ("decode", 8), ("decode", 64), ("prefill", 1)), strict=True):
            if not cell:
                continue
            row = rows[methods[name], *key]
            assert is_rounded(weights.removesuffix(" GB"), row["weight_gb"])
            value = 1e3 * row["seconds"] if key[0] == "prefill" else row["tokens"] / row["seconds"]
            assert is_rounded(cell.removesuffix(" ms"), value), (name, key)
            seen.add((methods[name], *key))
    assert seen == rows.keys()
    readme = " ".join((ROOT / "README.md").read_text().split())
    for method, counts in (("jax_moe w4a16 loop", "{} tokens a second for one sequence on an H200 and {} for 64"),
                           ("transformers", "makes {} and {}.")):  # fmt: skip
        rates = (rows[method, "decode", batch] for batch in (1, 64))
        assert counts.format(*(f"{row['tokens'] / row['seconds']:.0f}" for row in rates)) in readme
