"""How far one model's answers are from another's, on the same rows.

Of each model the last hidden states are kept, and where its head lies, so that two models need
never be in memory together. Logits come for some words of the vocabulary at a time: neither a
positions x vocabulary tensor is made nor a whole head read.

Letters: n positions compared, d hidden size, V vocabulary, c words at a time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_cli.data.encode import Example
from qlora_cli.files.safetensors_io import TensorEntry, read_tensor
from qlora_cli.models.model import LoadedModel
from qlora_cli.tasks.task import Task

_CHUNK_ELEMENTS = 2**21
"""Logits made at once, and of the head read at once: 8 MiB in float32."""
COMPARISON_BYTES = 12 * 4 * _CHUNK_ELEMENTS
"""What a comparison holds of the device at most."""


@dataclass(frozen=True)
class Head:
    """A head's weight (V, d) as it lies in a file. dtype: what the model holds it in."""

    entry: TensorEntry
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.entry.shape[0]

    def words(self, words: slice) -> Tensor:
        """Their rows (c, d), in float32."""
        width = self.entry.shape[1]
        start = self.entry.start + words.start * width * self.entry.dtype.itemsize
        shape = (words.stop - words.start, width)
        return read_tensor(replace(self.entry, shape=shape, start=start)).to(self.dtype).float()


@dataclass(frozen=True)
class ComparedLogits:
    """What a model says at every position with a trained token behind it.

    hidden (n, d); targets (n,) int64, the tokens that follow; both on the model's device.
    """

    hidden: Tensor
    head: Head
    targets: Tensor

    def __getitem__(self, positions: slice) -> ComparedLogits:
        """Those at some of the positions."""
        return replace(self, hidden=self.hidden[positions], targets=self.targets[positions])

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """(words, their logits (n, c) at every position in float32), in order."""
        hidden = self.hidden.float()
        step = max(1, _CHUNK_ELEMENTS // max(hidden.shape))
        for start in range(0, len(self.head), step):
            words = slice(start, min(start + step, len(self.head)))
            yield words, hidden @ self.head.words(words).to(hidden.device).t()

    def top1_tokens(self) -> Tensor:
        """(n,): the most likely token behind each position."""
        seen = RunningSoftmax.nothing(self.targets)
        for words, logits in self.logits():
            seen.add(words, logits)
        return seen.best


@dataclass(frozen=True)
class Comparison:
    """A candidate against a reference, over n positions.

    max_logit_difference: the largest |difference| of any logit. mean_kl: KL(reference ||
    candidate) in nats. top1_agreement: share of positions with the same most likely token. loss:
    the candidate's mean nats on the tokens that follow.
    """

    max_logit_difference: float
    mean_kl: float
    top1_agreement: float
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def compared_logits(
    task: Task, loaded: LoadedModel, head: Head, rows: Sequence[Example], device: torch.device
) -> ComparedLogits:
    """All rows in one forward, each on its own. head: where the model's head lies."""
    hidden, targets = task.compared_states(loaded, task.collate(rows), device)
    return ComparedLogits(hidden, head, targets)


@torch.no_grad()
def compare(reference: ComparedLogits, candidate: ComparedLogits) -> Comparison:
    """Raises AssertionError where they did not answer the same rows over the same vocabulary."""
    assert torch.equal(reference.targets, candidate.targets)
    assert len(reference.head) == len(candidate.head)
    ours, theirs = (
        RunningSoftmax.nothing(reference.targets),
        RunningSoftmax.nothing(candidate.targets),
    )
    # The sum over words of exp(our logit) (our logit - their logit), which with the two
    # normalizers is the divergence; scaled down as `RunningSoftmax.total` is.
    excess = torch.zeros_like(ours.total)
    most = torch.zeros((), device=excess.device)
    for (words, p), (_, q) in zip(reference.logits(), candidate.logits(), strict=True):
        difference = p - q
        # Not max(): a NaN must not be passed over.
        most = torch.maximum(most, difference.abs().max())
        shrunk, weights = ours.add(words, p)
        theirs.add(words, q)
        excess = excess * shrunk + (weights * difference.double()).sum(dim=1)
    divergence = excess / ours.total - ours.normalizer() + theirs.normalizer()
    same = (ours.best == theirs.best).double()
    loss = theirs.normalizer() - theirs.of_target
    figures = (divergence, same, loss)
    return Comparison(float(most), *(float(figure.mean()) for figure in figures))


@dataclass
class RunningSoftmax:
    """A softmax over the words seen so far, at each of n positions, in float64.

    largest: logit so far. total: sum of exp(logit - largest). best: the largest one's word.
    of_target: the logit of the token that follows.
    """

    targets: Tensor
    largest: Tensor
    total: Tensor
    best: Tensor
    of_target: Tensor

    @classmethod
    def nothing(cls, targets: Tensor) -> RunningSoftmax:
        """Before the first word."""
        none = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        return cls(targets, none - math.inf, none, torch.zeros_like(targets), none - math.inf)

    def add(self, words: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in the next words' logits (n, c).

        Returns what earlier sums shrink by (n,), and these words' share of the new one (n, c).
        """
        logits = logits.double()
        top, where = logits.max(dim=1)
        self.best = torch.where(top > self.largest, where + words.start, self.best)
        largest = torch.maximum(self.largest, top)
        shrunk = (self.largest - largest).exp()
        weights = (logits - largest[:, None]).exp()
        self.largest, self.total = largest, self.total * shrunk + weights.sum(dim=1)
        place = self.targets - words.start
        inside = (place >= 0) & (place < logits.shape[1])
        own = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        self.of_target = torch.where(inside, own, self.of_target)
        return shrunk, weights

    def normalizer(self) -> Tensor:
        """Log of the sum of exp(logit) over all words, (n,)."""
        return self.largest + self.total.log()


def free_memory() -> None:
    """After dropping a model: its modules refer to each other, so only the collector frees them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
