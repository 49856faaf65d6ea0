"""The notebooks as committed: executed from top to bottom, without errors, small, and free of shell lines."""

import json
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_executed_and_clean(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "not run from top to bottom"
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    assert not [line for cell in code for line in cell["source"] if line.lstrip().startswith(("!", "%"))]
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert path.stat().st_size < 300_000, f"{path.stat().st_size / 1000:.0f} kB; 300 kB is the limit"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_short_enough_to_follow(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if counts(cell)]
    lengths = sorted(len(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert 25 <= len(cells) <= 50, f"{len(cells)} cells"
    assert lengths[len(lengths) // 2] <= 8, f"the median code cell has {lengths[len(lengths) // 2]} lines"
    assert sum(lengths) <= 250, f"{sum(lengths)} lines of code"
    words = sum(len("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown")
    assert words <= 2600, f"{words} words"


def counts(cell: dict) -> bool:
    """All but the cells of exercises, which come from the catalog, and the first of code, which asks for minilora."""
    return not cell["id"].startswith("exercise-") and "find_spec" not in "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_who_opens_a_notebook_alone_is_told_what_it_needs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    address = re.search(r'^Repository = "(.*)"$', PROJECT.read_text(encoding="utf-8"), re.MULTILINE).group(1)
    assert f'"git clone {address}\\npip install -e minilora"' in first and "raise SystemExit" in first
    assert not [cell for cell in cells if "colab-badge" in "".join(cell["source"])], "a badge to nowhere"
