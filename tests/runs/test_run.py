"""A command reads `run.json` once and fingerprints the base once."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import Silent
from qlora_cli.files.source import fingerprint
from qlora_cli.jobs import evaluate, generate, merge, verify
from qlora_cli.jobs import record as run_record
from qlora_cli.jobs.text_generator import Sampling
from qlora_cli.runs import run as run_module
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run, adapter_at
from tests.helpers.interrupted import train_run
from tests.helpers.runs import make_base, make_recipe, make_rows, make_run


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", num=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "llama", "llama", spread=0.1)


@pytest.fixture(scope="module")
def finished(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder, _ = make_run(tmp_path_factory.mktemp("run") / "run", make_recipe(base, rows))
    folder.write(folder.read() | {"base_fingerprint": fingerprint(base)})
    return folder


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often `run.json` was opened and a base fingerprinted since the test began."""
    counts: Counter[str] = Counter()
    open_file = io.open

    def counting_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if Path(str(file)).name == "run.json" and "r" in mode:
            counts["run.json"] += 1
        return open_file(file, mode, *arguments, **options)

    def counting_fingerprint(folder: Path, like: str | None = None) -> str:
        counts["fingerprint"] += 1
        return fingerprint(folder, like)

    monkeypatch.setattr(io, "open", counting_open)  # which pathlib uses
    monkeypatch.setattr("builtins.open", counting_open)
    for module in (run_module, run_record):
        monkeypatch.setattr(module, "fingerprint", counting_fingerprint)
    return counts


def merge_to(run: RunFolder, out: Path, base: str = "auto") -> Path:
    return merge.run(run.path, out=out, dtype=None, base=base, observer=Silent()).out


def test_generate_reads_a_run_once(finished: RunFolder, counts: Counter[str]) -> None:
    prompter = generate.open_prompter(str(finished.path), Sampling(1), Silent())
    prompter.answer(generate.Prompt("abc"))
    assert counts == {"run.json": 1, "fingerprint": 1}


def test_generate_reads_each_run_named_as_an_adapter_once(
    base: Path, finished: RunFolder, counts: Counter[str]
) -> None:
    adapters = {"mine": finished.path}
    prompter = generate.open_prompter(str(base), Sampling(1), Silent(), adapters=adapters)
    prompter.answer(generate.Prompt("abc"))
    assert counts == {"run.json": 1}


def test_eval_reads_a_run_once(finished: RunFolder, rows: Path, counts: Counter[str]) -> None:
    evaluate.run(str(finished.path), data=str(rows), observer=Silent())
    assert counts == {"run.json": 1, "fingerprint": 1}


@pytest.mark.parametrize("kind", ["auto", "original"])
def test_merge_reads_a_run_once(
    finished: RunFolder, tmp_path: Path, counts: Counter[str], kind: str
) -> None:
    merge_to(finished, tmp_path / "out", kind)
    assert counts == {"run.json": 1, "fingerprint": 1}


def test_verify_reads_a_run_once(finished: RunFolder, tmp_path: Path, counts: Counter[str]) -> None:
    out = merge_to(finished, tmp_path / "out")
    counts.clear()
    assert verify.run(out, against=finished.path, observer=Silent()).passed
    assert counts == {"run.json": 1, "fingerprint": 1}


def test_train_fingerprints_the_base_once(
    base: Path, rows: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    recipe = make_recipe(base, rows, train={"steps": 1})
    train_run(recipe.model_copy(update={"output": str(tmp_path / "run")}))
    assert counts["fingerprint"] == 1


def test_making_a_run_reads_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "nothing")
    assert run.path == tmp_path / "nothing"
    assert Run.find(tmp_path) is None
    with pytest.raises(UsageError, match="not a run's folder"):
        assert run.record


@pytest.mark.parametrize(
    ("read", "key"),
    [(lambda run: run.recipe, "recipe"), (lambda run: run.base_folder, "base_folder")],
    ids=["recipe", "base_folder"],
)
def test_a_missing_key_is_named(tmp_path: Path, read: Callable[[Run], Any], key: str) -> None:
    folder = RunFolder(tmp_path)
    folder.write({"status": "done"})
    with pytest.raises(UsageError, match=f"damaged: it has no {key}"):
        read(Run(tmp_path))


def test_another_base_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path)
    copy.write(finished.read() | {"base_fingerprint": "of other weights"})
    with pytest.raises(ModelError, match="are not those that the run was trained on"):
        assert Run(tmp_path).base_folder


def test_an_adapter_is_found_in_a_run_and_in_its_own_folder(finished: RunFolder) -> None:
    in_run, alone = adapter_at(finished.path), adapter_at(finished.adapter)
    assert in_run.folder == alone.folder == finished.adapter
    assert in_run.layers.keys() == alone.layers.keys()
