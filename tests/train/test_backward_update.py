"""Updates within the backward pass give the bits of updates after it, with fewer gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.data.collate import collate
from qlora_cli.errors import DoesNotFit, MicroBatchTooLarge, NotFinite, RecipeError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.train.adamw import AdamW
from qlora_cli.train.state import State
from qlora_cli.train.step import train_step
from tests.helpers.cli_helpers import qlora
from tests.helpers.families import MODEL_TYPES
from tests.helpers.marks import slow_after_first
from tests.helpers.runs import make_base, make_rows
from tests.helpers.training import FLOAT16, ROWS, make_nonfinite, make_state

ONE_PASS = {"grad_accum": 1, "max_grad_norm": None}
BATCHES = [collate([row]) for row in ROWS[:3]]
FULL: dict[str, Any] = {"base": {"bits": 16}, "adapter": {"method": "full"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "blocks kept": {"train": {"activation_checkpointing": False}},
    "adamw8bit": {"train": {"optimizer": "adamw8bit"}},
    "weight decay": {"train": {"weight_decay": 0.1}},
    "LoRA+": {"adapter": {"lr_ratio": 8.0}},
    "DoRA": {"adapter": {"method": "dora"}},
    "host": {"base": {"residency": "host"}},
    "full": FULL,
    "full in bfloat16": FULL | {"base": {"bits": 16, "compute_dtype": "bfloat16"}},
}


def state_of(folder: Path, family: str, in_backward: bool, **sections: Any) -> State:
    train = {**ONE_PASS, **sections.pop("train", {}), "update_in_backward": in_backward}
    return make_state(folder, family, train=train, **sections)


def norms_of(state: State) -> list[float]:
    """Do three steps and return the norm of the gradients of each."""
    return [train_step(state, [batch], 1e-2).grad_norm for batch in BATCHES]


def tensors_of(state: State) -> dict[str, Tensor]:
    """Return all parameters and optimizer states."""
    found = {name: p.detach() for name, p in state.trainable.items()}
    for name, parameter in state.trainable.items():
        for key, value in state.optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                found[f"{name} {key}"] = value
    return found


def assert_same_steps(folder: Path, family: str, **sections: Any) -> None:
    after, within = (state_of(folder, family, flag, **sections) for flag in (False, True))
    # A norm is a report, and that of bfloat16 gradients has 8 bits.
    rounding = 1e-6 if all(p.dtype == torch.float32 for p in after.trainable.values()) else 2**-7
    assert norms_of(within) == pytest.approx(norms_of(after), rel=rounding)
    found, wanted = tensors_of(within), tensors_of(after)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert all(parameter.grad is None for parameter in within.trainable.values())


@pytest.mark.parametrize("family", slow_after_first(MODEL_TYPES))
def test_it_gives_the_bits_of_an_update_after_the_backward_pass(
    tmp_path: Path, family: str
) -> None:
    assert_same_steps(tmp_path, family)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_same_bits(tmp_path: Path, variant: str) -> None:
    assert_same_steps(tmp_path, "llama", **{k: dict(v) for k, v in VARIANTS[variant].items()})


def test_a_step_has_the_gradients_of_one_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever parameters are updated, only those of one block have gradients."""
    state = state_of(tmp_path, "llama", True)
    names = {parameter: name for name, parameter in state.trainable.items()}
    updated: list[set[str]] = []
    real = AdamW.step

    def step(self: AdamW) -> None:
        groups = self.param_groups
        with_grad = [p for group in groups for p in group["params"] if p.grad is not None]
        updated.append({names[p].split("layers.")[1].split(".")[0] for p in with_grad})
        assert len(with_grad) == len(names) // state.loaded.config.num_hidden_layers
        real(self)

    monkeypatch.setattr(AdamW, "step", step)
    train_step(state, BATCHES[:1], 1e-3)
    assert updated == [{str(n)} for n in reversed(range(state.loaded.config.num_hidden_layers))]


def test_parameters_without_gradient_change_nothing(tmp_path: Path) -> None:
    """As those of an unused expert: the others of their block wait for the next block."""
    after, within = (state_of(tmp_path, "llama", flag) for flag in (False, True))
    wanted = norms_of(after)
    names = list(within.trainable)
    for number in range(within.loaded.config.num_hidden_layers):
        within.trainable[f"model.layers.{number}.unused"] = nn.Parameter(torch.zeros(3))
    assert norms_of(within) == pytest.approx(wanted, rel=1e-6)
    for name in names:
        assert torch.equal(within.trainable[name], after.trainable[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(tmp_path: Path, value: float) -> None:
    state = state_of(tmp_path, "llama", True)
    before = {name: p.detach().clone() for name, p in state.trainable.items()}
    make_nonfinite(state, value)
    with pytest.raises(NotFinite, match=r"computed by model\.norm"):
        train_step(state, BATCHES[:1], 1e-3)
    assert all(torch.equal(before[name], p) for name, p in state.trainable.items())


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_step_that_has_updated_something_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass runs out of memory after the first update."""
    state = state_of(tmp_path, "llama", True)
    real, updated = AdamW.apply, list[float]()

    def apply(self: AdamW, factor: float, lr: float) -> None:
        if updated:
            raise OUT_OF_MEMORY
        updated.append(lr)
        real(self, factor, lr)

    monkeypatch.setattr(AdamW, "apply", apply)
    with pytest.raises(DoesNotFit) as caught:
        train_step(state, BATCHES[:1], 1e-3)
    assert not isinstance(caught.value, MicroBatchTooLarge)
    assert updated == [1e-3]


def test_a_step_that_has_updated_nothing_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass runs out of memory."""
    state = state_of(tmp_path, "llama", True)

    def loss(*_: Any) -> Tensor:
        raise OUT_OF_MEMORY

    with monkeypatch.context() as patch:
        patch.setattr(type(state.task), "loss", loss)
        with pytest.raises(MicroBatchTooLarge):
            train_step(state, BATCHES[:1], 1e-3)
    assert math.isfinite(train_step(state, BATCHES[:1], 1e-3).loss)


def test_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.update_in_backward"):
        state_of(tmp_path, "llama", True, **FLOAT16)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.max_grad_norm=null"],
        ["train.grad_accum=1"],
        ["train.grad_accum=1", "train.max_grad_norm=null", "train.micro_batch=auto"],
    ],
)
def test_settings_that_need_all_gradients_are_refused(tmp_path: Path, settings: list[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {name: base}\ndata: {train: rows.jsonl}\n")
    with pytest.raises(RecipeError, match=r"train\.grad_accum=1, .* train\.max_grad_norm=null"):
        load_recipe(file, ["train.update_in_backward=true", *settings])


@pytest.mark.slow
def test_train_measures_what_is_planned_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    base, rows = make_base(tmp_path / "base", "llama"), make_rows(tmp_path / "rows.jsonl")
    words = [f"model.name={base}", f"data.train={rows}", "data.seq_len=32", "adapter.targets=all"]
    words += ["train.update_in_backward=true", "train.grad_accum=1", "train.max_grad_norm=null"]
    words += ["train.schedule=constant", "train.warmup=0"]
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {name: base}\ndata: {train: rows.jsonl}\n")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    outcome = qlora("train", file, *words, "train.steps=6", f"output={whole}", "--json")
    assert outcome.code == 0, outcome.err
    ledger = outcome.json["ledger"]
    assert ledger["measured_peak_bytes"] == pytest.approx(ledger["planned_peak_bytes"], rel=0.01)
    for steps in (3, 6):
        more = ["--resume"] if steps == 6 else []
        outcome = qlora("train", file, *words, f"train.steps={steps}", f"output={parts}", *more)
        assert outcome.code == 0, outcome.err
    adapters = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole, parts)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_parameters_outside_of_the_blocks_are_updated(tmp_path: Path) -> None:
    """Full fine-tuning trains the embedding, the final norm and the head."""
    state = state_of(tmp_path, "llama", True, **{k: dict(v) for k, v in FULL.items()})
    before = {name: p.detach().clone() for name, p in state.trainable.items()}
    train_step(state, BATCHES[:1], 1e-2)
    unchanged = [name for name, p in state.trainable.items() if torch.equal(before[name], p)]
    assert not unchanged
