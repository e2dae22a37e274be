"""Rows as tensors, without padding.

All rows of a micro-batch, packed or not, lie one behind the other in a single sequence. Attention
is told where each begins (`segments`), positions start again with each, and the last token of a
row predicts nothing, so no row sees or trains its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_cli.data.chat import UNTRAINED, Example


@dataclass(frozen=True)
class Batch:
    """A micro-batch of T tokens, on the host.

    input_ids, position_ids: (1, T) int64; positions begin at 0 in each row.
    labels: (T,) int64, the token after each position; -100 where that is not trained, and at each
    row's end. segments: the rows' lengths, which add up to T. num_targets: labels but -100.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    segments: tuple[int, ...]
    num_targets: int


def collate(rows: Sequence[Example]) -> Batch:
    """The rows one behind the other, in order."""
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for row in rows:
        ids += row.ids
        positions += range(len(row.ids))
        labels += row.labels[1:]
        labels.append(UNTRAINED)
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        labels=torch.tensor(labels),
        segments=tuple(len(row.ids) for row in rows),
        num_targets=sum(row.num_targets for row in rows),
    )


def worst_batch(
    seq_len: int, micro_batch: int, vocab_size: int = 1, device: str | torch.device = "cpu"
) -> Batch:
    """The largest micro-batch that a recipe allows: full sequences with every token trained.

    vocab_size: ids stay below it. device: `meta` for a plan.
    """
    positions = torch.arange(seq_len, device=device).repeat(micro_batch)
    ids = positions % vocab_size
    labels = ids.view(micro_batch, seq_len).roll(-1, dims=1)
    labels = torch.nn.functional.pad(labels[:, :-1], (0, 1), value=UNTRAINED).flatten()
    return Batch(
        input_ids=ids[None],
        position_ids=positions[None],
        labels=labels,
        segments=(seq_len,) * micro_batch,
        num_targets=micro_batch * (seq_len - 1),
    )
