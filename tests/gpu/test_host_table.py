"""A token embedding in host memory gives the same results as on the GPU, and uses no GPU memory."""

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
"""Rows that fit one attention tile, so that the backward pass is deterministic."""


def recipe_of(folder: Path, family: str, compute: str) -> Recipe:
    base = make_base(folder / family, family, spread=0.1)
    rows = make_rows(folder / "rows.jsonl")
    return make_recipe(base, rows, base={"compute_dtype": compute})


def table_of(loaded: LoadedModel) -> FrozenEmbedding | HostEmbedding:
    table = loaded.model.get_submodule(loaded.family.token_embedding)
    assert isinstance(table, FrozenEmbedding | HostEmbedding)
    return table


def both(
    recipe: Recipe, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> tuple[LoadedModel, LoadedModel]:
    """Return the model with its embedding in host memory, as a job builds it, and on the GPU."""
    on_host = build_base(recipe, gpu)
    with monkeypatch.context() as patch:
        patch.setattr(convert, "move_embedding_to_host", lambda *_: None)
        on_gpu = build_base(recipe, gpu)
    for loaded in (on_host, on_gpu):
        loaded.model.train()
    return on_host, on_gpu


def loss_and_gradients(loaded: LoadedModel, batch: Batch, gpu: torch.device) -> list[Tensor]:
    loss = CAUSAL.loss(loaded, batch, gpu, 1.0)
    loss.backward()
    return [loss.detach(), *(p.grad for p in loaded.trainable().values() if p.grad is not None)]


def test_the_device_of_the_embedding(
    counting_gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host, on_gpu = both(recipe_of(tmp_path, "llama", "bfloat16"), counting_gpu, monkeypatch)
    assert table_of(on_host).weight.device.type == "cpu"
    assert table_of(on_gpu).weight.device == counting_gpu
    rows = table_of(on_host)(BATCH.input_ids)
    assert rows.device == counting_gpu
    assert rows.dtype == torch.bfloat16


def test_an_embedding_in_host_memory_uses_no_gpu_memory(
    counting_gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, "llama", "bfloat16")
    build_base(recipe, counting_gpu)  # Allocates what is created once per process.
    before = torch.cuda.memory_allocated()
    on_host = build_base(recipe, counting_gpu)
    without = torch.cuda.memory_allocated() - before
    monkeypatch.setattr(convert, "move_embedding_to_host", lambda *_: None)
    on_gpu = build_base(recipe, counting_gpu)
    weight_format = torch.cuda.memory_allocated() - before - without
    assert (
        weight_format - without >= table_of(on_gpu).weight.nbytes == table_of(on_host).weight.nbytes
    )


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_loss_and_gradients_are_equal_bit_for_bit(
    gpu: torch.device,
    tmp_path: Path,
    family: str,
    compute: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = both(recipe_of(tmp_path, family, compute), gpu, monkeypatch)
    for loaded in pair:
        randomize_b(loaded)
    own, other = (loss_and_gradients(loaded, BATCH, gpu) for loaded in pair)
    assert len(own) == len(other) > 1
    assert all(torch.equal(*two) for two in zip(own, other, strict=True))
    assert CAUSAL.evaluate(pair[0], [BATCH], gpu) == CAUSAL.evaluate(pair[1], [BATCH], gpu)


def test_consecutive_batches_are_not_mixed_up(gpu: torch.device, tmp_path: Path) -> None:
    """The CPU gathers the next rows while the GPU still copies from pinned memory."""
    loaded = build_base(recipe_of(tmp_path, "llama", "bfloat16"), gpu)
    table = table_of(loaded)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 250, (1, 4096), generator=generator) for _ in range(50)]
    found = [table(batch) for batch in ids]
    expected = [table.weight[batch].to(torch.bfloat16) for batch in ids]
    assert all(torch.equal(a.to("cpu"), b) for a, b in zip(found, expected, strict=True))
