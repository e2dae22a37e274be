"""A base that several jobs use one after the other: each model is like one that is built anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_cli.files.locate import read_config
from qlora_cli.memory.device import profile_of
from qlora_cli.models.build import ModelRequest
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.shared_base import SharedBase
from qlora_cli.recipe.schema import Recipe
from tests.helpers.moe import make_moe
from tests.helpers.observers import StageRecorder
from tests.helpers.peft_helpers import IDS
from tests.helpers.runs import CPU, build_base, logits, make_base, make_recipe, make_rows


def request_of(recipe: Recipe, observer: StageRecorder) -> ModelRequest:
    folder = Path(recipe.model.name)
    config = read_config(folder / "config.json")
    return ModelRequest(
        recipe,
        config,
        lambda _, family: open_source(folder, family),
        CPU,
        profile_of(CPU),
        observer,
    )


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", (["q"], "all", ["down", "v"])),
        ("gpt2", (["q", "v"], ["o"])),
        pytest.param("qwen3_moe", (["q"], ["all", "experts"], ["v"]), marks=pytest.mark.slow),
    ],
)
def test_each_model_is_like_one_that_is_built_anew(
    family: str, targets: tuple[list[str] | str, ...], tmp_path: Path
) -> None:
    make = make_moe if family.endswith("moe") else make_base
    base, rows = make(tmp_path / "base", family), make_rows(tmp_path / "rows.jsonl")
    shared, observer = SharedBase(), StageRecorder()
    for number, names in enumerate(targets):
        method = "dora" if family == "llama" and number == 1 else "lora"
        adapter = {"method": method, "targets": names, "rank": 2 + number}
        recipe = make_recipe(base, rows, adapter=adapter, train={"seed": number})
        model, fresh = shared.build(request_of(recipe, observer)), build_base(recipe)
        trained, expected = model.trainable(), fresh.trainable()
        assert trained.keys() == expected.keys()
        with torch.no_grad():
            for name, parameter in trained.items():
                assert torch.equal(parameter, expected[name])
                for changed in (parameter, expected[name]):
                    changed += 0.05
        assert torch.equal(logits(model, IDS), logits(fresh, IDS))
        assert model.adapted == fresh.adapted
    assert [name for name, _ in observer.stages] == ["load"]


def test_a_base_is_shared_with_loftq_and_not_with_pissa(tmp_path: Path) -> None:
    base, rows = make_base(tmp_path / "base", "llama"), make_rows(tmp_path / "rows.jsonl")
    shared, observer = SharedBase(), StageRecorder()
    for init in ("default", "loftq", "pissa", "pissa", "default"):
        recipe = make_recipe(base, rows, adapter={"init": init})
        model, fresh = shared.build(request_of(recipe, observer)), build_base(recipe)
        assert torch.equal(logits(model, IDS), logits(fresh, IDS))
    reason = "the base is loaded again: adapter.init: pissa changes the base"
    assert observer.notes == [reason] * 3


def test_a_base_with_other_settings_or_trained_weights_is_loaded_again(tmp_path: Path) -> None:
    base, rows = make_base(tmp_path / "base", "llama"), make_rows(tmp_path / "rows.jsonl")
    shared, observer = SharedBase(), StageRecorder()
    sections = ({}, {"base": {"bits": 8}}, {"base": {"bits": 8}}, {"base": {"bits": 8}})
    for number, section in enumerate(sections):
        model = shared.build(request_of(make_recipe(base, rows, **section), observer))
        if number == 2:
            model.head.requires_grad_(True)  # As a task with a trained head does.
    assert observer.notes == [
        "the base is loaded again: base.bits is 8",
        "the base is loaded again: the run before has trained its weights",
    ]
