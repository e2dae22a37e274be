"""`base.scales: measured`: measured once, kept in the run, and obeyed by every later command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import Interrupted, ModelError, RecipeError
from qlora_cli.events import Silent
from qlora_cli.files import cache
from qlora_cli.jobs import importance, measured_base, merge, plan, quantize, train, verify
from qlora_cli.memory.ledger import Ledger
from qlora_cli.models.importance import write_importance
from qlora_cli.nn.codebook import clear_scale_codebook
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.open import open_any
from qlora_cli.runs.run import Run
from tests.helpers.interrupted import train_run
from tests.helpers.runs import CPU, logits, make_base, make_recipe, make_rows

pytestmark = pytest.mark.slow
IDS = torch.tensor([[3, 40, 7, 9, 21]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "cache"))


def recipe_of(folder: Path, output: str = "run", **base: Any) -> Recipe:
    model = folder / "base"
    if not model.exists():
        make_base(model, "llama", spread=0.15)
        make_rows(folder / "rows.jsonl", num=16)
    settings = {"scales": "measured", **base}
    train_settings = {"steps": 3, "checkpoint_every": 1, "lr": 1e-2}
    recipe = make_recipe(model, folder / "rows.jsonl", base=settings, train=train_settings)
    return recipe.model_copy(update={"output": str(folder / output)})


def adapter_of(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_a_resumed_run_equals_the_unbroken_one_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan.run(recipe_of(tmp_path), device_profile=None, fit=False, compare=False).ledger
    clear_scale_codebook(CPU)
    whole = train_run(recipe_of(tmp_path, "whole"))
    with pytest.raises(Interrupted):
        train_run(recipe_of(tmp_path, "stopped"), stop_after=1)
    monkeypatch.setattr(importance, "measured_squares", lambda *_: pytest.fail("measured again"))
    run = train_run(recipe_of(tmp_path, "stopped"), resume=True)
    assert adapter_of(run) == adapter_of(whole)
    assert run.importance.read_bytes() == whole.importance.read_bytes()
    choices = {choice["key"]: choice["reason"] for choice in whole.read()["choices"]}
    assert "training rows" in choices["base.importance"]
    ledger = Ledger.from_dict(json.loads(whole.memory_json.read_text()))
    assert ledger.phases[0].name == planned.phases[0].name == "load"
    assert ledger.phases[0].peak_bytes == planned.phases[0].peak_bytes


def test_a_moved_run_answers_and_merges_as_it_was_trained(tmp_path: Path) -> None:
    run = train_run(recipe_of(tmp_path))
    expected = logits(open_any(str(run.path), CPU, Silent()).loaded, IDS)
    plain = train_run(recipe_of(tmp_path, "plain", scales="absmax"))
    assert not plain.importance.exists()
    moved = tmp_path / "elsewhere"
    shutil.move(run.path, moved)
    assert torch.equal(logits(open_any(str(moved), CPU, Silent()).loaded, IDS), expected)
    assert not torch.equal(logits(open_any(str(plain.path), CPU, Silent()).loaded, IDS), expected)
    merged = tmp_path / "merged"
    merge.run(moved, out=merged, dtype=None, base="dequantized", observer=Silent())
    assert verify.run(merged, against=moved, observer=Silent()).passed


def test_the_file_of_another_run_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_run(recipe_of(tmp_path, "first"))
    monkeypatch.setattr(importance, "measured_squares", lambda *_: pytest.fail("measured again"))
    second = train_run(recipe_of(tmp_path, "second", importance=str(first.importance)))
    shutil.rmtree(first.path)
    assert Run(second.path).recipe.base.importance == str(second.importance)
    open_any(str(second.path), CPU, Silent())


def test_a_changed_or_missing_file_is_an_error(tmp_path: Path) -> None:
    run = train_run(recipe_of(tmp_path))
    content = bytearray(run.importance.read_bytes())
    content[-2] ^= 1
    run.importance.write_bytes(content)
    with pytest.raises(ModelError, match="checksum"):
        open_any(str(run.path), CPU, Silent())
    run.importance.unlink()
    with pytest.raises(ModelError, match="does not exist"):
        open_any(str(run.path), CPU, Silent())


def test_a_file_of_another_base_is_refused(tmp_path: Path) -> None:
    run = train_run(recipe_of(tmp_path))
    squares = load_file(run.importance)
    squares.pop(next(iter(squares)))
    other = tmp_path / "other.safetensors"
    write_importance(other, squares)
    with pytest.raises(RecipeError, match="another base"):
        train_run(recipe_of(tmp_path, "second", importance=str(other)))
    save_file(squares, other)  # Without a checksum.
    with pytest.raises(ModelError, match="checksum"):
        train_run(recipe_of(tmp_path, "third", importance=str(other)))


def test_a_failed_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path)

    def fail(*_: object) -> None:
        raise ModelError("stopped after the measurement")

    monkeypatch.setattr("qlora_cli.jobs.prepare_training.choose_bits", fail)
    with pytest.raises(ModelError, match="after the measurement"):
        train.run(recipe, recipe_path=None, resume=False, observer=Silent())
    assert not Path(recipe.output).exists()


def test_quantize_measures_each_kind_of_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: Any = {"budget": None, "target_kl": None, "out": None, "observer": Silent()}
    kls = {
        scales: quantize.run(recipe_of(tmp_path, scales=scales), **arguments).plain.kl
        for scales in ("absmax", "search", "measured")
    }
    assert kls["measured"] < kls["absmax"]
    assert kls["search"] < kls["absmax"]
    monkeypatch.setattr(measured_base, "measure_inputs", lambda base, _: ones_of(base))
    ones = quantize.run(recipe_of(tmp_path), **arguments).plain.kl
    assert ones == pytest.approx(kls["search"], rel=1e-4), "equal weights are those of search"


def ones_of(base: Any) -> dict[str, torch.Tensor]:
    return {site.path: torch.ones(site.in_features) for site in base.sites}
