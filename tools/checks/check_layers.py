"""Proves from the source what the design says of the package's rooms; no module is imported.

    python tools/checks/check_layers.py [FOLDER OF THE PACKAGE]

Prints each fault as `file:line: what` and exits 1 where there is any. The rules are the functions
in `RULES`; tests/tools/test_check_layers.py shows that each of them catches a fault.
"""

from __future__ import annotations

import ast
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LAYERS = (
    ("errors", "units", "events", "device"),
    ("recipe",),
    ("files",),
    ("memory",),
    ("nn",),
    ("data",),
    ("adapters",),
    ("models",),
    ("tasks",),
    ("runs",),
    ("train",),
    ("export",),
    ("plan",),
    ("proof",),
    ("jobs",),
    ("ui",),
    ("cli",),
)
"""Imports go only to the left, or stay in the room."""

HEAVY = {"accelerate", "bitsandbytes", "datasets", "torch", "transformers"}
"""Take a second or more to import."""
TALKATIVE = {"click", "rich"}
"""Write on the user's terminal."""


@dataclass(frozen=True)
class Import:
    """`from target import name` or `import target` (name None). late: inside a function."""

    target: str
    name: str | None
    line: int
    late: bool


@dataclass(frozen=True)
class Module:
    """One file of the package. name: dotted. room: the part of the package it belongs to."""

    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        """`ui` of `package.ui.tables`; empty for the root and its `__main__`."""
        parts = self.name.split(".")
        return "" if len(parts) == 1 or parts[1] == "__main__" else parts[1]

    def fault(self, line: int, what: str) -> str:
        """As compilers write it."""
        return f"{self.path}:{line}: {what}"


Modules = Mapping[str, Module]


def check(package: Path) -> list[str]:
    """Every fault of the package in this folder."""
    modules = _read(package)
    return [fault for rule in RULES for fault in rule(modules)]


def goes_left(modules: Modules) -> Iterator[str]:
    """Imports go only to the left; every room has its place in the order."""
    places = {room: place for place, rooms in enumerate(LAYERS) for room in rooms}
    for module in modules.values():
        is_data = len(module.tree.body) <= 1  # A folder of files, with an empty page of its own.
        if module.room and module.room not in places and not is_data:
            yield module.fault(1, f"{module.room} has no place in the order of rooms")
        for one, target in _inner_imports(module, modules):
            here, there = places.get(module.room), places.get(modules[target].room)
            if here is not None and there is not None and there > here:
                what = f"{module.room} imports {target}, which lies to its right"
                yield module.fault(one.line, what)


def is_light(modules: Modules) -> Iterator[str]:
    """What starts fast imports nothing heavy, itself or through another file.

    recipe, ui and what lies left of recipe: in functions neither. cli: in functions it may.
    """
    for module in modules.values():
        if module.room not in {*LAYERS[0], "recipe", "ui", "cli"}:
            continue
        late_too = module.room != "cli"
        chain = _way_to_heavy(module, modules, late_too)
        if chain:
            yield module.fault(1, f"imports {chain[-1]} through {' -> '.join(chain)}")


def keeps_quiet(modules: Modules) -> Iterator[str]:
    """Only ui and cli write on the terminal."""
    for module in modules.values():
        if module.room in ("ui", "cli"):
            continue
        for one in module.imports:
            if one.target.partition(".")[0] in TALKATIVE:
                yield module.fault(one.line, f"{one.target} is for ui and cli")
        for node in ast.walk(module.tree):
            match node:
                case ast.Call(func=ast.Name(id="print")):
                    yield module.fault(node.lineno, "print( is for ui and cli")
                case ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr" as stream):
                    yield module.fault(node.lineno, f"sys.{stream} is for ui and cli")


def takes_from_the_source(modules: Modules) -> Iterator[str]:
    """A name is imported from the file that defines it, never through another one."""
    for module in modules.values():
        for one in module.imports:
            origin = modules.get(one.target)
            if origin is None or one.name is None or f"{one.target}.{one.name}" in modules:
                continue
            if origin.room and one.name not in _defined(origin):
                what = f"{one.name} is not defined in {one.target}; import it from where it is"
                yield module.fault(one.line, what)
        is_package = module.path.name == "__init__.py"
        if is_package and module.room and module.imports:
            yield module.fault(module.imports[0].line, "only the root package gathers names")


def leaves_the_root_alone(modules: Modules) -> Iterator[str]:
    """Nothing inside imports from the package root, which gathers names for others."""
    root = min(modules, key=len)
    for module in modules.values():
        for one in module.imports:
            submodule = one.name is not None and f"{root}.{one.name}" in modules
            if module.room and one.target == root and not submodule:
                yield module.fault(one.line, f"imports from the root {root}")


def has_one_accelerate(modules: Modules) -> Iterator[str]:
    """One door leads to accelerate."""
    for module, line in _importers(modules, {"accelerate"}):
        if module.name.split(".")[1:] != ["train", "runtime"]:
            yield module.fault(line, "accelerate is imported by train/runtime.py alone")


def has_no_rivals(modules: Modules) -> Iterator[str]:
    """PEFT and TRL are what tests compare with, not what the package is built on."""
    for module, line in _importers(modules, {"peft", "trl"}):
        yield module.fault(line, "peft and trl are not used by the package")


def has_one_backward(modules: Modules) -> Iterator[str]:
    """One training step, so that the plan runs the real one."""
    calls = [
        module.fault(node.lineno, "one of several .backward( calls")
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "backward"
    ]
    if not calls:
        yield "there is no .backward( call in the package"
    if len(calls) > 1:
        yield from calls


def has_no_utils(modules: Modules) -> Iterator[str]:
    """A file says by its name what is in it."""
    for module in modules.values():
        if module.path.name in ("utils.py", "helpers.py", "misc.py", "common.py"):
            yield module.fault(1, "a name that says nothing")


RULES: tuple[Callable[[Modules], Iterator[str]], ...] = (
    goes_left,
    is_light,
    keeps_quiet,
    takes_from_the_source,
    leaves_the_root_alone,
    has_one_accelerate,
    has_no_rivals,
    has_one_backward,
    has_no_utils,
)


def _read(package: Path) -> Modules:
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        origin = name if is_package else name.rpartition(".")[0]
        modules[name] = Module(name, path, tree, tuple(_imports(tree, origin, late=False)))
    return modules


def _imports(node: ast.AST, origin: str, late: bool) -> Iterator[Import]:
    """The imports below a node, without those that only a type checker follows."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import():
                for alias in child.names:
                    yield Import(alias.name, None, child.lineno, late)
            case ast.ImportFrom():
                target = _absolute(child, origin)
                for alias in child.names:
                    yield Import(target, alias.name, child.lineno, late)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for branch in child.orelse:
                    yield from _imports(branch, origin, late)
            case _:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from _imports(child, origin, late or function)


def _absolute(node: ast.ImportFrom, origin: str) -> str:
    """`..errors` from within `package.ui` is `package.errors`."""
    if not node.level:
        return node.module or ""
    above = origin.split(".")[: len(origin.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _inner_imports(module: Module, modules: Modules) -> Iterator[tuple[Import, str]]:
    """Each import of the package's own, with the file that it means."""
    for one in module.imports:
        submodule = f"{one.target}.{one.name}"
        if submodule in modules:
            yield one, submodule
        elif one.target in modules:
            yield one, one.target


def _way_to_heavy(start: Module, modules: Modules, late_too: bool) -> list[str]:
    """The chain of imports by which a heavy library is reached when `start` is; empty for none."""
    waiting = deque([(start, [start.name], late_too)])
    seen = {start.name}
    while waiting:
        module, way, late = waiting.popleft()
        for one in module.imports:
            library = one.target.partition(".")[0]
            if library in HEAVY and (late or not one.late):
                return [*way, library]
        for one, target in _inner_imports(module, modules):
            if one.late and not late:
                continue
            for name in _loaded_with(target):
                if name in modules and name not in seen:
                    seen.add(name)
                    waiting.append((modules[name], [*way, name], False))
    return []


def _loaded_with(name: str) -> Iterator[str]:
    """Importing `a.b.c` runs `a` and `a.b` before."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _importers(modules: Modules, libraries: set[str]) -> Iterator[tuple[Module, int]]:
    for module in modules.values():
        for one in module.imports:
            if one.target.partition(".")[0] in libraries:
                yield module, one.line


def _defined(module: Module) -> set[str]:
    """Names that a file gives to something of its own, outside functions and classes."""
    names = set()
    waiting: list[ast.AST] = [module.tree]
    while waiting:
        match waiting.pop():
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case node:
                waiting += ast.iter_child_nodes(node)
    return names


def main() -> int:
    """Checks the package beside this folder, or the one named on the command line."""
    default = Path(__file__).resolve().parents[2] / "qlora_cli"
    faults = check(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
    for fault in faults:
        print(fault)
    print(f"layers: {len(RULES)} rules, {len(faults) or 'no'} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
