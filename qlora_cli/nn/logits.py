"""What a model does with the output of its head: scaling and a soft cap (Granite, Cohere, Gemma 2).

The loss, evaluation and verification compute logits in chunks from hidden states, without the
model's own forward method, so they apply this transformation themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """logits = cap * tanh(scale * z / cap) of the head's output z; without a cap, scale * z."""

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Return whether the logits are the head's output."""
        return self.scale == 1.0 and self.cap is None

    def apply_(self, output: Tensor) -> Tensor:
        """Turn the head's output into logits, in place."""
        if self.scale != 1.0:
            output.mul_(self.scale)
        if self.cap is not None:
            output.div_(self.cap).tanh_().mul_(self.cap)
        return output

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return d logits / d output without the factor `scale`; None without a cap, for 1."""
        if self.cap is None:
            return None
        return (logits / self.cap).square_().neg_().add_(1)


IDENTITY = LogitTransform()
