"""A training step with replaced norms and MLPs equals transformers', and saves less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.data.collate import largest_batch
from qlora_cli.memory.counter import Counter
from qlora_cli.memory.tracker import KernelRules, StorageTracker
from qlora_cli.models import convert
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.mlp import Mlp
from qlora_cli.nn.norm import RmsNorm
from qlora_cli.tasks.backbone import hidden_states
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import CPU, build_base, make_base, make_recipe, make_rows, randomize_b


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_rows(folder / "rows.jsonl")
    for family in MODEL_TYPES:
        make_base(folder / family, family, spread=0.1)
    return folder


def make(bases: Path, family: str, **sections: Any) -> LoadedModel:
    loaded = build_base(make_recipe(bases / family, bases / "rows.jsonl", **sections))
    randomize_b(loaded)
    loaded.model.train()
    return loaded


def with_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("replace_norms", "replace_mlps"):
        monkeypatch.setattr(convert, name, lambda *_: None)


def step_of(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return the loss and every gradient of one batch."""
    torch.manual_seed(5)
    loss = CAUSAL.loss(loaded, largest_batch(24, 2, 250), CPU, 1 / 46)
    loss.backward()
    found = {name: p.grad for name, p in loaded.trainable().items() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize(
    ("dropout", "checkpointing", "bits"), [(0.0, True, 4), (0.3, True, 8), (0.3, False, 16)]
)
def test_a_step_equals_that_of_transformers_modules(
    bases: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dropout: float,
    checkpointing: bool,
    bits: int,
) -> None:
    sections = {
        "base": {"bits": bits},
        "adapter": {"dropout": dropout},
        "train": {"activation_checkpointing": checkpointing},
    }
    ours = make(bases, family, **sections)
    found = step_of(ours)
    with_transformers_own(monkeypatch)
    theirs = make(bases, family, **sections)
    assert any(isinstance(module, Mlp) for module in ours.model.modules())
    assert not any(isinstance(module, Mlp | RmsNorm) for module in theirs.model.modules())
    wanted = step_of(theirs)
    assert found.keys() == wanted.keys() == {"loss", *ours.trainable()}
    for name, own in found.items():
        # 8 bit amplifies some differences of 1e-7 to a step of 1/127.
        scale = 1e-5 if bits == 4 or bits == 16 else 1e-2
        atol = scale * wanted[name].abs().max().item()
        torch.testing.assert_close(own, wanted[name], rtol=scale, atol=atol)


def test_full_fine_tuning_trains_transformers_own_modules(bases: Path) -> None:
    """The baseline of comparisons uses no module of this package."""
    loaded = make(bases, "llama", adapter={"method": "full"}, base={"bits": 16})
    assert not any(isinstance(module, Mlp | RmsNorm) for module in loaded.model.modules())


def test_every_norm_is_replaced(bases: Path) -> None:
    """A norm that a family forgets would save its float32 copies without any error."""
    for family in MODEL_TYPES:
        left = [
            m for m in make(bases, family).model.modules() if type(m).__name__.endswith("RMSNorm")
        ]
        assert not left, family


def test_an_mlp_with_an_unknown_activation_is_not_replaced(tmp_path: Path, bases: Path) -> None:
    base = make_base(tmp_path / "relu", "llama", hidden_act="relu")
    loaded = build_base(make_recipe(base, bases / "rows.jsonl"))
    assert not any(isinstance(module, Mlp) for module in loaded.model.modules())
    assert "loss" in step_of(loaded)


def saved_bytes(loaded: LoadedModel) -> int:
    """Return the bytes that live after a forward pass and did not before: what it saves."""
    batch, counter = largest_batch(48, 1, 250), Counter()
    with StorageTracker(counter, KernelRules()) as tracker:
        tracker.tag([*loaded.model.parameters(), *loaded.model.buffers()], "base")
        before = counter.live_bytes
        kept = hidden_states(loaded, batch, CPU)
    saved = counter.live_bytes - before
    del kept
    return saved


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_third_less_is_saved_for_backward(
    bases: Path, monkeypatch: pytest.MonkeyPatch, family: str, dropout: float
) -> None:
    sections = {
        "base": {"compute_dtype": "bfloat16"},
        "adapter": {"dropout": dropout},
        "train": {"activation_checkpointing": False},
    }
    ours = saved_bytes(make(bases, family, **sections))
    with_transformers_own(monkeypatch)
    theirs = saved_bytes(make(bases, family, **sections))
    assert ours <= 0.7 * theirs


def test_dropout_saves_nothing_for_backward(bases: Path) -> None:
    sections = {"train": {"activation_checkpointing": False}}
    without, dropped = (
        saved_bytes(make(bases, "llama", adapter={"dropout": dropout}, **sections))
        for dropout in (0.0, 0.1)
    )
    assert without == dropped
