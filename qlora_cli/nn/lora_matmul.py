"""One product with a packed weight and its adapter: y = x W^T + b + s drop(x) A^T B^T.

Plain arithmetic outside autograd, shared by the functions that differ in what they keep of x:
`nn/lora.py` keeps x itself, `nn/mlp.py` what x is quickly computed from.

Dropout keeps no mask: a seed drawn from the host's generator makes the mask again in backward. Kept
masks and dropped inputs would be up to 4 bytes a value for each adapted linear, of inputs that the
linears otherwise share.

Shapes: x (tokens, in), y (tokens, out), A (rank, in), B (rows, rank), x A^T (tokens, rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_cli.nn.quant import QuantLinear


@dataclass(frozen=True)
class LoraMatmul:
    """Everything about one call but its tensors.

    rows: of the output, for each part of the adapter. seed: of the dropout's mask, None for no
    dropout. `factors` of all methods: A and B of each part in turn.
    """

    base: QuantLinear
    rows: Sequence[slice] = ()
    scaling: float = 1.0
    dropout: float = 0.0
    seed: int | None = None

    def forward(self, x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(y, x A^T of each part, which backward needs)."""
        y = self.base.product(x)
        dropped = self.dropped(x)
        narrow = []
        for rows, a, b in self._parts(factors):
            xa = dropped @ a.to(x.dtype).t()
            y[:, rows].addmm_(xa, b.to(x.dtype).t(), alpha=self.scaling)
            narrow.append(xa)
        return y, narrow

    def grad_narrow(self, grad: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of each part's x A^T."""
        return [
            (grad[:, rows] @ b.to(grad.dtype)).mul_(self.scaling)
            for rows, _, b in self._parts(factors)
        ]

    def grad_factors(
        self,
        x: Tensor,
        grad: Tensor,
        narrow: Sequence[Tensor],
        grad_narrow: Sequence[Tensor],
        factors: Sequence[Tensor],
    ) -> list[Tensor]:
        """The gradients of A and B of each part in turn."""
        grads = []
        dropped = self.dropped(x)
        for (rows, a, b), xa, grad_xa in zip(
            self._parts(factors), narrow, grad_narrow, strict=True
        ):
            grad_b = (grad[:, rows].t() @ xa).mul_(self.scaling)
            grads += [(grad_xa.t() @ dropped).to(a.dtype), grad_b.to(b.dtype)]
        return grads

    def grad_input(
        self, grad: Tensor, grad_narrow: Sequence[Tensor], factors: Sequence[Tensor]
    ) -> Tensor:
        """The gradient of x."""
        grad_x = self.base.grad_input(grad)
        if not self.rows:
            return grad_x
        # Without dropout the adapter's share is added as it is made, and needs no place of its own.
        share = grad_x if self.seed is None else torch.zeros_like(grad_x)
        for (_, a, _), grad_xa in zip(self._parts(factors), grad_narrow, strict=True):
            share.addmm_(grad_xa, a.to(grad.dtype))
        return grad_x if self.seed is None else grad_x.add_(self._drop(share))

    def dropped(self, x: Tensor) -> Tensor:
        """x with the share `dropout` of its values zero and the others raised to the same sum.

        Linear in x and the same mask each time, so it is its own gradient.
        """
        return x if self.seed is None else self._drop(x.clone())

    def _drop(self, x: Tensor) -> Tensor:
        """In place."""
        assert self.seed is not None
        host_or_card = torch.device("cpu") if x.is_meta else x.device
        generator = torch.Generator(host_or_card).manual_seed(self.seed)
        gone = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        gone.bernoulli_(self.dropout, generator=generator)
        return x.masked_fill_(gone, 0.0).div_(1 - self.dropout)

    def _parts(self, factors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each part's rows, A and B."""
        yield from zip(self.rows, factors[0::2], factors[1::2], strict=True)


class AdaptedLinear(nn.Module):
    """A packed linear with trained matrices beside it; what other layers rely on.

    base: the frozen linear.
    """

    base: QuantLinear

    def begin(self) -> tuple[LoraMatmul, list[Tensor]]:
        """Return (one call with its dropout settled, A and B of each part in turn)."""
        raise NotImplementedError


def draw_seed() -> int:
    """From the host's generator, which checkpoints keep and recomputation rewinds."""
    return int(torch.randint(2**62, ()).item())
