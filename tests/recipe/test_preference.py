"""The settings of preference training are obeyed or refused, and `auto` has a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.device import DeviceProfile
from qlora_cli.errors import RecipeError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe

CPU = DeviceProfile(kind="cpu", name="a CPU", capacity_bytes=2**34)


def load(folder: Path, *overrides: str) -> Recipe:
    file = folder / "dpo.yaml"
    file.write_text("model: {name: starter}\ntask: preference\ndata: {train: pairs.jsonl}\n")
    return load_recipe(file, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task=causal", "preference.beta=0.2"), "preference.beta: needs task: preference"),
        (("preference.gamma=0.5",), "gamma applies to loss: simpo only, and loss is dpo"),
        (
            ("preference.loss=ipo", "preference.label_smoothing=0.1"),
            "label_smoothing applies to loss: dpo only, and loss is ipo",
        ),
        (
            ("preference.loss=orpo", "preference.reference=base"),
            "reference applies to loss: dpo and ipo only, and loss is orpo",
        ),
        (("preference.reference=start",), "start needs adapter.from"),
        (("preference.beta=0",), "it must be"),
        (("preference.label_smoothing=0.5",), "it must be"),
        (("preference.loss=kto",), "it must be dpo, ipo, simpo or orpo"),
        (("data.long_rows=truncate",), "would change the answers of a pair"),
        (("data.long_rows=split",), "would change the answers of a pair"),
        (("data.format=text",), "remove data.format, which is text"),
    ],
)
def test_settings_without_effect_are_refused(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *overrides)
    assert message in str(caught.value)


def test_settings_with_effect_are_accepted(tmp_path: Path) -> None:
    recipe = load(tmp_path, "preference.label_smoothing=0.1", "data.long_rows=error")
    assert recipe.data.format == "preference"
    start = load(tmp_path, "preference.reference=start", "adapter.from=runs/sft")
    assert start.preference.reference == "start"
    assert load(tmp_path, "preference.loss=simpo", "preference.gamma=0.5").preference.gamma == 0.5


@pytest.mark.parametrize(("loss", "beta"), [("dpo", 0.1), ("ipo", 0.1), ("simpo", 2.0)])
def test_beta_is_chosen_for_the_loss(tmp_path: Path, loss: str, beta: float) -> None:
    recipe = load(tmp_path, f"preference.loss={loss}")
    resolved, choices = resolve(recipe, CPU)
    assert resolved.preference.beta == beta
    (choice,) = (choice for choice in choices if choice.key == "preference.beta")
    assert choice.value == beta
    assert choice.reason
    given, choices = resolve(load(tmp_path, "preference.beta=0.7"), CPU)
    assert given.preference.beta == 0.7
    assert all(choice.key != "preference.beta" for choice in choices)


def test_other_tasks_choose_no_beta(tmp_path: Path) -> None:
    _, choices = resolve(load(tmp_path, "task=causal"), CPU)
    assert all(not choice.key.startswith("preference.") for choice in choices)
