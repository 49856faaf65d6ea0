"""A student's functions in place of the package's, for all who call them, until they are put back.

Of a student's file these things are taken: the functions of the exercise, and of whatever is imported, defined or
assigned beside them, in the file or in their class, what they use and the package does not have under that name.
Everything else in the file is ignored, so experiments and accidents elsewhere in it do no harm.

The functions are compiled from the file, so that errors name its lines, but live in the package's own module and see
its names. A plain function gets new code inside the old object: whoever imported it before calls the new one. A method
is set on its class; its `super()` is told which class that is.
"""

import __future__

import ast
import builtins
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FunctionType, ModuleType

from torch.autograd import Function

from minilora.exercises.source import Definition, find, find_function, read_module

CODE = ("__code__", "__defaults__", "__kwdefaults__")  # what a call of a function depends on
# Annotations are not evaluated: they may name what the package's module does not.
FUTURE = __future__.annotations.compiler_flag
BESIDE = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Try)
ABSENT = object()


class Graft:
    """What was put where, so that `undo` can put it back."""

    def __init__(self):
        self.before: list[tuple] = []  # (object, attribute, value), the newest last
        self.helpers: dict[tuple, tuple[str, str]] = {}  # by owner and name: in which file, and what it says
        self.modules: list[ModuleType] = []

    def put(self, owner, name: str, value):
        self.before.append((owner, name, vars(owner).get(name, ABSENT) if name not in CODE else getattr(owner, name)))
        setattr(owner, name, value)

    def put_helper(self, owner, name: str, value, nodes: list[ast.stmt], filename: str):
        """The same for what stands beside the functions, `nodes`. ValueError where another file has another `name`."""
        said = filename, "\n".join(ast.dump(node) for node in nodes if defined(node) & {name, "*"})
        there = self.helpers.setdefault((owner, name), said)
        if there[0] != filename and there[1] != said[1]:
            raise ValueError(f"{filename} and {there[0]} both define {name}; give one of them another name")
        self.put(owner, name, value)

    def undo(self):
        for owner, name, value in reversed(self.before):
            if value is ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        for module in self.modules:
            forget(module)
        self.before, self.helpers, self.modules = [], {}, []

    def file(self, module_name: str, names: list[str], text: str, filename: str):
        """Grafts the named functions of one file. A function that is still a stub is grafted too: it raises
        NotImplementedError. Raises SyntaxError, ValueError where the file lacks one of them or a helper has the name of
        another file's, and whatever the file's own definitions raise."""
        tree = ast.parse(text, filename)
        if missing := [name for name in names if find(tree, name) is None]:
            raise ValueError(f"{filename} has no function {', '.join(missing)}; the name must stay as it was given")
        module = importlib.import_module(f"minilora.{module_name}")
        self.modules.append(module)
        plain = {name: find_function(text, name) for name in names if "." not in name}
        members = {
            name: class_members(getattr(module, name), find(tree, name), names)
            for name in dict.fromkeys(name.split(".")[0] for name in names if "." in name)
        }
        helpers = needed(beside(tree, own_names(module)), [*plain.values(), *sum(members.values(), [])])
        for node in helpers:
            for name, value in run(node, filename, module).items():
                if name not in own_names(module):
                    self.put_helper(module, name, value, helpers, filename)
        for name, function in plain.items():
            self.function(module, name, function, filename)
        for name, nodes in members.items():
            self.members(module, name, nodes, names, filename)
        forget(module)

    def proxy(self, target: str, make: Callable[[str], Callable]):
        """`make(target)` in place of a function. A method is set on its class; of an autograd function, whose forward
        and backward work on torch's own objects, `apply` is replaced."""
        owner, name = owner_of(target)
        if isinstance(owner, ModuleType):
            self.move(owner, name, make(target), "proxy")
            return
        static = name == "apply" or isinstance(vars(owner).get(name), staticmethod)
        function = make(target)
        self.put(owner, name, staticmethod(function) if static else function)

    def function(self, module: ModuleType, name: str, node: ast.FunctionDef, filename: str):
        self.move(module, name, run(node, filename, module)[name], filename)

    def move(self, module: ModuleType, name: str, new: Callable, filename: str):
        if not isinstance(new, FunctionType) or new.__code__.co_freevars:  # decorated: no code that could be moved
            self.put(module, f"_decorated_{name}", new)
            (call,) = ast.parse(f"def {name}(*args, **kwargs): return _decorated_{name}(*args, **kwargs)").body
            new = run(call, filename, module)[name]
        for attribute in CODE:
            self.put(getattr(module, name), attribute, getattr(new, attribute))

    def members(self, module: ModuleType, class_name: str, nodes: list[ast.stmt], names: list[str], filename: str):
        """Methods and attributes of a class."""
        owner = getattr(module, class_name)
        # All methods of a class body share the cell that `super()` looks into. One more method gives us that cell.
        (spy,) = ast.parse("def _cell(): return __class__").body
        (body,) = ast.parse(f"class {class_name}: pass").body
        assert isinstance(body, ast.ClassDef)
        body.body = [*nodes, spy]
        made = vars(run(body, filename, module)[class_name])
        made["_cell"].__closure__[0].cell_contents = owner
        for node in nodes:
            for name in defined(node) & made.keys():
                if f"{class_name}.{name}" in names:
                    self.put(owner, name, made[name])
                else:
                    self.put_helper(owner, name, made[name], nodes, filename)


def owner_of(target: str) -> tuple[ModuleType | type, str]:
    """Module or class, and the name in it, of what is called for "module:function" or "module:Class.method"."""
    module, _, path = target.partition(":")
    owner, name = importlib.import_module(f"minilora.{module}"), path
    if "." in path:
        owner, name = getattr(owner, path.partition(".")[0]), path.partition(".")[2]
        name = "apply" if issubclass(owner, Function) else name
    return owner, name


@cache
def own_names(owner: ModuleType | type) -> frozenset[str]:
    """The names of a module or class, and those that are built in, before anything is grafted onto it."""
    return frozenset(dir(owner)) | (frozenset(dir(builtins)) if isinstance(owner, ModuleType) else frozenset())


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


def class_members(owner: type, node: Definition | None, names: list[str]) -> list[ast.stmt]:
    """Of a class body the named methods, and the methods and attributes that the package's class does not have."""
    wanted = {name.partition(".")[2] for name in names if name.startswith(f"{owner.__name__}.")}
    members = [
        member
        for member in (node.body if node else [])
        if isinstance(member, (ast.FunctionDef, ast.Assign, ast.AnnAssign))
    ]
    return [member for member in members if defined(member) <= wanted or not defined(member) & own_names(owner)]


def beside(tree: ast.Module, known: frozenset[str]) -> list[ast.stmt]:
    """The imports, one name each, definitions and assignments of names that the package's module does not have."""
    nodes: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            nodes += [ast.copy_location(ast.Import([alias]), node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            nodes += [ast.copy_location(ast.ImportFrom(node.module, [alias], node.level), node) for alias in node.names]
        elif isinstance(node, BESIDE):
            nodes.append(node)
    return [node for node in nodes if not defined(node) & known]


def needed(nodes: list[ast.stmt], functions: list[ast.stmt]) -> list[ast.stmt]:
    """Of these statements those that the functions use, by themselves or through one another, in their order."""
    used = names_in(functions)
    while True:
        chosen = [node for node in nodes if defined(node) & used or "*" in defined(node)]
        if (more := used | names_in(chosen)) == used:
            return chosen
        used = more


def names_in(nodes: list[ast.stmt]) -> set[str]:
    return {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}


def defined(node: ast.stmt) -> set[str]:
    """The names that an import, a definition, an assignment or a `try` around such gives a value to."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    inside = list(ast.walk(node))
    stored = {name.id for name in inside if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    imported = {(alias.asname or alias.name).split(".")[0] for alias in inside if isinstance(alias, ast.alias)}
    return stored | imported


@contextmanager
def grafted(exercise, sources: Mapping[str, tuple[str, str]]) -> Iterator[Graft]:
    """`with grafted(exercise, {module: (text, filename)}):` the package runs on these functions."""
    graft = Graft()
    try:
        for module, names in exercise.modules.items():
            graft.file(module, names, *sources[module])
        yield graft
    finally:
        graft.undo()


def package_sources(exercise) -> dict[str, tuple[str, str]]:
    """The package's own text of the exercise's modules, as `grafted` takes it."""
    return {module: (read_module(module), f"minilora/{module.replace('.', '/')}.py") for module in exercise.modules}
