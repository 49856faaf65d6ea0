"""Stubs from source: what is a function's body, the same file without it, and the body alone.

Nothing marks a solution in the package. An exercise names a function, the parser finds it, and the lines from behind
its docstring to its end are the solution. Every other byte of the file stays as it is.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
USUAL = {"math", "torch", "Tensor", "nn", "F"}  # imported in a stub where its module imports them


def path_of(module: str) -> Path:
    """ "adapters.inject" -> the file in the package."""
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def read_module(module: str) -> str:
    return path_of(module).read_text(encoding="utf-8")


Definition = ast.FunctionDef | ast.ClassDef


def find(tree: ast.Module, name: str) -> Definition | None:
    """The definition of "function", "Class" or "Class.method", or None. Of several the last, as Python has it."""
    within: ast.Module | Definition = tree
    for part in name.split("."):
        named = (node for node in reversed(within.body) if getattr(node, "name", "") == part)
        node = next((node for node in named if isinstance(node, (ast.FunctionDef, ast.ClassDef))), None)
        if node is None:
            return None
        within = node
    return node


def find_function(text: str, name: str) -> ast.FunctionDef:
    """`find` in a text. Raises SyntaxError, and ValueError where there is none of that name."""
    node = find(ast.parse(text), name)
    if not isinstance(node, ast.FunctionDef):
        raise ValueError(f"there is no function {name}")
    return node


def body_lines(text: str, name: str) -> range:
    """The line numbers (from 0) of a function's body, behind its docstring, with comments.

    A first comment belongs to the body: it mostly says how the next line does it.
    """
    node, lines = find_function(text, name), text.splitlines()
    end = node.end_lineno or node.lineno
    if ast.get_docstring(node) is not None:
        return range(node.body[0].end_lineno or node.body[0].lineno, end)
    first = node.body[0].lineno - 1
    while not lines[first - 1].strip() or lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return range(first, end)


def solution(text: str, name: str) -> list[str]:
    """The lines of a function's body."""
    return [text.splitlines()[number] for number in body_lines(text, name)]


def definition(text: str, name: str) -> str:
    """A whole function, from its decorators to its end, with the indentation it has."""
    node = find_function(text, name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def blank(text: str, names: list[str], note: str) -> str:
    """The same text, with `raise NotImplementedError("note: name")` for the body of each function."""
    for name in names:
        indent = " " * (find_function(text, name).col_offset + 4)
        numbers, lines = body_lines(text, name), text.splitlines(keepends=True)
        lines[numbers.start : numbers.stop] = [f'{indent}raise NotImplementedError("{note}: {name}")\n']
        text = "".join(lines)
    return text


def outline(text: str, names: list[str], told: set[str]) -> str:
    """Of a module's text the functions of these names as they are, and around methods their class: its docstring, the
    types of its attributes and, of its other methods, those that are told of, without their bodies."""
    lines, tree, parts = text.splitlines(), ast.parse(text), []
    for name in dict.fromkeys(name.split(".")[0] for name in names):
        node = find(tree, name)
        assert node is not None
        if isinstance(node, ast.FunctionDef):
            parts.append("\n".join(lines[begin(node) : node.end_lineno]))
            continue
        kept = lines[begin(node) : node.body[0].lineno - 1]
        for member in node.body:
            if not isinstance(member, ast.FunctionDef):
                kept += [""] if isinstance(member, ast.AnnAssign) and kept[-1].endswith('"""') else []
                kept += lines[member.lineno - 1 : member.end_lineno]
            elif f"{name}.{member.name}" in names:
                kept += ["", *lines[begin(member) : member.end_lineno]]
            elif member.name in told:
                kept += ["", *head_of(lines[begin(member) : body_lines(text, f"{name}.{member.name}").start])]
        parts.append("\n".join(kept))
    return "\n\n\n".join(parts)


def head_of(lines: list[str]) -> list[str]:
    """A definition without its body: a docstring is body enough."""
    return lines if lines[-1].endswith('"""') else [*lines[:-1], f"{lines[-1]} ..."]


def begin(node: Definition) -> int:
    """The line number (from 0) of a definition with its decorators."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1


def imports_for(part: str, text: str, module: str, told: set[str]) -> list[str]:
    """Import lines for a part of a module's text: of what it uses or is told of, from where the module has it, or from
    the module itself."""
    tree, made = ast.parse(part), ast.parse(text).body
    used = told | USUAL | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found: list[str] = []
    for node in made:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in used]
            found += [ast.unparse(node)] if node.names else []
    own = [named for node in made for named in names_made_by(node) if named in used]
    own = [named for named in own if find(tree, named) is None]
    return [*found, *([f"from minilora.{module} import {', '.join(dict.fromkeys(own))}"] if own else [])]


def names_made_by(node: ast.stmt) -> list[str]:
    """What a definition or an assignment gives a value to."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return []
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


def is_blank(node: Definition | None) -> bool:
    """True for a function whose body is nothing but a docstring and `raise NotImplementedError`."""
    if node is None:
        return False
    rest = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if len(rest) != 1 or not isinstance(rest[0], ast.Raise):
        return False
    raised = rest[0].exc.func if isinstance(rest[0].exc, ast.Call) else rest[0].exc
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"


def written(text: str, names: list[str]) -> bool:
    """True if one of the functions is no longer the stub it was. SyntaxError for text that does not parse."""
    tree = ast.parse(text)
    return not all((node := find(tree, name)) is not None and is_blank(node) for name in names)


def is_released() -> bool:
    """True in a hand-out, where the package itself is blank."""
    return is_blank(find(ast.parse(read_module("lora")), "LoRALinear.forward"))
