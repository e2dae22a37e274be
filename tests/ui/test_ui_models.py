"""`qlora models` states whether a model type can be trained, and what is special about it."""

from __future__ import annotations

from rich.console import Console

from qlora_cli.jobs.model_results import MeasuredLaw, ModelsResult, ModelType
from qlora_cli.ui import models as ui


def rendered(result: ModelsResult) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(ui.models(result))
    return capture.get()


def law(value: float) -> MeasuredLaw:
    return MeasuredLaw("the logits are equal", value, 1e-5, False, value <= 1e-5, None)


def test_a_type_that_holds_is_said_to_be_trainable_with_its_roles_and_notes() -> None:
    types = (ModelType("bloom", "proved", "8 laws"),)
    text = rendered(ModelsResult(types, ("q", "v"), (law(1e-6),), ("one row at a time",)))
    assert "It can be trained. Roles for adapter.targets: q, v" in text
    assert "note: one row at a time" in text


def test_a_type_that_fails_is_said_not_to_be_trainable_and_lists_no_roles() -> None:
    types = (ModelType("bloom", "refused", "logits: 0.1"),)
    text = rendered(ModelsResult(types, ("q", "v"), (law(0.1),)))
    assert "It cannot be trained with this version" in text
    assert "Roles" not in text
