"""The command line itself: help, version, exit codes, output streams, fast start."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click
import pytest

import qlora_cli
from qlora_cli.cli import main
from qlora_cli.errors import (
    DataError,
    DoesNotFit,
    Interrupted,
    ModelError,
    QloraError,
    RecipeError,
    UsageError,
    VerificationFailed,
)
from tests.helpers.cli_helpers import qlora

SLOW_LIBRARIES = (
    "torch",
    "bitsandbytes",
    "transformers",
    "datasets",
    "accelerate",
    "matplotlib",
    "pandas",
)
LIST_IMPORTS = """
import json, sys
sys.argv = ["qlora", *{arguments}]
from qlora_cli.cli.main import run
run()
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules_after(*arguments: str) -> set[str]:
    """Return the names of the modules that a new interpreter has loaded after a command."""
    code = LIST_IMPORTS.format(arguments=list(arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("train", "--help"),
        ("recipe", "list"),
        ("recipe", "schema"),
        ("train", "no-such-recipe"),
        ("plan", "no-such-recipe", "--vram", "24GiB"),
    ],
)
def test_commands_that_need_no_model_import_no_slow_library(arguments: tuple[str, ...]) -> None:
    assert modules_after(*arguments).isdisjoint(SLOW_LIBRARIES)


def test_help_names_every_command_and_the_exit_codes() -> None:
    outcome = qlora("--help")
    assert outcome.code == 0
    assert all(name in outcome.out for name in main.qlora.commands)
    assert "130 interrupted" in " ".join(outcome.out.split())


def test_the_list_of_commands_has_complete_lines() -> None:
    assert "..." not in qlora("--help").out.partition("Commands:")[2]


def test_the_printed_version_is_the_version_of_the_package() -> None:
    try:
        metadata.version("qlora-cli")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert qlora("--version").out == f"qlora {qlora_cli.__version__}\n"


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_cli", "recipe", "bogus"], capture_output=True, check=False
    )
    assert done.returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("bogus",),
        ("train",),
        ("plan", "x", "--bogus"),
        ("merge", "x"),
        ("plan", "x", "--vram", "huge"),
        ("plan", "x", "--vram", "0"),
        ("generate", "x", "--prompt", "y", "--temperature", "-1"),
        ("train", "no-such-recipe"),
        ("report", "no-such-run"),
    ],
)
def test_a_wrong_command_line_exits_2_with_an_error_on_stderr(arguments: tuple[str, ...]) -> None:
    outcome = qlora(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err != ""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Add a command `fail`, which raises the first error of the returned list."""
    errors: list[BaseException] = []

    @click.command()
    def fail() -> None:
        raise errors[0]

    monkeypatch.setitem(main.qlora.commands, "fail", fail)
    return errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QloraError("x"), 1),
        (UsageError("x"), 2),
        (ModelError("x"), 2),
        (RecipeError("x", []), 2),
        (DataError("x", []), 2),
        (DoesNotFit("x"), 3),
        (VerificationFailed("x"), 4),
        (Interrupted("x"), 130),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
    ],
)
def test_each_error_has_its_exit_code(
    failing: list[BaseException], error: BaseException, code: int
) -> None:
    failing.append(error)
    outcome = qlora("fail")
    assert (outcome.code, outcome.out) == (code, "")
    assert "Traceback" not in outcome.err


def test_an_error_is_printed_once(failing: list[BaseException]) -> None:
    failing.append(QloraError("the disk is full", where="runs/x", hint="make room"))
    assert qlora("fail").err == "error: runs/x: the disk is full\n  make room\n"


def test_an_unexpected_error_prints_its_traceback_if_requested(
    failing: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing.append(RuntimeError("boom"))
    assert "QLORA_TRACEBACK=1" in qlora("fail").err
    monkeypatch.setenv("QLORA_TRACEBACK", "1")
    assert "Traceback" in qlora("fail").err


def test_main_exits_with_the_code(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["recipe", "show", str(tmp_path)])
    assert caught.value.code == 2
