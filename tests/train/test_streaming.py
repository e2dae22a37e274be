"""Blocks whose weights are in host memory: equal bits, two buffers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from qlora_cli.data.collate import collate
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.files.locate import read_config
from qlora_cli.memory.device import profile_of
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.placement.block_stream import BlockStream
from qlora_cli.models.switch import AdapterSwitch
from qlora_cli.nn import host_head
from qlora_cli.nn.embedding import HostEmbedding
from qlora_cli.nn.host_head import HostHead
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.plan.meta_source import MetaSource
from qlora_cli.train.state import State
from qlora_cli.train.step import train_step
from tests.helpers.classifiers import (
    TASK,
    classification_recipe,
    make_classified_base,
    make_labelled_rows,
)
from tests.helpers.families import MODEL_TYPES
from tests.helpers.marks import slow_after_first
from tests.helpers.runs import make_base
from tests.helpers.training import ROWS, make_state

NUM_BLOCKS = 5
DEPTH = {"gpt2": "n_layer"}


def state_of(folder: Path, family: str, residency: str, number: int, **base: Any) -> State:
    """Return the state of a model of 5 blocks, of which the first `number` are recomputed."""
    if not (folder / family).exists():
        depth = {DEPTH.get(family, "num_hidden_layers"): NUM_BLOCKS}
        make_base(folder / family, family, spread=0.15, **depth)
    train = {"activation_checkpointing": number}
    return make_state(folder, family, base={"residency": residency, **base}, train=train)


def results(state: State) -> dict[str, Tensor]:
    """Return losses, gradient norms and parameters of two steps, and the loss of an evaluation."""
    torch.manual_seed(5)
    found = {}
    for step in range(2):
        outcome = train_step(state, [collate(ROWS[:2]), collate(ROWS[2:4])], 1e-2)
        found[f"step {step}"] = torch.tensor([outcome.loss, outcome.grad_norm])
    scores = state.task.evaluate(
        state.loaded, [collate(ROWS[:1]), collate(ROWS[1:3])], state.device
    )
    found["evaluation"] = torch.tensor([scores.loss])
    return found | {name: value.detach().clone() for name, value in state.trainable.items()}


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name in found if not torch.equal(found[name], wanted[name])]


@pytest.mark.parametrize("family", slow_after_first(MODEL_TYPES))
def test_streaming_gives_equal_bits(tmp_path: Path, family: str) -> None:
    wanted = results(state_of(tmp_path, family, "device", NUM_BLOCKS))
    for number in (1, 2, 4, NUM_BLOCKS):
        state = state_of(tmp_path, family, "host", number)
        assert state.loaded.stream is not None
        assert state.loaded.stream.num_blocks == number
        assert differences(results(state), wanted) == [], number


@pytest.mark.slow
@pytest.mark.parametrize(
    "base", [{"bits": 8}, {"bits": 16}, {"overrides": {"down": 8, "*.1.*": 16}}], ids=str
)
def test_streaming_gives_equal_bits_in_every_format(tmp_path: Path, base: dict[str, Any]) -> None:
    wanted = results(state_of(tmp_path, "llama", "device", 3, **base))
    assert differences(results(state_of(tmp_path, "llama", "host", 3, **base)), wanted) == []


def test_two_blocks_have_their_weights(tmp_path: Path) -> None:
    state = state_of(tmp_path, "llama", "host", 4)
    blocks: Any = state.loaded.model.get_submodule(state.loaded.family.blocks)
    present: list[tuple[int, ...]] = []

    def look(*_: Any) -> None:
        sizes = [
            sum(m.weight.numel() for m in block.modules() if isinstance(m, QuantLinear))
            for block in blocks
        ]
        present.append(tuple(index for index, size in enumerate(sizes) if size))

    for block in blocks:
        block.mlp.up_proj.register_forward_hook(look)
    train_step(state, [collate(ROWS[:1])], 1e-3)
    forward = [(0, 1, 4), (1, 2, 4), (2, 3, 4), (2, 3, 4), (2, 3, 4)]
    assert present == [*forward, (2, 3, 4), (1, 2, 4), (0, 1, 4), (0, 1, 4)]


def test_a_buffer_that_is_used_too_early_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one buffer, the copy of the next block overwrites the weights of the one that runs."""
    wanted = results(state_of(tmp_path, "llama", "host", NUM_BLOCKS))
    state = state_of(tmp_path, "llama", "host", NUM_BLOCKS)
    stream = state.loaded.stream
    assert stream is not None
    monkeypatch.setattr(stream, "_buffers", stream._buffers[:1])
    assert differences(results(state), wanted)


def test_weights_that_are_dropped_too_early_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(tmp_path, "llama", "host", NUM_BLOCKS)
    acquire = BlockStream.acquire

    def acquire_and_drop(self: BlockStream, block: int) -> None:
        acquire(self, block)
        self._drop(block)

    monkeypatch.setattr(BlockStream, "acquire", acquire_and_drop)
    assert state.loaded.stream is not None
    state.loaded.recomputation.before_block = state.loaded.stream.acquire
    with pytest.raises(RuntimeError, match="the weight of this linear is not on the device"):
        train_step(state, [collate(ROWS[:1])], 1e-3)


def test_another_adapter_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"supports adapter\.method: lora, and not dora"):
        make_state(tmp_path, base={"residency": "host"}, adapter={"method": "dora"})


def tables_of(state: State) -> tuple[HostEmbedding, HostHead]:
    embedding: Any = state.loaded.model.get_submodule(state.loaded.family.token_embedding)
    head: Any = state.loaded.head
    assert (type(embedding), type(head)) == (HostEmbedding, HostHead)
    return embedding, head


@pytest.mark.parametrize("is_tied", [False, True])
def test_embedding_and_head_are_in_host_memory_without_recomputed_blocks(
    tmp_path: Path, is_tied: bool
) -> None:
    """A tied table is there once. Without recomputed blocks all blocks stay on the device."""
    make_base(tmp_path / "llama", "llama", spread=0.15, tied=is_tied, num_hidden_layers=NUM_BLOCKS)
    wanted = results(state_of(tmp_path, "llama", "device", 0))
    state = state_of(tmp_path, "llama", "host", 0)
    embedding, head = tables_of(state)
    assert (embedding.weight is head.weight) == is_tied
    assert state.loaded.stream is None
    assert differences(results(state), wanted) == []


@pytest.mark.parametrize("family", slow_after_first(MODEL_TYPES))
def test_a_head_in_pieces_gives_equal_results(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are added in another order, so results differ by rounding in float32."""
    wanted = results(state_of(tmp_path, family, "device", 2))
    monkeypatch.setattr(host_head, "PIECE_BYTES", 4096)
    state = state_of(tmp_path, family, "host", 2)
    assert tables_of(state)[1].num_pieces > 2
    for name, own in results(state).items():
        difference, largest = (own - wanted[name]).abs().max(), wanted[name].abs().max()
        # Adam divides by the size of a gradient, so rounding of a small one is as large as any.
        limit = 1e-6 if name.startswith(("step", "eval")) else 1e-3
        assert difference <= limit * largest, name


def test_the_head_of_a_classifier_stays_on_the_device(tmp_path: Path) -> None:
    """It is trained, and small."""
    base = make_classified_base(tmp_path / "base", "llama")
    recipe = classification_recipe(
        base, make_labelled_rows(tmp_path / "rows.jsonl"), base={"residency": "host"}
    )
    meta, config = torch.device("meta"), read_config(base / "config.json")
    loaded = build(
        ModelRequest(
            recipe,
            config,
            lambda model, family: MetaSource(model, family, torch.float16),
            meta,
            profile_of(torch.device("cpu")),
            model_class=TASK.model_class,
        )
    )
    assert not isinstance(loaded.head, HostHead)
    table = loaded.model.get_submodule(loaded.family.token_embedding)
    assert isinstance(table, HostEmbedding)
    assert all(p.requires_grad for p in loaded.head.parameters())


def test_blocks_that_share_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(tmp_path, "llama", "device", NUM_BLOCKS)
    monkeypatch.setattr("qlora_cli.models.build.num_blocks", lambda _: 2 * NUM_BLOCKS)
    with pytest.raises(ModelError, match="share weights"):
        state_of(tmp_path, "llama", "host", NUM_BLOCKS)
    assert state.loaded.stream is None


def test_an_adapter_is_not_added_to_weights_in_host_memory(tmp_path: Path) -> None:
    loaded = state_of(tmp_path, "llama", "host", 2, bits=16).loaded
    source = open_source(tmp_path / "llama", loaded.family)
    with pytest.raises(UsageError, match="weights in host memory"):
        AdapterSwitch(loaded, source, merged=True)
