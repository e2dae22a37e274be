"""One batch through the backbone: the road that training, evaluation and the plan share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.data.collate import Batch
from qlora_cli.memory.tracker import scope
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.attention import Spans
from qlora_cli.nn.embedding import HostEmbedding
from qlora_cli.nn.loss import IGNORE_INDEX, chunked_cross_entropy, score


@dataclass(frozen=True)
class Score:
    """Over trained tokens. loss: mean nats; accuracy: share predicted first."""

    loss: float
    accuracy: float
    tokens: int


def hidden_states(loaded: LoadedModel, batch: Batch, device: torch.device) -> Tensor:
    """The last hidden state of every position, (tokens, d)."""
    backbone = loaded.model.get_submodule(loaded.family.backbone)
    table = loaded.model.get_submodule(loaded.family.token_embedding)
    ids_on = torch.device("cpu") if isinstance(table, HostEmbedding) else device
    with scope("activations"):
        spans = Spans.on(batch.segments, device, loaded.kernel)
        output = backbone(
            input_ids=batch.input_ids.to(ids_on, non_blocking=True),
            position_ids=batch.position_ids.to(device, non_blocking=True),
            use_cache=False,
            spans=spans,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden.squeeze(0)


def batch_loss(loaded: LoadedModel, batch: Batch, device: torch.device, scale: float) -> Tensor:
    """scale * sum of the cross entropy over the batch's trained tokens, a float32 scalar."""
    hidden = hidden_states(loaded, batch, device)
    positions, targets = _targets(batch, device)
    return chunked_cross_entropy(hidden, _head(loaded), positions, targets, scale)


@torch.no_grad()
def evaluate(loaded: LoadedModel, batches: Iterable[Batch], device: torch.device) -> Score:
    """Mean loss and accuracy over all batches; leaves the model in the mode it was in."""
    was_training = loaded.model.training
    loaded.model.eval()
    total, right, tokens = 0.0, 0, 0
    for batch in batches:
        losses, hits = _score(loaded, batch, device)
        if device.type != "meta":
            total, right = total + losses.item(), right + int(hits.item())
        tokens += batch.num_targets
    loaded.model.train(was_training)
    return Score(total / max(tokens, 1), right / max(tokens, 1), tokens)


def _score(loaded: LoadedModel, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of one batch, whose hidden states are gone before the next one's are made."""
    hidden = hidden_states(loaded, batch, device)
    return score(hidden, _head(loaded), *_targets(batch, device))


def _targets(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(positions with a target, the targets), found on the host, where the labels are."""
    positions = (batch.labels != IGNORE_INDEX).nonzero().flatten()
    targets = batch.labels[positions]
    return positions.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _head(loaded: LoadedModel) -> Tensor:
    weight = loaded.head.weight
    assert isinstance(weight, Tensor)
    return weight
