"""The tests mirror the package, and no test module imports another one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

EXTRA_FOLDERS = {"gpu", "helpers", "interop", "recipes", "tools"}
"""Folders of tests that mirror no folder of the package."""


def modules_with_tests(tests: Path) -> list[Path]:
    return [path for path in sorted(tests.rglob("*.py")) if "helpers" not in path.parts]


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports_of_tests(tests: Path) -> list[str]:
    """Return `file imports module` for each import of a test module or a conftest.py.

    Also checks tests/helpers: a helper must not import a test either.
    """
    names = {path.stem for path in modules_with_tests(tests)}
    return [
        f"{path.relative_to(tests)} imports {module}"
        for path in sorted(tests.rglob("*.py"))
        for module in imported_modules(path)
        if module.rpartition(".")[2] in names and module.partition(".")[0] == tests.name
    ]


def unexpected_folders(tests: Path, package: Path) -> list[str]:
    """Return the folders of tests that neither mirror a folder of the package nor are extra."""
    folders = {path.parent.relative_to(tests) for path in tests.rglob("*.py")}
    return sorted(
        str(folder)
        for folder in folders
        if folder.parts
        and folder.parts[0] not in EXTRA_FOLDERS
        and not (package / folder / "__init__.py").is_file()
    )


def test_no_test_imports_another_test(root: Path) -> None:
    assert imports_of_tests(root / "tests") == []


def test_each_folder_mirrors_the_package(root: Path) -> None:
    assert unexpected_folders(root / "tests", root / "qlora_cli") == []


@pytest.mark.parametrize(
    "statement",
    [
        "from tests.nn.test_quant import draw",
        "from tests.nn import test_quant",
        "import tests.nn.test_quant",
        "from tests.gpu.conftest import GPU",
    ],
)
def test_an_import_of_a_test_is_found(tmp_path: Path, statement: str) -> None:
    tests = tmp_path / "tests"
    for name, text in {
        "nn/test_quant.py": "",
        "gpu/conftest.py": "",
        "gpu/test_linears.py": f"def test_x():\n    {statement}\n",
        "helpers/quantized.py": "",
    }.items():
        (tests / name).parent.mkdir(parents=True, exist_ok=True)
        (tests / name).write_text(text)
    found = imports_of_tests(tests)
    assert len(found) == 1
    assert found[0].startswith("gpu/test_linears.py imports tests.")


def test_a_folder_without_its_package_folder_is_found(tmp_path: Path) -> None:
    for name in ("tests/nn/test_a.py", "tests/weights/test_b.py", "tests/gpu/test_c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "package/nn").mkdir(parents=True)
    (tmp_path / "package/nn/__init__.py").write_text("")
    assert unexpected_folders(tmp_path / "tests", tmp_path / "package") == ["weights"]
