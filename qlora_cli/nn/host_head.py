"""A frozen head whose weight is in host memory or on disk, and is copied to the device in pieces.

A piece is a range of the vocabulary. The device has two buffers: while one piece computes, the next
one is copied to the other buffer. A piece is valid until the next one is taken. The buffers exist
only while a loss or the logits are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.files.disk_tensor import DiskTensor
from qlora_cli.memory.scopes import attribute, host_memory, represents, scope, unallocated
from qlora_cli.nn.quant import QuantLinear

PIECE_BYTES = 32 * 2**20
"""Largest size of a piece. A smaller one would be copied faster than its kernels are started."""
_DRY_PIECES = 3
"""Number of pieces that a dry run runs."""
_ROW_UNIT = 128
"""The number of rows of a piece is a multiple of this, if it is larger."""


class HostHead(nn.Module):
    """y = x W^T + b with W (V, d) frozen, in 16-bit storage in host memory. y is on `device`.

    The weight is not a parameter, for the reasons of `HostEmbedding`. A tied embedding has the same
    tensor. It is in pinned memory if the device is a GPU. If it is on disk, `disk` is its place,
    and `weight` is on meta.
    """

    weight: Tensor
    disk: DiskTensor | None = None
    is_on_disk = False
    """Whether the weight is on disk; in a dry run `disk` is None then, too."""

    def __init__(self, head: QuantLinear, device: torch.device) -> None:
        super().__init__()
        self.storage = head.weight_format.storage
        self.compute = head.weight_format.compute
        self.out_features = head.out_features
        self.in_features = head.in_features
        self.weight = torch.empty(
            head.out_features, head.in_features, dtype=self.storage, device="meta"
        )
        self.bias = head.bias
        self.device = device

    def put(self, weight: Tensor) -> None:
        """Store a weight (V, d) that is in host memory."""
        weight = weight.to(self.storage)
        if self.device.type == "cuda" and not weight.is_pinned():
            weight = torch.empty_like(weight, pin_memory=True).copy_(weight)
        self.weight = weight
        attribute([self.weight], "head")

    @property
    def num_bytes(self) -> int:
        """Return the size of the weight, which each pass over the pieces copies."""
        return self.out_features * self._row_bytes

    @property
    def num_pieces(self) -> int:
        """Return the number of pieces."""
        return -(-self.out_features // self.piece_rows)

    @property
    def piece_rows(self) -> int:
        """Return the number of rows of a piece; the last one may have fewer."""
        rows = max(1, PIECE_BYTES // self._row_bytes)
        return min(self.out_features, rows - rows % _ROW_UNIT or rows)

    @property
    def _row_bytes(self) -> int:
        return self.in_features * self.storage.itemsize

    def whole(self) -> Tensor:
        """Return a copy of the weight (V, d) on the device, in its storage dtype."""
        with scope("head"):
            copy = torch.empty(self.weight.shape, dtype=self.storage, device=self.device)
        self._fill(copy, slice(0, self.out_features))
        return copy

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, the weight (v, d) of these rows on the device, in the compute dtype).

        A dry run gets the first piece, the last one, and one that represents those between them.
        """
        step, indices = self.piece_rows, list(range(self.num_pieces))
        if self.device.type == "meta" and len(indices) > _DRY_PIECES:
            indices = [0, 1, indices[-1]]
        with scope("head"):
            buffers = [
                torch.empty(step, self.in_features, dtype=self.storage, device=self.device)
                for _ in range(min(2, len(indices)))
            ]
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        try:
            arrival = self._copy(0, buffers[0], copies)
            for number, index in enumerate(indices):
                rows, current = self._rows(index), arrival
                if number + 1 < len(indices):
                    arrival = self._copy(indices[number + 1], buffers[(number + 1) % 2], copies)
                if current is not None:
                    torch.cuda.current_stream(self.device).wait_event(current)
                piece = buffers[number % 2][: rows.stop - rows.start]
                is_middle = 0 < number < len(indices) - 1
                with represents((self.num_pieces - 2) / (len(indices) - 2) if is_middle else 1):
                    with scope("temporary"):
                        converted = [piece.to(self.compute)]
                    yield rows, converted.pop()
        finally:
            if copies is not None:  # The memory of the buffers may be used again after this.
                torch.cuda.current_stream(self.device).wait_stream(copies)

    def _rows(self, index: int) -> slice:
        start = index * self.piece_rows
        return slice(start, min(start + self.piece_rows, self.out_features))

    def _copy(self, index: int, buffer: Tensor, copies: Any) -> Any:
        """Copy a piece to a buffer. Return the end of the copy on a GPU, else None."""
        rows = self._rows(index)
        target = buffer[: rows.stop - rows.start]
        if copies is None:
            self._fill(target, rows)
            return None
        # The buffer was used by operations that are queued on the current stream.
        copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(copies):
            self._fill(target, rows)
        return copies.record_event()

    def _fill(self, target: Tensor, rows: slice) -> None:
        with unallocated():  # The link between the memories copies, and not the device's kernels.
            if self.disk is None:
                target.copy_(self.weight[rows], non_blocking=True)
            elif target.device.type == "cpu":
                self.disk.read_into(target, rows.start)
            else:
                # torch frees pinned memory only after the copy from it.
                pinned = torch.empty(target.shape, dtype=target.dtype, pin_memory=True)
                self.disk.read_into(pinned, rows.start)
                target.copy_(pinned, non_blocking=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., d) to the head's output (..., V), without gradients.

        Training computes its loss from the pieces and not from this output. Raises RuntimeError if
        x needs a gradient.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a head in host memory computes no gradients in its forward method")
        flat = x.reshape(-1, self.in_features)
        output = flat.new_empty(flat.shape[0], self.out_features)
        with torch.no_grad():
            for rows, piece in self.pieces():
                torch.mm(flat, piece.t(), out=output[:, rows])
                del piece
            if self.bias is not None:
                output += self.bias
        return output.view(*x.shape[:-1], self.out_features)


def share_weight(head: HostHead, table: Any) -> None:
    """Make the weight of a `HostEmbedding` also that of a tied head."""
    head.disk, head.is_on_disk = table.disk, table.is_on_disk
    if head.is_on_disk:
        head.weight = table.weight
        return
    with host_memory():
        head.put(table.weight)
    table.weight = head.weight
    attribute([table.weight], "embeddings")
