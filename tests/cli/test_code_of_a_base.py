"""Python files in a model folder are never run, even if stdin answers yes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import ModelError
from tests.helpers.cli_checks import assert_refused
from tests.helpers.cli_helpers import Outcome, qlora
from tests.helpers.runs import make_base, make_rows

pytestmark = pytest.mark.slow

AUTO_MAP = {
    "AutoConfig": "own.OwnConfig",
    "AutoModelForCausalLM": "own.OwnModel",
    "AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"],
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a model folder with a Python file that creates the file `sentinel` if it is run."""
    folder = make_base(tmp_path / "base", "llama")
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'sentinel')!r}).touch()\n"
        "OwnTokenizer = OwnConfig = OwnModel = None\n"
    )
    make_rows(tmp_path / "rows.jsonl")
    return folder


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def answered_yes(base: Path, command: str) -> Outcome:
    """Run a command on this base with `y` on stdin; assert that its Python file was not run."""
    folder = base.parent
    recipe = folder / "job.yaml"
    recipe.write_text(
        f"model: {{name: {base}}}\n"
        f"data: {{train: {folder / 'rows.jsonl'}, seq_len: 32}}\n"
        f"train: {{steps: 1, grad_accum: 1}}\noutput: {folder}/run\n"
    )
    outcome = qlora(command, recipe, stdin="y\n" * 8)
    assert not (folder / "sentinel").exists(), "code of the model folder was run"
    assert "Traceback" not in outcome.err
    return outcome


def test_a_tokenizer_that_needs_code_is_refused(base: Path) -> None:
    (base / "config.json").unlink()
    change(base / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="OwnTokenizer")
    assert_refused(
        answered_yes(base, "data"),
        2,
        str(base),
        "its tokenizer needs Python code of its own",
        "does not run code from a model folder",
        "tokenizer.json",
    )


def test_a_tokenizer_that_loads_without_its_code_works(base: Path) -> None:
    """Its class is part of transformers."""
    change(base / "tokenizer_config.json", auto_map=AUTO_MAP)
    for command in ("data", "train"):
        outcome = answered_yes(base, command)
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_config_that_needs_code_is_refused(base: Path, command: str) -> None:
    change(base / "config.json", auto_map=AUTO_MAP, model_type="own")
    assert_refused(
        answered_yes(base, command),
        2,
        "config.json",
        "its config needs Python code of its own",
        "does not run code from a model folder",
    )


def test_a_config_of_a_known_family_works_without_its_code(base: Path) -> None:
    change(base / "config.json", auto_map=AUTO_MAP)
    run = base.parent / "run"
    assert answered_yes(base, "train").code == 0
    merged = base.parent / "merged"
    for words in (("merge", run, "--out", merged), ("verify", merged, "--against", run)):
        outcome = qlora(*words, stdin="y\n" * 8)
        assert outcome.code == 0, outcome.err
    assert not (base.parent / "sentinel").exists()


def test_a_known_type_without_a_causal_model_runs_no_code(base: Path) -> None:
    """To list the linear layers of an unsupported family, its model is created."""
    content = {"model_type": "t5", "auto_map": AUTO_MAP}
    (base / "config.json").write_text(json.dumps(content))
    assert_refused(answered_yes(base, "train"), 2, "t5")


@pytest.mark.parametrize("value", ["x", 5, None])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_an_auto_map_of_a_wrong_type_is_refused(base: Path, file: str, value: Any) -> None:
    change(base / file, auto_map=value)
    assert_refused(answered_yes(base, "train"), 2, file, "damaged", "auto_map")


def test_a_value_of_a_wrong_type_in_a_tokenizer_config_is_refused(base: Path) -> None:
    change(base / "tokenizer_config.json", tokenizer_class=5)
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(base))
