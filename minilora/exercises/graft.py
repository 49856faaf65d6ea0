"""A student's functions in place of the package's, for all who call them, until they are put back.

Of a student's file three things are taken: the functions of the exercise, imports, and whatever is defined beside them
under a name that the package does not use. Everything else in the file is ignored, so an accident elsewhere in it does
no harm, and nothing runs twice.

The functions are compiled from the file, so that errors name its lines, but live in the package's own module and see
its names. A plain function gets new code inside the old object: whoever imported it before calls the new one. A method
is set on its class; its `super()` is told which class that is.
"""

import __future__

import ast
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType

from minilora.exercises.source import find, read_module

CODE = ("__code__", "__defaults__", "__kwdefaults__")  # what a call of a function depends on
# Annotations are not evaluated: they may name what the package's module does not.
FUTURE = __future__.annotations.compiler_flag
EXTRAS = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Try)
ABSENT = object()


class Graft:
    """What was put where, so that `undo` can put it back."""

    def __init__(self):
        self.before: list[tuple] = []  # (object, attribute, value), the newest last
        self.extras: dict[tuple[str, str], str] = {}  # by module and name, the helpers and imports of students
        self.modules: list[ModuleType] = []

    def put(self, owner, name: str, value):
        self.before.append((owner, name, vars(owner).get(name, ABSENT) if name not in CODE else getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self):
        for owner, name, value in reversed(self.before):
            if value is ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        for module in self.modules:
            forget(module)
        self.before, self.extras, self.modules = [], {}, []

    def file(self, module_name: str, names: list[str], text: str, filename: str):
        """Grafts the named functions of one file. A function that is still a stub is grafted too: it raises
        NotImplementedError. Raises SyntaxError, and ValueError where the file lacks one of them, where one is no plain
        function, and where a helper has the name of another file's."""
        tree = ast.parse(text, filename)
        missing = [name for name in names if find(tree, name) is None]
        if missing:
            raise ValueError(f"{filename} has no function {', '.join(missing)}; the name must stay as it was given")
        module = importlib.import_module(f"minilora.{module_name}")
        self.modules.append(module)
        before = {name for of, name in self.extras if of == module_name}
        for node in extras(tree, set(vars(module)) - before):
            for name, value in run(node, filename, module).items():
                if self.extras.setdefault((module_name, name), ast.dump(node)) != ast.dump(node):
                    raise ValueError(f"{filename} and another file both define {name}; give one of them another name")
                self.put(module, name, value)
        for name in (name for name in names if "." not in name):
            new = run(find(tree, name), filename, module)[name]
            if not isinstance(new, FunctionType):
                raise ValueError(f"{name} in {filename} is no plain function; take its decorator off")
            for attribute in CODE:
                self.put(getattr(module, name), attribute, getattr(new, attribute))

        for class_name in dict.fromkeys(name.split(".")[0] for name in names if "." in name):
            methods = [name.split(".")[1] for name in names if name.startswith(f"{class_name}.")]
            self.methods(getattr(module, class_name), methods, find(tree, class_name), module, filename)
        forget(module)

    def methods(self, owner: type, names: list[str], node: ast.ClassDef, module: ModuleType, filename: str):
        """The named methods of a class, and those that the package's class does not have."""
        chosen = [
            n for n in node.body if isinstance(n, ast.FunctionDef) and (n.name in names or n.name not in dir(owner))
        ]
        # All methods of a class body share the cell that `super()` looks into. One more method gives us that cell.
        (spy,) = ast.parse("def _cell(): return __class__").body
        body = ast.parse(f"class {owner.__name__}: pass").body[0]
        body.body = [*chosen, spy]
        made = vars(run(body, filename, module)[owner.__name__])
        made["_cell"].__closure__[0].cell_contents = owner
        for method in chosen:
            self.put(owner, method.name, made[method.name])


def forget(module: ModuleType):
    """Empties the module's caches: what lies in them was computed by the functions of before."""
    for value in vars(module).values():
        if hasattr(value, "cache_clear") and not isinstance(value, type):
            value.cache_clear()


def run(node: ast.stmt, filename: str, module: ModuleType) -> dict:
    """Executes one statement with the module's names as globals. Returns what it defines; the module is as before."""
    made: dict = {}
    tree = ast.fix_missing_locations(ast.Module([node], []))
    exec(compile(tree, filename, "exec", FUTURE, dont_inherit=True), vars(module), made)
    return made


def extras(tree: ast.Module, known: set[str]) -> Iterator[ast.stmt]:
    """The imports, definitions and assignments of names that the package's module does not have."""
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if getattr(node, "module", "") == "__future__":
                continue
            node.names = [alias for alias in node.names if alias_name(alias) not in known]
            if node.names:
                yield node
        elif isinstance(node, EXTRAS) and not defined(node) & known:
            yield node


def defined(node: ast.stmt) -> set[str]:
    """The names that a definition, an assignment or a `try` around imports gives a value to."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    inside = list(ast.walk(node))
    stored = {name.id for name in inside if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    return stored | {alias_name(alias) for alias in inside if isinstance(alias, ast.alias)}


def alias_name(alias: ast.alias) -> str:
    """The name that an import gives a value to."""
    return (alias.asname or alias.name).split(".")[0]


@contextmanager
def grafted(exercise, sources: Mapping[str, tuple[str, str]]) -> Iterator[None]:
    """`with grafted(exercise, {module: (text, filename)}):` the package runs on these functions."""
    graft = Graft()
    try:
        for module, names in exercise.modules.items():
            graft.file(module, names, *sources[module])
        yield
    finally:
        graft.undo()


def package_sources(exercise) -> dict[str, tuple[str, str]]:
    """The package's own text of the exercise's modules, as `grafted` takes it."""
    return {module: (read_module(module), f"minilora/{module.replace('.', '/')}.py") for module in exercise.modules}
