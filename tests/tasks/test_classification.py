"""Sequence classifiers compute what transformers' classes compute, and train their heads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.bert.modeling_bert import BertPooler

from qlora_cli.data.encode import Example
from qlora_cli.errors import ModelError
from qlora_cli.models.attach import load_adapter
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.models.trained_head import head_parameters
from qlora_cli.proof import laws
from qlora_cli.proof.prove import LAWS
from qlora_cli.proof.small_model import CPU, SmallModel, small_model
from qlora_cli.recipe.classification import Classification
from qlora_cli.tasks import backbone
from qlora_cli.tasks.classification import ClassificationTask
from tests.helpers.classifiers import DECODERS, ENCODERS, TASK

ROWS = (13, 9, 5)


@pytest.fixture(scope="module", params=[*ENCODERS, *DECODERS])
def small(request: pytest.FixtureRequest) -> Iterator[SmallModel]:
    """A small random classifier of each model type."""
    with small_model(AutoConfig.for_model(request.param), TASK) as found:
        yield found


@pytest.fixture(scope="module")
def bert() -> Iterator[SmallModel]:
    with small_model(AutoConfig.for_model("bert"), TASK) as found:
        yield found


def examples(small: SmallModel, *lengths: int) -> list[Example]:
    """Return rows of the labels 0, 1, 2 in turn."""
    return [replace(row, value=float(i % 3)) for i, row in enumerate(small.rows(*lengths))]


def expected_logits(small: SmallModel, rows: list[Example], **arguments: Any) -> Tensor:
    """Return what transformers' own class computes for each row alone."""
    found = [small.reference(input_ids=torch.tensor([row.ids]), **arguments).logits for row in rows]
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_classifier_obeys_every_law(small: SmallModel, law: Any) -> None:
    value = law.measure(small)
    assert law.holds(value), value


@pytest.mark.slow
def test_peft_reads_the_adapter_and_the_head(small: SmallModel, tmp_path: Path) -> None:
    """Warnings are errors: PEFT only warns about missing and unknown keys."""
    loaded = small.loaded
    with torch.no_grad():
        for parameter in head_parameters(loaded).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(loaded, small.recipe(), tmp_path / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(small.folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    rows = examples(small, *ROWS)
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([r.ids])).logits for r in rows])
        found = TASK.logits(loaded, TASK.collate(rows), CPU)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_law_of_packing_detects_rows_that_leak(
    bert: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert laws.packing(bert) < 1e-5
    monkeypatch.setattr(backbone.Spans, "on", lambda lengths, *_: None)
    assert laws.packing(bert) > 1e-2


def test_the_laws_detect_a_wrong_pooled_token(
    bert: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laws, "pooled_states", lambda _, hidden, lengths: hidden[-len(lengths) :])
    assert laws.logits(bert) > 1e-2


def test_a_pair_has_the_token_types_of_transformers(bert: SmallModel) -> None:
    rows = examples(bert, *ROWS)
    rows = [replace(row, second=4) for row in rows]
    with torch.no_grad(), bert.without_adapter() as loaded:
        found = TASK.logits(loaded, TASK.collate(rows), CPU)
    expected = []
    for row in rows:
        types = torch.tensor([[0] * 4 + [1] * (len(row.ids) - 4)])
        expected.append(expected_logits(bert, [row], token_type_ids=types))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    without = expected_logits(bert, rows)
    assert not torch.allclose(found, without, atol=1e-2)


def test_padded_rows_are_those_of_each_row_alone() -> None:
    """DeBERTa computes attention itself, so rows are padded to the longest."""
    with small_model(AutoConfig.for_model("deberta-v2"), TASK) as small:
        rows = examples(small, *ROWS)
        with torch.no_grad(), small.without_adapter() as loaded:
            assert not loaded.family.rows.packs
            found = TASK.logits(loaded, TASK.collate(rows), CPU)
        torch.testing.assert_close(found, expected_logits(small, rows), rtol=1e-5, atol=1e-5)


def test_the_loss_is_that_of_transformers(bert: SmallModel) -> None:
    rows = examples(bert, *ROWS)
    with bert.without_adapter() as loaded:
        loss = TASK.loss(loaded, TASK.collate(rows), CPU, 1 / len(rows))
    losses = [
        bert.reference(
            input_ids=torch.tensor([row.ids]), labels=torch.tensor([int(row.value or 0)])
        ).loss
        for row in rows
    ]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


def test_class_weights_are_factors_of_the_losses_of_rows() -> None:
    weights = {"a": 2.0, "b": 1.0, "c": 0.25}
    settings = TASK.settings.model_copy(update={"class_weights": weights})
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    values = torch.tensor([0.0, 1.0, 2.0, 0.0])
    plain = TASK.row_losses(logits, values)
    weighted = ClassificationTask(settings).row_losses(logits, values)
    torch.testing.assert_close(weighted, plain * torch.tensor([2.0, 1.0, 0.25, 2.0]))


def test_a_regression_minimizes_the_squared_error() -> None:
    task = ClassificationTask(Classification(kind="regression"))
    logits, values = torch.tensor([[1.5], [-2.0]]), torch.tensor([1.0, 0.5])
    torch.testing.assert_close(task.row_losses(logits, values), torch.tensor([0.25, 6.25]))


def test_an_adapter_of_another_number_of_labels_is_refused(
    bert: SmallModel, tmp_path: Path
) -> None:
    save_adapter(bert.loaded, bert.recipe(), tmp_path / "adapter")
    two = ClassificationTask(Classification(kind="classes", labels=["a", "b"]))
    with (
        small_model(AutoConfig.for_model("bert"), two) as other,
        pytest.raises(ModelError, match="the classification heads differ in classifier"),
    ):
        load_adapter(other.loaded, tmp_path / "adapter")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_pooling_of_modernbert_is_measured(pooling: str) -> None:
    config = AutoConfig.for_model("modernbert", classifier_pooling=pooling)
    with small_model(config, TASK) as small:
        assert small.loaded.family.classifier.pooling == {"cls": "first", "mean": "mean"}[pooling]
        assert laws.packing(small) < 1e-5


def test_a_head_that_pools_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def second_to_last(self: BertPooler, hidden: Tensor) -> Tensor:
        place = -2 if hidden.shape[1] > 1 else 0
        return self.activation(self.dense(hidden[:, place]))

    monkeypatch.setattr(BertPooler, "forward", second_to_last)
    with (
        small_model(AutoConfig.for_model("bert"), TASK) as small,
        pytest.raises(ModelError, match="uses more than one token of a row, or its mean"),
    ):
        small.build()
