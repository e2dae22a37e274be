"""Compare the logits of two models on the same rows.

For each model only the final hidden states at the compared positions are kept, and the place of its
head in a file. So two models need not be in memory together. Logits are computed for a chunk of the
vocabulary at a time: neither a tensor of positions x vocabulary nor a complete head is in memory.

Letters: n compared positions, d hidden size, V vocabulary size, c vocabulary entries in a chunk.
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
from qlora_cli.nn.logits import IDENTITY, LogitTransform
from qlora_cli.nn.loss import head_output
from qlora_cli.tasks.task import Task

_CHUNK_ELEMENTS = 2**21
"""Number of logits, and of elements of the head, in memory at a time: 8 MiB in float32."""
COMPARISON_BYTES = 12 * 4 * _CHUNK_ELEMENTS
"""Device memory that a comparison needs at most."""


@dataclass(frozen=True)
class Head:
    """The head of a model, whose weight (V, d) is in a file.

    entry: the weight in the file. dtype: the dtype that the model casts it to. bias: (V,) in
    `dtype`, on the CPU; None if there is none. transform: of the head's output.
    """

    entry: TensorEntry
    dtype: torch.dtype
    bias: Tensor | None = None
    transform: LogitTransform = IDENTITY

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.entry.shape[0]

    def rows(self, vocabulary: slice) -> Tensor:
        """Return the rows (c, d) of a chunk of the vocabulary, rounded to `dtype`, in float32."""
        width = self.entry.shape[1]
        start = self.entry.start + vocabulary.start * width * self.entry.dtype.itemsize
        shape = (vocabulary.stop - vocabulary.start, width)
        return read_tensor(replace(self.entry, shape=shape, start=start)).to(self.dtype).float()

    def logits(self, hidden: Tensor, vocabulary: slice) -> Tensor:
        """Return the logits (n, c) of a chunk of the vocabulary. hidden: (n, d) float32."""
        bias = None if self.bias is None else self.bias[vocabulary].to(hidden.device)
        output = head_output(hidden, self.rows(vocabulary).to(hidden.device), bias)
        return self.transform.apply_(output)


@dataclass(frozen=True)
class ComparedLogits:
    """What a model predicts at n positions, stored as hidden states.

    hidden_states: (n, d), the input of the head at each position, on the model's device.
    head: the head.
    targets: (n,) int64, the target of each position, on the same device.
    """

    hidden_states: Tensor
    head: Head
    targets: Tensor

    def __getitem__(self, positions: slice) -> ComparedLogits:
        """Return the predictions at some of the positions."""
        return replace(
            self,
            hidden_states=self.hidden_states[positions],
            targets=self.targets[positions],
        )

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (chunk of the vocabulary, its logits (n, c) in float32), in order."""
        hidden = self.hidden_states.float()
        step = max(1, _CHUNK_ELEMENTS // max(hidden.shape))
        for start in range(0, self.head.vocab_size, step):
            vocabulary = slice(start, min(start + step, self.head.vocab_size))
            yield vocabulary, self.head.logits(hidden, vocabulary)

    def top1_tokens(self) -> Tensor:
        """Return the most likely token at each position, (n,) int64."""
        softmax = RunningSoftmax.empty(self.targets)
        for vocabulary, logits in self.logits():
            softmax.update(vocabulary, logits)
        return softmax.top1


@dataclass(frozen=True)
class Comparison:
    """How far a candidate model is from a reference model. The field names are keys of merge.json.

    max_logit_difference: largest absolute difference of any logit.
    mean_kl: mean KL(reference || candidate) over the positions, in nats.
    top1_agreement: share of positions at which both models have the same most likely token.
    loss: the candidate's mean cross entropy, in nats.
    signed_loss: the same with the cross entropies of rejected answers subtracted, which is what
        preference training lowers; equal to `loss` without such answers.
    """

    max_logit_difference: float
    mean_kl: float
    top1_agreement: float
    loss: float
    signed_loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that exceeds a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def compute_logits(
    task: Task, loaded: LoadedModel, head: Head, rows: Sequence[Example], device: torch.device
) -> ComparedLogits:
    """Run all rows in one forward pass, isolated from each other, and return the predictions.

    task: selects the compared positions. head: the head of `loaded`. device: runs the model.
    """
    hidden, targets = task.compared_states(loaded, task.collate(rows), device)
    return ComparedLogits(hidden, head, targets)


@torch.no_grad()
def compare(
    reference: ComparedLogits, candidate: ComparedLogits, signs: Tensor | None = None
) -> Comparison:
    """Compare a candidate with a reference.

    signs: (n,), -1 at the targets of rejected answers, else 1; None if there are none.

    With p and q as their logits, P as softmax(p), and Z_p and Z_q as the normalizers sum(exp),
    KL(reference || candidate) = sum over the vocabulary of P (p - q) - log Z_p + log Z_q.

    Both must have the same targets and vocabulary size, else AssertionError is raised.
    """
    assert torch.equal(reference.targets, candidate.targets)
    assert reference.head.vocab_size == candidate.head.vocab_size
    if reference.head.vocab_size == 1:
        return _compare_numbers(reference, candidate)
    p_softmax = RunningSoftmax.empty(reference.targets)
    q_softmax = RunningSoftmax.empty(candidate.targets)
    # The sum of exp(p) (p - q), divided by exp(largest p) as `RunningSoftmax.total` is.
    weighted_difference = torch.zeros_like(p_softmax.total)
    max_difference = torch.zeros((), device=weighted_difference.device)
    for (vocabulary, p), (_, q) in zip(reference.logits(), candidate.logits(), strict=True):
        difference = p - q
        # torch.maximum() propagates NaN, Python's max() does not.
        max_difference = torch.maximum(max_difference, difference.abs().max())
        rescale, weights = p_softmax.update(vocabulary, p)
        q_softmax.update(vocabulary, q)
        weighted_difference = weighted_difference * rescale + (weights * difference.double()).sum(1)
    divergence = weighted_difference / p_softmax.total
    divergence = divergence - p_softmax.log_normalizer() + q_softmax.log_normalizer()
    is_same = (p_softmax.top1 == q_softmax.top1).double()
    loss = q_softmax.log_normalizer() - q_softmax.target_logit
    signed = loss if signs is None else loss * signs.to(loss.device)
    means = (float(values.mean()) for values in (divergence, is_same, loss, signed))
    return Comparison(float(max_difference), *means)


def _compare_numbers(reference: ComparedLogits, candidate: ComparedLogits) -> Comparison:
    """Compare predicted numbers, the only logit of a regression.

    The divergence is that of two normal distributions of variance 1 with these means, half the
    squared difference. It is also the loss: the labels are not compared.
    """
    (_, p), (_, q) = next(reference.logits()), next(candidate.logits())
    difference = (p - q).double()
    divergence = float(difference.square().mean() / 2)
    return Comparison(float(difference.abs().max()), divergence, 1.0, divergence, divergence)


@dataclass
class RunningSoftmax:
    """A softmax that is computed one chunk of the vocabulary at a time, at each of n positions.

    All tensors have the shape (n,). targets and top1 are int64, the others float64.
    largest: largest logit so far. total: sum of exp(logit - largest) so far.
    top1: the token of the largest logit. target_logit: logit of the target.
    """

    targets: Tensor
    largest: Tensor
    total: Tensor
    top1: Tensor
    target_logit: Tensor

    @classmethod
    def empty(cls, targets: Tensor) -> RunningSoftmax:
        """Return the state before the first chunk. targets: (n,) int64."""
        zeros = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        return cls(targets, zeros - math.inf, zeros, torch.zeros_like(targets), zeros - math.inf)

    def update(self, vocabulary: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add the logits (n, c) of the next chunk.

        vocabulary: the chunk's token ids.

        Returns (rescale, weights). rescale (n,) is the factor by which sums over earlier chunks
        must be multiplied, because `largest` has changed; weights (n, c) is exp(logit - largest).
        """
        logits = logits.double()
        chunk_largest, index = logits.max(dim=1)
        self.top1 = torch.where(chunk_largest > self.largest, index + vocabulary.start, self.top1)
        largest = torch.maximum(self.largest, chunk_largest)
        rescale = (self.largest - largest).exp()
        weights = (logits - largest[:, None]).exp()
        self.largest, self.total = largest, self.total * rescale + weights.sum(dim=1)
        column = self.targets - vocabulary.start
        is_inside = (column >= 0) & (column < logits.shape[1])
        own = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        self.target_logit = torch.where(is_inside, own, self.target_logit)
        return rescale, weights

    def log_normalizer(self) -> Tensor:
        """Return log of the sum of exp(logit) over the vocabulary, (n,)."""
        return self.largest + self.total.log()


def free_memory() -> None:
    """Free a model after its last reference is gone.

    The modules of a model refer to each other, so only the garbage collector frees them.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
