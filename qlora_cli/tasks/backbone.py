"""The forward pass through a model without its head, shared by all tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_cli.data.collate import Batch
from qlora_cli.memory.scopes import scope
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.attention import Spans
from qlora_cli.nn.embedding import HostEmbedding


def hidden_states(loaded: LoadedModel, batch: Batch, device: torch.device) -> Tensor:
    """Return the last hidden state at every position of `batch`, of shape (tokens, d), on `device`.

    batch: on the CPU. The rows of the batch do not attend to each other.
    """
    backbone = loaded.model.get_submodule(loaded.family.backbone)
    table = loaded.model.get_submodule(loaded.family.token_embedding)
    ids_device = torch.device("cpu") if isinstance(table, HostEmbedding) else device
    with scope("activations"):
        spans = Spans.on(batch.segments, device, loaded.kernel)
        output = backbone(
            input_ids=batch.input_ids.to(ids_device, non_blocking=True),
            position_ids=batch.position_ids.to(device, non_blocking=True),
            use_cache=False,
            spans=spans,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden.squeeze(0)
