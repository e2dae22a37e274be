"""The forward pass up to the head, the head and the targets, shared by all tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qlora_cli.data.collate import Batch
from qlora_cli.memory.scopes import scope
from qlora_cli.models.head import head_input
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.probe import constant_arguments
from qlora_cli.nn.embedding import HostEmbedding
from qlora_cli.nn.full_mask import full_mask
from qlora_cli.nn.host_head import HostHead
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.nn.logits import LogitTransform
from qlora_cli.nn.spans import Spans, use_spans


def hidden_states(loaded: LoadedModel, batch: Batch, device: torch.device) -> Tensor:
    """Return the input of the head at every position of `batch`, of shape (tokens, d), on `device`.

    batch: on the CPU. The rows of the batch do not attend to each other. A family that cannot
    separate rows in one sequence computes them one after the other.
    """
    table = loaded.model.get_submodule(loaded.family.token_embedding)
    ids_device = torch.device("cpu") if isinstance(table, HostEmbedding) else device
    with scope("activations"):
        ids = batch.input_ids.to(ids_device, non_blocking=True)
        if not loaded.family.rows.packs:
            if loaded.family.is_classifier:
                return _padded(loaded, ids, batch, device)
            rows = [_row(loaded, row, device) for row in ids.split(batch.segments, dim=1)]
            return head_input_of(loaded, rows[0] if len(rows) == 1 else torch.cat(rows))
        backbone = loaded.model.get_submodule(loaded.family.backbone)
        arguments = _arguments(loaded, ids, device)
        if loaded.family.rows.takes_positions:
            positions = batch.position_ids.to(device, non_blocking=True)
            if loaded.family.rows.first_position:
                positions = positions + loaded.family.rows.first_position
            arguments["position_ids"] = positions
        if loaded.family.classifier.token_types and batch.token_types is not None:
            arguments["token_type_ids"] = batch.token_types.to(device, non_blocking=True)
        with use_spans(Spans.on(batch.segments, device, loaded.kernel)):
            hidden: Tensor = backbone(input_ids=ids, use_cache=False, **arguments)[0]
        return head_input_of(loaded, hidden.squeeze(0))


def _row(loaded: LoadedModel, ids: Tensor, device: torch.device) -> Tensor:
    """Return the last hidden states (tokens, d) of one row. ids: (1, tokens)."""
    backbone = loaded.model.get_submodule(loaded.family.backbone)
    arguments = _arguments(loaded, ids, device)
    spans = Spans.on((ids.shape[1],), device, loaded.kernel)
    with use_spans(spans):
        hidden: Tensor = backbone(input_ids=ids, use_cache=False, **arguments)[0]
    return hidden.squeeze(0)


def _arguments(loaded: LoadedModel, ids: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Return the mask for a model with attention of its own, and the family's arguments.

    ids: (1, tokens).
    """
    arguments = constant_arguments(loaded.family.rows.arguments)
    if not loaded.family.rows.own_attention:
        return arguments
    # Without a mask some models search the positions for packed rows, which reads a value.
    return {**arguments, "attention_mask": full_mask(ids.shape[1], device)}


def head_input_of(loaded: LoadedModel, hidden: Tensor) -> Tensor:
    """Return the input (tokens, d) of the head. hidden: the backbone's output (tokens, d)."""
    family = loaded.family
    if not family.has_head_input:
        return hidden
    return head_input(loaded.model, family.backbone, family.head, hidden)


def _padded(loaded: LoadedModel, ids: Tensor, batch: Batch, device: torch.device) -> Tensor:
    """Return the last hidden states (tokens, d) of rows that are padded to the longest of them.

    ids: (1, tokens), those of the batch, on the device of the token table.
    """
    backbone = loaded.model.get_submodule(loaded.family.backbone)
    lengths = batch.segments
    places = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    arguments = constant_arguments(loaded.family.rows.arguments)
    arguments["attention_mask"] = places.long().to(device, non_blocking=True)
    if loaded.family.classifier.token_types and batch.token_types is not None:
        types = pad_sequence(batch.token_types.squeeze(0).split(lengths), batch_first=True)
        arguments["token_type_ids"] = types.to(device, non_blocking=True)
    padded = pad_sequence(ids.squeeze(0).split(lengths), batch_first=True)
    hidden: Tensor = backbone(input_ids=padded, **arguments)[0]
    kept = places.flatten().nonzero().flatten().to(device, non_blocking=True)
    return hidden.flatten(0, 1)[kept]


def head_of(loaded: LoadedModel) -> tuple[Tensor | HostHead, Tensor | None, LogitTransform]:
    """Return weight (V, d), bias (V,) or None, and transformation of the head.

    A head in host memory is returned in place of its weight.
    """
    head: Any = loaded.head
    weight = head if isinstance(head, HostHead) else head.weight
    return weight, head.bias, loaded.family.logits


def targets_of(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (positions with a target, the targets), both (n,) int64 on `device`.

    They are selected on the CPU, where the labels are, so that the GPU need not be synchronized.
    """
    positions = (batch.labels != IGNORE_INDEX).nonzero().flatten()
    targets = batch.labels[positions]
    return positions.to(device, non_blocking=True), targets.to(device, non_blocking=True)
