"""A dry run computes a few chunks and experts, and plans the memory and the work of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qlora_cli.data.collate import largest_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.nn import expert_stack, loss, plain_attention
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.proof.small_config import small_config
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe

NUM_TOKENS = 400
DEVICES = (
    DeviceProfile("cpu", "a CPU", 2**34),
    DeviceProfile("cuda", "a GPU", 2**34, (8, 9), 128),
)


def plan(
    model_type: str, profile: DeviceProfile, window: int | None = None, **changes: Any
) -> MemoryPlan:
    """Plan a small model. changes: of the section `train`; `full`: of all parameters."""
    config = small_config(AutoConfig.for_model(model_type))
    config.dtype = torch.bfloat16
    if window is not None:
        config.sliding_window = window
    is_full = changes.pop("full", False)
    adapter = {"method": "full"} if is_full else {"rank": 4, "targets": "all"}
    recipe = Recipe.model_validate(
        {
            "model": {"name": "base"},
            "base": {"bits": 16 if is_full else 4},
            "adapter": adapter,
            "data": {"train": "", "seq_len": NUM_TOKENS},
            "train": {"activation_checkpointing": True, **changes},
        }
    )
    batches = [largest_batch(NUM_TOKENS, 1, config.vocab_size)] * 2
    return dry_run(resolve(recipe, profile)[0], config, profile, batches, batches[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "window", "device"),
    [("gemma2", 4, 0), ("gemma2", 200, 1), ("gpt_oss", 4, 1), ("mixtral", None, 0)],
)
def test_the_plan_of_a_few_parts_is_that_of_all(
    model_type: str, window: int | None, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 60 queries a chunk: seven chunks, of which the last has 40 queries.
    monkeypatch.setattr(plain_attention, "CHUNK_ELEMENTS", 60 * 4 * NUM_TOKENS)
    few = plan(model_type, DEVICES[device], window)
    monkeypatch.setattr(plain_attention, "_CHUNKS_ON_META", 1000)
    monkeypatch.setattr(expert_stack, "_EXPERTS_ON_META", 1000)
    every = plan(model_type, DEVICES[device], window)
    assert few.phases == every.phases
    assert few.reserved_bytes == every.reserved_bytes


def test_one_chunk_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk has fewer queries than others, so that this test shows a difference."""
    monkeypatch.setattr(plain_attention, "CHUNK_ELEMENTS", 300 * 4 * NUM_TOKENS)

    def peak() -> Any:
        return plan("gemma2", DEVICES[0]).phases[-1].peak_bytes

    expected = peak()
    monkeypatch.setattr(plain_attention, "_CHUNKS_ON_META", 1)
    assert peak() < expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "chunk", "full", "device"),
    [
        ("llama", 57, False, 0),  # Seven chunks.
        ("llama", 40, True, 1),  # Nine chunks and a smaller one.
        ("gemma2", 33, False, 1),  # Twelve chunks and a smaller one, with capped logits.
        ("gpt2", 7, True, 0),  # 57 chunks, with a tied head.
    ],
)
def test_the_plan_of_a_few_chunks_of_the_loss_is_that_of_all(
    model_type: str, chunk: int, full: bool, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = plan(model_type, DEVICES[device], loss_chunk=chunk, full=full)
    monkeypatch.setattr(loss, "_CHUNKS_ON_META", 1000)
    every = plan(model_type, DEVICES[device], loss_chunk=chunk, full=full)
    assert few.phases == every.phases
    assert few.reserved_bytes == every.reserved_bytes
    assert few.flops == every.flops
    assert few.loss == every.loss


def test_no_complete_chunk_of_the_loss_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope of capped logits lives while the next chunk's logits are computed."""
    expected = plan("gemma2", DEVICES[1], loss_chunk=33)
    monkeypatch.setattr(loss, "_CHUNKS_ON_META", 0)
    assert plan("gemma2", DEVICES[1], loss_chunk=33).loss != expected.loss
