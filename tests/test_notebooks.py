"""The notebooks as committed: executed from top to bottom, without errors, small, and written for today's package."""

import ast
import inspect
import json
import re
from operator import attrgetter
from pathlib import Path
from types import ModuleType

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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_names_what_there_is(path):
    """Every `module.name` that the cells use exists, and every call of an imported function fits its signature."""
    tree = ast.parse("\n\n".join(code_of(path)))
    known = imported(tree)
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(module := value_of(node.value, known), ModuleType):
            if not hasattr(module, node.attr):
                faults.append(f"{module.__name__} has no {node.attr}")
        if isinstance(node, ast.Call) and (problem := misfit(value_of(node.func, known), node)):
            faults.append(f"{ast.unparse(node)}: {problem}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_source_that_a_notebook_prints_is_today_s(path):
    """By `print(inspect.getsource(name))`, or without its docstring by the notebook's own `show(name, name)`."""
    known = all_imported(ast.parse("\n\n".join(code_of(path))))
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        printed = "".join(line for out in cell.get("outputs", []) for line in out.get("text", []))
        for names in re.findall(r"^(?:print\(inspect\.getsource|show)\(([\w., ]+)\)", "".join(cell["source"]), re.M):
            for module, _, rest in (name.partition(".") for name in names.split(", ")):
                source = inspect.getsource(attrgetter(rest)(known[module]) if rest else known[module])
                code = source.split('"""')[-1].strip()  # behind the docstring
                assert code in printed, f"{module}.{rest} is not what the cell shows; run the notebook again"


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def all_imported(tree: ast.Module) -> dict[str, object]:
    """What the import lines bind."""
    lines = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    known: dict[str, object] = {}
    exec(compile(ast.Module(lines, type_ignores=[]), "<imports>", "exec"), known)
    return known


def imported(tree: ast.Module) -> dict[str, object]:
    """The same without the names that the notebook binds once more itself."""
    known = all_imported(tree)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {name: value for name, value in known.items() if name not in own}


def value_of(node: ast.expr, known: dict[str, object]) -> object:
    """The object behind `name` or `module.name`; None for what only the running notebook knows."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(module := value_of(node.value, known), ModuleType):
        return getattr(module, node.attr, None)
    return None


def misfit(function: object, call: ast.Call) -> str | None:
    """Why the call's arguments do not fit a function or class of minilora, if they do not and that can be seen."""
    ours = callable(function) and getattr(function, "__module__", "").startswith("minilora")
    starred = any(isinstance(value, ast.Starred) for value in call.args) or any(not word.arg for word in call.keywords)
    if not ours or starred:
        return None
    try:
        inspect.signature(function).bind(*call.args, **{word.arg: word.value for word in call.keywords})
    except TypeError as error:
        return str(error)
    return None
