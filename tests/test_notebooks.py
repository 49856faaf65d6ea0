"""The notebooks as committed: executed from top to bottom, without errors, small, and free of shell lines."""

import json
from pathlib import Path

import pytest

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
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lengths = sorted(len(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert 25 <= len(cells) <= 50, f"{len(cells)} cells"
    assert lengths[len(lengths) // 2] <= 8, f"the median code cell has {lengths[len(lengths) // 2]} lines"
    assert sum(lengths) <= 250, f"{sum(lengths)} lines of code"
