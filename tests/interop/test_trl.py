"""The preference losses equal those of TRL's DPOTrainer on the same rows, with equal gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.data.load import ModelLimits, RowLoader
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.tasks.task import MetricSums
from qlora_cli.train.state import State
from tests.helpers.pairs import make_pair_rows, make_pair_state, with_reference
from tests.helpers.peft_helpers import load_into_peft, transformers_model

trl = pytest.importorskip("trl", reason="TRL is not installed (extra `test`)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BETA = 0.25
NUM_PAIRS = 6


def make_job(folder: Path, loss: str) -> tuple[State, list[Example], Path]:
    """Return a state with a trained adapter, the encoded rows, and the file of the rows."""
    preference = {"loss": loss, "beta": BETA}
    state = make_pair_state(folder, base={"bits": 16}, preference=preference)
    rows = make_pair_rows(folder / "pairs.jsonl", NUM_PAIRS, length=14)
    tokenizer = load_tokenizer(state.recipe.model.name)
    data = state.recipe.data.model_copy(update={"train": str(rows), "seq_len": 64})
    loader = RowLoader(data, tokenizer, ModelLimits(), state.task.encode)
    return state, list(loader.train().examples), rows


def make_trainer(folder: Path, state: State, rows: Path, loss: str) -> Any:
    """Return TRL's trainer of a new adapter, which then gets the values of the state's adapter.

    TRL's reference model is the model without a new adapter.
    """
    from datasets import Dataset

    base = Path(state.recipe.model.name)
    save_adapter(state.loaded, state.recipe, folder / "adapter")
    config = load_into_peft(base, folder / "adapter").peft_config["default"]
    config.inference_mode = False
    arguments = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        beta=BETA,
        loss_type=loss,
        per_device_train_batch_size=NUM_PAIRS,
        activation_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        transformers_model(base),
        args=arguments,
        train_dataset=Dataset.from_list([json.loads(row) for row in rows.read_text().splitlines()]),
        processing_class=load_tokenizer(str(base)),
        peft_config=config,
    )
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    parameters = {
        name.replace(".default", ""): parameter
        for name, parameter in trainer.model.named_parameters()
        if ".lora_" in name
    }
    assert parameters.keys() == stored.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
    return trainer


def gradients_of_trl(trainer: Any) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Return the loss on all rows in one batch, the gradients by name in the file, the metrics."""
    trainer.model.train()
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(NUM_PAIRS)])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in trainer.model.named_parameters()
        if ".lora_" in name
    }
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics


def gradients_of_ours(state: State, pairs: list[Example]) -> tuple[float, dict[str, Tensor], Any]:
    """Return the same as `gradients_of_trl`."""
    metrics = MetricSums()
    loss = state.task.loss(
        state.loaded, state.task.collate(pairs), state.device, 1 / len(pairs), metrics
    )
    loss.backward()
    found = {}
    for name, parameter in state.trainable.items():
        path, letter, _ = name.rsplit(".", 2)
        found[f"base_model.model.{path}.{letter[:-1]}{letter[-1].upper()}.weight"] = parameter.grad
    assert all(gradient is not None for gradient in found.values())
    return loss.item(), found, {name: v.item() / len(pairs) for name, v in metrics.sums.items()}


@pytest.mark.parametrize(("loss", "name"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_loss_and_gradients_equal_those_of_trl(tmp_path: Path, loss: str, name: str) -> None:
    state, pairs, rows = make_job(tmp_path, loss)
    trainer = make_trainer(tmp_path, state, rows, name)
    for index, pair in enumerate(pairs):
        row = trainer.train_dataset[index]
        chosen, rejected = pair.split()
        assert chosen.ids == row["prompt_ids"] + row["chosen_ids"]
        assert rejected.ids == row["prompt_ids"] + row["rejected_ids"]
    wanted, wanted_gradients, wanted_metrics = gradients_of_trl(trainer)
    found, gradients, metrics = gradients_of_ours(state, with_reference(state, pairs))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted_gradients.values())
    for key, gradient in wanted_gradients.items():
        assert float((gradients[key] - gradient).abs().max()) < 1e-5 * largest, key
    if loss == "dpo":  # TRL's rewards of IPO are those of DPO.
        assert metrics["margin"] == pytest.approx(wanted_metrics["rewards/margins"], abs=1e-5)
        assert metrics["accuracy"] == pytest.approx(wanted_metrics["rewards/accuracies"])
        assert metrics["reward_chosen"] == pytest.approx(wanted_metrics["rewards/chosen"], abs=1e-5)
