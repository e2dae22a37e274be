"""`qlora push` uploads what it shows in a dry run, and refuses a merge that was not verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.classifiers import (
    classification_recipe,
    make_classified_base,
    make_labelled_rows,
)
from tests.helpers.cli_helpers import qlora
from tests.helpers.interrupted import train_run
from tests.helpers.runs import make_base, make_recipe, make_rows, make_run

pytestmark = pytest.mark.slow

REPO = "someone/tuned"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of a finished run and of its verified merge."""
    folder = tmp_path_factory.mktemp("push")
    base = make_base(folder / "base", "llama")
    run, _ = make_run(folder / "run", make_recipe(base, make_rows(folder / "rows.jsonl")))
    result = {"train_loss": 1.25, "eval_loss": 1.5, "steps": 3}
    run.write(run.read() | {"result": result, "versions": {"torch": "2.0"}})
    merged = folder / "merged"
    assert qlora("merge", run.path, "--out", merged).code == 0
    assert qlora("verify", merged, "--against", run.path).code == 0
    return run.path, merged


@pytest.fixture
def merged(world: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(world[1], tmp_path / "merged"))


class StubHub:
    """Record what would be uploaded in place of `huggingface_hub.HfApi`."""

    calls: dict[str, Any]

    def __init__(self, **_: Any) -> None:
        type(self).calls = {}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        self.calls.update(repo=repo, private=private, exist_ok=exist_ok)
        return f"https://hub/{repo}"

    def create_commit(self, repo: str, operations: list[Any], commit_message: str) -> None:
        self.calls["files"] = {
            operation.path_in_repo: operation.path_or_fileobj for operation in operations
        }


def test_a_verified_merge_is_uploaded_with_its_card(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", StubHub)
    outcome = qlora("push", merged, REPO, "--private", "--json")
    assert outcome.code == 0, outcome.err
    files = StubHub.calls["files"]
    assert (StubHub.calls["repo"], StubHub.calls["private"]) == (REPO, True)
    assert sorted(files) == sorted(outcome.json["files"])
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert not {"merge.json", "verification.json"} & files.keys()
    assert outcome.json["url"] == f"https://hub/{REPO}"
    assert outcome.json["verified"] is True


def test_the_card_contains_what_was_measured_and_no_local_path(
    world: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "preview"
    outcome = qlora("push", world[1], REPO, "--dry-run", "--out", out)
    assert outcome.code == 0, outcome.err
    card = (out / "README.md").read_text()
    for words in (
        "# tuned",
        "Verification passed",
        "mean KL divergence",
        "held-out loss | 1.5",
        "rows.jsonl",
        "rank: 3",
        "| torch | 2.0 |",
        f'from_pretrained("{REPO}")',
    ):
        assert words in card
    assert str(world[0].parent) not in card
    assert (out / "model.safetensors").read_bytes() == (world[1] / "model.safetensors").read_bytes()
    outcome = qlora("push", world[1], REPO, "--dry-run", "--out", out)
    assert outcome.code == 2
    assert "is in use" in outcome.err


def test_an_adapter_needs_no_verification(world: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "preview"
    outcome = qlora("push", world[0], REPO, "--dry-run", "--out", out)
    assert outcome.code == 0, outcome.err
    names = {path.name for path in out.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "library_name: peft" in (out / "README.md").read_text()


def test_an_unverified_merge_is_refused(merged: Path, tmp_path: Path) -> None:
    record = merged / "verification.json"
    failed = json.loads(record.read_text()) | {"passed": False}
    record.write_text(json.dumps(failed))
    words = ("push", merged, REPO, "--dry-run", "--out", tmp_path / "out")
    outcome = qlora(*words)
    assert outcome.code == 2
    assert "its verification failed" in outcome.err
    record.unlink()
    outcome = qlora(*words)
    assert outcome.code == 2
    assert "it was not verified" in outcome.err
    assert not (tmp_path / "out").exists()
    assert qlora(*words, "--unverified").code == 0
    assert "This merge was not verified." in (tmp_path / "out" / "README.md").read_text()


def test_a_merge_that_changed_after_its_verification_is_refused(
    merged: Path, tmp_path: Path
) -> None:
    file = merged / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    outcome = qlora("push", merged, REPO, "--dry-run", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "it was not verified" in outcome.err


def test_wrong_arguments_are_refused(world: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = qlora("push", world[0], "tuned", "--dry-run", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "write owner/name" in outcome.err
    outcome = qlora("push", tmp_path, REPO, "--dry-run", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "neither a run's folder nor a merged model" in outcome.err
    assert qlora("push", world[0], REPO, "--out", tmp_path / "out").code == 2


def test_an_error_of_the_hub_has_a_hint(
    world: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(StubHub):
        def create_repo(self, repo: str, **_: Any) -> str:
            raise OSError("401 Client Error")

    monkeypatch.setattr("huggingface_hub.HfApi", Refusing)
    outcome = qlora("push", world[0], REPO)
    assert outcome.code == 1
    assert "401 Client Error" in outcome.err
    assert "hf auth login" in outcome.err


def test_an_adapter_is_sent_without_the_path_of_its_base_and_with_a_license(
    world: tuple[Path, Path], tmp_path: Path
) -> None:
    base = Path(json.loads((world[0] / "run.json").read_text())["base_folder"])
    out = tmp_path / "unknown"
    outcome = qlora("push", world[0], REPO, "--dry-run", "--out", out)
    assert outcome.code == 0, outcome.err
    assert "license: unknown" in (out / "README.md").read_text()
    assert "to send: adapter_config.json, adapter_model.safetensors, README.md" in outcome.err
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name
    assert not any(str(base.parent) in file.read_text() for file in out.glob("*[!s]"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    out = tmp_path / "known"
    assert qlora("push", world[0], REPO, "--dry-run", "--out", out).code == 0
    (base / "README.md").unlink()
    assert "license: apache-2.0" in (out / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_of_a_classifiers_card_loads_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three labels: PEFT and transformers would make a head of two."""
    base = make_classified_base(tmp_path / "base", "llama")
    rows = make_labelled_rows(tmp_path / "rows.jsonl")
    labels = {"kind": "classes", "labels": ["high", "low", "none"]}
    settings = classification_recipe(base, rows, classification=labels, train={"steps": 1})
    run = train_run(settings.model_copy(update={"output": str(tmp_path / "run")}))
    target, out = run.path, tmp_path / "preview"
    if kind == "merged":
        target = tmp_path / "merged"
        assert qlora("merge", run.path, "--out", target).code == 0
    outcome = qlora("push", target, REPO, "--dry-run", "--out", out, "--unverified")
    assert outcome.code == 0, outcome.err
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    code = card.split("```python")[1].split("```")[0].replace(REPO, str(out))
    monkeypatch.chdir(tmp_path)  # The uploaded adapter names its local base without a folder.
    content: dict[str, Any] = {}
    exec(code, content)
    (head,) = (
        weight
        for name, weight in content["model"].named_parameters()
        if name.endswith(("score.weight", "score.modules_to_save.default.weight"))
    )
    trained = load_file(run.adapter / "adapter_model.safetensors")
    assert head.shape == (3, 64)
    expected = trained["base_model.model.score.weight"]
    assert torch.equal(head, expected.to(head.dtype))
