"""Real text that is on every reader's disk: what ships with the Python interpreter itself."""

import ast
import pydoc_data.topics
import random
import sysconfig
from functools import lru_cache
from pathlib import Path

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))


def standard_library_files() -> list[Path]:
    """The standard library's modules in a fixed order, without its tests, demos and tables and what was installed."""
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings"}
    files = sorted(STANDARD_LIBRARY.rglob("*.py"))
    return [file for file in files if not skip & set(file.relative_to(STANDARD_LIBRARY).parts)]


def python_code(characters: int = 2_000_000) -> str:
    """The first `characters` of the standard library's source, its files in a fixed shuffled order, so that a
    validation part cut from the end holds files of every kind."""
    files = standard_library_files()
    random.Random(0).shuffle(files)
    return "".join(_read(file) + "\n" for file in files)[:characters]


def python_documentation() -> list[str]:
    """The interpreter's documentation in English: its help topics and the docstrings of the standard library."""
    topics = [text.strip() for _, text in sorted(pydoc_data.topics.topics.items())]
    return [*topics, *_docstrings_of(tuple(standard_library_files()))]


@lru_cache(maxsize=1)  # to parse it all takes seconds
def _docstrings_of(files: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(doc for file in files for doc in _docstrings(_read(file)))


def _docstrings(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="ignore")
