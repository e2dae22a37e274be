"""LoRA+ (`adapter.lr_ratio`): the same updates as PEFT's optimizer for LoRA+."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.train.state import State
from tests.helpers.gradients import draw
from tests.helpers.optimizers import gradient
from tests.helpers.peft_helpers import load_into_peft
from tests.helpers.training import make_state

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
RATIO, LR, DECAY = 8.0, 1e-2, 0.1


def pairs_of(state: State, model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return every parameter of the state's adapter with PEFT's parameter for it."""
    theirs = dict(model.named_parameters())
    pairs = []
    for path, layer in adapted_layers(state.loaded.model):
        for letter, factors in (("A", layer.lora_a), ("B", layer.lora_b)):
            (ours,) = factors.values()
            pairs.append((ours, theirs[f"base_model.model.{path}.lora_{letter}.default.weight"]))
    return pairs


@pytest.mark.parametrize("ratio", [RATIO, 1.0])
def test_the_updates_are_those_of_peft(tmp_path: Path, ratio: float) -> None:
    state = make_state(
        tmp_path,
        base={"bits": 16},
        adapter={"lr_ratio": ratio},
        train={"weight_decay": DECAY},
    )
    save_adapter(state.loaded, state.recipe, tmp_path / "adapter")
    model = load_into_peft(tmp_path / "llama", tmp_path / "adapter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )
    pairs = pairs_of(state, model)
    for step in range(3):
        for ours, theirs in pairs:
            ours.grad = gradient(step, ours)
            theirs.grad = ours.grad.clone()
        state.optimizer.apply(1.0, LR)
        optimizer.step()
    differences = [(ours - theirs).detach().abs().max().item() for ours, theirs in pairs]
    if ratio == RATIO:
        assert max(differences) < 1e-6
    else:
        assert min(differences[1::2]) > 0.05, "without the ratio every B differs"
        assert max(differences[0::2]) < 1e-6


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_ratio_multiplies_the_learning_rate_of_b(tmp_path: Path, name: str) -> None:
    changes = {}
    for ratio in (1.0, RATIO):
        state = make_state(
            tmp_path, adapter={"lr_ratio": ratio, "rank": 64}, train={"optimizer": name}
        )
        before = {key: value.clone() for key, value in state.trainable.items()}
        for parameter in state.trainable.values():
            parameter.grad = draw(*parameter.shape)
        state.optimizer.apply(1.0, LR)
        changes[ratio] = {key: value - before[key] for key, value in state.trainable.items()}
    for key, change in changes[1.0].items():
        factor = RATIO if ".lora_b." in key else 1.0
        torch.testing.assert_close(changes[RATIO][key], factor * change, rtol=1e-4, atol=1e-6)
