"""A token table on the host gives what one on the card gives, and the card does not hold it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_cli.data.collate import Batch, largest_batch
from qlora_cli.models import convert
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.embedding import FrozenEmbedding, HostEmbedding
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.runs import build_base, make_base, make_recipe, make_rows, randomize_b

pytestmark = pytest.mark.gpu
BATCH = largest_batch(48, 2, 250)
"""Rows within one tile of attention, so that backward is the same bits each time."""


def recipe_of(folder: Path, family: str, compute: str) -> Recipe:
    base = make_base(folder / family, family, spread=0.1)
    rows = make_rows(folder / "rows.jsonl")
    return make_recipe(base, rows, base={"compute_dtype": compute})


def table_of(loaded: LoadedModel) -> FrozenEmbedding | HostEmbedding:
    table = loaded.model.get_submodule(loaded.family.token_embedding)
    assert isinstance(table, FrozenEmbedding | HostEmbedding)
    return table


def both(
    recipe: Recipe, card: torch.device, monkeypatch: pytest.MonkeyPatch
) -> tuple[LoadedModel, LoadedModel]:
    """(table on the host, as the job builds it; table on the card)."""
    on_host = build_base(recipe, card)
    with monkeypatch.context() as patch:
        patch.setattr(convert, "move_embedding_to_host", lambda *_: None)
        on_card = build_base(recipe, card)
    for loaded in (on_host, on_card):
        loaded.model.train()
    return on_host, on_card


def loss_and_gradients(loaded: LoadedModel, batch: Batch, card: torch.device) -> list[Tensor]:
    loss = CAUSAL.loss(loaded, batch, card, 1.0)
    loss.backward()
    return [loss.detach(), *(p.grad for p in loaded.trainable().values() if p.grad is not None)]


def test_where_the_table_lies(
    counting_card: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host, on_card = both(recipe_of(tmp_path, "llama", "bfloat16"), counting_card, monkeypatch)
    assert table_of(on_host).weight.device.type == "cpu"
    assert table_of(on_card).weight.device == counting_card
    rows = table_of(on_host)(BATCH.input_ids)
    assert rows.device == counting_card
    assert rows.dtype == torch.bfloat16


def test_the_card_does_not_hold_it(
    counting_card: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, "llama", "bfloat16")
    build_base(recipe, counting_card)  # What is made once a process is there from now on.
    before = torch.cuda.memory_allocated()
    on_host = build_base(recipe, counting_card)
    without = torch.cuda.memory_allocated() - before
    monkeypatch.setattr(convert, "move_embedding_to_host", lambda *_: None)
    on_card = build_base(recipe, counting_card)
    weight_format = torch.cuda.memory_allocated() - before - without
    assert (
        weight_format - without
        >= table_of(on_card).weight.nbytes
        == table_of(on_host).weight.nbytes
    )


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_loss_and_gradients_are_the_same_bits(
    card: torch.device,
    tmp_path: Path,
    family: str,
    compute: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = both(recipe_of(tmp_path, family, compute), card, monkeypatch)
    for loaded in pair:
        randomize_b(loaded)
    own, other = (loss_and_gradients(loaded, BATCH, card) for loaded in pair)
    assert len(own) == len(other) > 1
    assert all(torch.equal(*two) for two in zip(own, other, strict=True))
    assert CAUSAL.evaluate(pair[0], [BATCH], card) == CAUSAL.evaluate(pair[1], [BATCH], card)


def test_rows_of_many_batches_in_a_row_are_not_mixed_up(card: torch.device, tmp_path: Path) -> None:
    """The host gathers the next rows while the card still copies from pinned memory."""
    loaded = build_base(recipe_of(tmp_path, "llama", "bfloat16"), card)
    table = table_of(loaded)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 250, (1, 4096), generator=generator) for _ in range(50)]
    found = [table(one) for one in ids]
    wanted = [table.weight[one].to(torch.bfloat16) for one in ids]
    assert all(torch.equal(a.to("cpu"), b) for a, b in zip(found, wanted, strict=True))
