"""Check the package's layers from its source; no module is imported.

    python tools/checks/check_layers.py [PACKAGE]

Prints each fault as `file:line: what` and exits with 1 if there is one. The rules are the functions
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
    ("errors", "units", "events", "device", "shortage"),
    ("recipe",),
    ("files",),
    ("memory",),
    ("parallel",),
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
    ("quantize",),
    ("jobs",),
    ("ui",),
    ("cli",),
)
"""From the lowest layer to the highest. A file imports from its own layer and from lower ones."""

HEAVY = {"accelerate", "bitsandbytes", "datasets", "torch", "transformers"}
"""Libraries that take a second or more to import."""
TERMINAL = {"click", "rich"}
"""Libraries that write to the user's terminal."""


@dataclass(frozen=True)
class Import:
    """`from target import name` or `import target` (name None). late: inside a function."""

    target: str
    name: str | None
    line: int
    late: bool


@dataclass(frozen=True)
class Module:
    """One file of the package. name: dotted name. layer: the folder or file below the root."""

    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def layer(self) -> str:
        """Return the layer: `ui` for `package.ui.tables`, empty for the root and its `__main__`."""
        parts = self.name.split(".")
        return "" if len(parts) == 1 or parts[1] == "__main__" else parts[1]

    def fault(self, line: int, what: str) -> str:
        """Return the line that is printed for a fault."""
        return f"{self.path}:{line}: {what}"


Modules = Mapping[str, Module]


def check(package: Path) -> list[str]:
    """Return every fault of the package in this folder."""
    modules = _read(package)
    return [fault for rule in RULES for fault in rule(modules)]


def imports_only_lower_layers(modules: Modules) -> Iterator[str]:
    """Imports are from the own layer or lower ones, and every layer is in the order."""
    places = {layer: place for place, layers in enumerate(LAYERS) for layer in layers}
    for module in modules.values():
        is_data = len(module.tree.body) <= 1  # A folder of data files with an empty __init__.py.
        if module.layer and module.layer not in places and not is_data:
            yield module.fault(1, f"{module.layer} is not in LAYERS, the order of the layers")
        for one, target in _inner_imports(module, modules):
            here, there = places.get(module.layer), places.get(modules[target].layer)
            if here is not None and there is not None and there > here:
                what = f"{module.layer} imports {target}, which is in a higher layer"
                yield module.fault(one.line, what)


def starts_fast(modules: Modules) -> Iterator[str]:
    """The layers up to recipe, ui and cli import no heavy library, directly or indirectly.

    cli may import one inside a function, the others may not.
    """
    for module in modules.values():
        if module.layer not in {*LAYERS[0], "recipe", "ui", "cli"}:
            continue
        with_late = module.layer != "cli"
        chain = _path_to_heavy(module, modules, with_late)
        if chain:
            yield module.fault(1, f"imports {chain[-1]} through {' -> '.join(chain)}")


def only_ui_and_cli_print(modules: Modules) -> Iterator[str]:
    """Only ui and cli write to the terminal."""
    for module in modules.values():
        if module.layer in ("ui", "cli"):
            continue
        for one in module.imports:
            if one.target.partition(".")[0] in TERMINAL:
                yield module.fault(one.line, f"{one.target} is for ui and cli")
        for node in ast.walk(module.tree):
            match node:
                case ast.Call(func=ast.Name(id="print")):
                    yield module.fault(node.lineno, "print( is for ui and cli")
                case ast.Attribute(value=ast.Name(id="sys"), attr="stdout" | "stderr" as stream):
                    yield module.fault(node.lineno, f"sys.{stream} is for ui and cli")


def imports_from_the_definition(modules: Modules) -> Iterator[str]:
    """A name is imported from the file that defines it, not through another file."""
    for module in modules.values():
        for one in module.imports:
            origin = modules.get(one.target)
            if origin is None or one.name is None or f"{one.target}.{one.name}" in modules:
                continue
            if origin.layer and one.name not in _defined(origin):
                what = f"{one.name} is not defined in {one.target}, but imported from it"
                yield module.fault(one.line, what)
        is_package = module.path.name == "__init__.py"
        if is_package and module.layer and module.imports:
            yield module.fault(module.imports[0].line, "only the root package re-exports names")


def imports_nothing_from_the_root(modules: Modules) -> Iterator[str]:
    """No file of the package imports from the root, which re-exports names for users."""
    root = min(modules, key=len)
    for module in modules.values():
        for one in module.imports:
            submodule = one.name is not None and f"{root}.{one.name}" in modules
            if module.layer and one.target == root and not submodule:
                yield module.fault(one.line, f"imports from the root {root}")


def has_one_accelerate(modules: Modules) -> Iterator[str]:
    """Only train/runtime.py imports accelerate."""
    for module, line in _importers(modules, {"accelerate"}):
        if module.name.split(".")[1:] != ["train", "runtime"]:
            yield module.fault(line, "only train/runtime.py imports accelerate")


def needs_no_other_trainer(modules: Modules) -> Iterator[str]:
    """PEFT and TRL are for tests and benchmarks; the package does not import them."""
    for module, line in _importers(modules, {"peft", "trl"}):
        yield module.fault(line, "peft and trl are not used by the package")


def has_one_backward(modules: Modules) -> Iterator[str]:
    """There is one `.backward()` call, so that the plan runs the step that trains."""
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
    """The name of a file describes its content."""
    for module in modules.values():
        if module.path.name in ("utils.py", "helpers.py", "misc.py", "common.py"):
            yield module.fault(1, "the name does not describe the content")


RULES: tuple[Callable[[Modules], Iterator[str]], ...] = (
    imports_only_lower_layers,
    starts_fast,
    only_ui_and_cli_print,
    imports_from_the_definition,
    imports_nothing_from_the_root,
    has_one_accelerate,
    needs_no_other_trainer,
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
    """Yield the imports below a node, without those for type checkers only."""
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
    """Return the absolute target: `..errors` inside `package.ui` is `package.errors`."""
    if not node.level:
        return node.module or ""
    above = origin.split(".")[: len(origin.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _inner_imports(module: Module, modules: Modules) -> Iterator[tuple[Import, str]]:
    """Yield each import of a file of the package, with the name of that file."""
    for one in module.imports:
        submodule = f"{one.target}.{one.name}"
        if submodule in modules:
            yield one, submodule
        elif one.target in modules:
            yield one, one.target


def _path_to_heavy(start: Module, modules: Modules, with_late: bool) -> list[str]:
    """Return the chain of imports from `start` to a heavy library; empty if there is none.

    with_late: also follow the imports inside functions of `start`.
    """
    waiting = deque([(start, [start.name], with_late)])
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
    """Yield the modules that importing `a.b.c` runs: `a`, `a.b` and itself."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _importers(modules: Modules, libraries: set[str]) -> Iterator[tuple[Module, int]]:
    for module in modules.values():
        for one in module.imports:
            if one.target.partition(".")[0] in libraries:
                yield module, one.line


def _defined(module: Module) -> set[str]:
    """Return the names that a file defines outside functions and classes."""
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
    """Check the package of this checkout, or the one named on the command line."""
    default = Path(__file__).resolve().parents[2] / "qlora_cli"
    faults = check(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
    for fault in faults:
        print(fault)
    print(f"layers: {len(RULES)} rules, {len(faults) or 'no'} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
