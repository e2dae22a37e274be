"""Find the tokens of a server's answer, and how likely each of them is for the local model.

A server returns text, and the same text may be several sequences of tokens. The local model follows
the text: at each position it takes the token whose text the server reports. If the server reports
none, it takes its top-1 token if that continues the text, else the longest of likely tokens.
If the server computes the same model, each token is top-1. Any other token has a gap:
the nats by which it is less likely than the top-1 token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from qlora_cli.export.serve.client import Answer
from qlora_cli.export.serve.local_model import Decoder, LocalModel

_GROUPS = (1, 64, 1024, 2**31)
"""Candidates for the next token are decoded in groups of these sizes."""
_REPLACEMENT = "\ufffd"
"""What transformers decodes bytes to that are no character. Some servers omit them."""


@dataclass(frozen=True)
class Penalty:
    """A penalty to tokens that occurred before: positive logits are divided by `factor`.

    last: number of tokens before that are looked at. Negative logits are multiplied.
    """

    factor: float
    last: int

    def apply(self, logits: Tensor, before: Sequence[int]) -> Tensor:
        """Return the logits (V,) with the penalty. before: prompt and answer so far."""
        seen = torch.tensor(sorted(set(before[-self.last :])))
        chosen = logits[seen]
        changed = torch.where(chosen > 0, chosen / self.factor, chosen * self.factor)
        return logits.index_copy(0, seen, changed)


@dataclass(frozen=True)
class AnswerPath:
    """The tokens of an answer.

    ids: the tokens. gaps: of each token, and of the end of the text if the model ended it, in nats.
    log_probs: of each token, without a penalty. is_complete: whether the tokens are the whole text.
    """

    ids: list[int]
    gaps: list[float]
    log_probs: list[float]
    is_complete: bool

    @property
    def is_greedy(self) -> bool:
        """Return whether the answer is the local model's own greedy answer."""
        return self.is_complete and not any(self.gaps)


def answer_path(
    model: LocalModel,
    prompt: Sequence[int],
    answer: Answer,
    num: int,
    penalty: Penalty | None = None,
) -> AnswerPath:
    """Return the tokens of an answer.

    prompt: the tokens before it. num: number of tokens that was requested; some servers return
    more, in order to complete a character. penalty: that the server applies.
    """
    num = max(num, answer.tokens or 0)
    target = _without_partial(answer.text).rstrip()
    piece_ends = _ends_of_pieces(answer, target)
    decoder = Decoder(model, prompt)
    gaps: list[float] = []
    chosen: list[float] = []
    text = ""
    while True:
        before = [*prompt, *decoder.ids]
        scores = decoder.logits if penalty is None else penalty.apply(decoder.logits, before)
        candidates = _Candidates(model, decoder.ids, scores, text, target, answer.ended)
        if candidates.is_end or len(decoder.ids) == num:
            break
        found = candidates.reported(piece_ends[len(decoder.ids) :][:1]) or candidates.likely()
        if found is None:
            break
        token, text = found
        gaps.append(float(scores.max() - scores[token]))
        chosen.append(float(decoder.logits.log_softmax(-1)[token]))
        decoder.append(token)
    gaps += candidates.last_gaps(len(decoder.ids) < num)
    return AnswerPath(decoder.ids, gaps, chosen, candidates.is_complete)


@dataclass(frozen=True)
class _Candidates:
    """The tokens that can continue a text.

    ids: the tokens so far. scores: logits (V,) of the next one. text: the text so far. target: the
    complete text. has_ended: whether it ends before the limit of tokens; None if that is unknown.
    """

    model: LocalModel
    ids: Sequence[int]
    scores: Tensor
    text: str
    target: str
    has_ended: bool | None

    @property
    def is_complete(self) -> bool:
        """Return whether the text is the complete one."""
        return _is_same(self.text, self.target)

    @property
    def is_end(self) -> bool:
        """Return whether the text is complete and the model ends it, as the server has done."""
        is_possible = int(self.scores.argmax()) in self.model.possible_ends
        return self.is_complete and bool(self.has_ended) and is_possible

    def last_gaps(self, is_before_limit: bool) -> list[float]:
        """Return the gap of the text's end, if it has one.

        is_before_limit: whether more tokens were allowed.
        """
        if not self.is_complete:
            # If no token continues the text, it is less likely than every token.
            return [float(self.scores.max() - self.scores.min())] if is_before_limit else []
        has_ended = is_before_limit if self.has_ended is None else self.has_ended
        ends = sorted(self.model.possible_ends) if has_ended else []
        return [float(self.scores.max() - self.scores[ends].max())] if ends else []

    def reported(self, piece_end: Sequence[str]) -> tuple[int, str] | None:
        """Return the most likely token after which the text is this one, and the text.

        piece_end: the text with the token that the server reports; empty if it reports none.
        """
        if not piece_end:
            return None
        return next(
            (item for group in self._groups() for item in group if item[1] in piece_end), None
        )

    def likely(self) -> tuple[int, str] | None:
        """Return the top-1 token or the longest of the likely tokens, and the text with it."""
        for group in self._groups():
            if group:
                return max(group, key=lambda item: len(item[1]))
        return None

    def _groups(self) -> Iterator[list[tuple[int, str]]]:
        """Yield groups of tokens in descending order of probability, with the text after each.

        The first group is the top-1 token.
        """
        is_complete = self.is_complete
        # After the complete text only tokens without text may come. There are some if the limit of
        # tokens is not reached, else only the top-1 token can be one.
        sizes = _GROUPS[:1] if is_complete and self.has_ended is not False else _GROUPS
        for tokens in self._by_probability(sizes):
            texts = self.model.continuations([[*self.ids, token] for token in tokens])
            yield [
                (token, text)
                for token, text in zip(tokens, texts, strict=True)
                if token not in self.model.ends and _begins(text, self.target)
                if is_complete or self._has_progress(token, text)
            ]

    def _has_progress(self, token: int, text: str) -> bool:
        """Return whether a token adds text. The top-1 token may add none, like a special token."""
        # A token of half a character is possible if such a character comes next.
        may_be_partial = not self.target[len(self.text) : len(self.text) + 1].isascii()
        is_first = token == int(self.scores.argmax())
        return is_first or may_be_partial or len(text) > len(self.text)

    def _by_probability(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        start = 0
        for size in sizes:
            stop = min(start + size, len(self.scores))
            if stop > start:
                yield self.scores.topk(stop).indices[start:].tolist()
            start = stop


def _ends_of_pieces(answer: Answer, target: str) -> list[str]:
    """Return the text up to the end of each token that the server reports."""
    ends = list(accumulate(map(_without_partial, answer.pieces)))
    # Some servers report tokens in a form of their own.
    return ends if ends and ends[-1].startswith(target) else []


def _without_partial(text: str) -> str:
    """Return a text without the replacements of bytes that are no character."""
    return text.replace(_REPLACEMENT, "")


def _begins(text: str, target: str) -> bool:
    """Return whether a text begins with these characters, which may end with more spaces.

    If it begins with no space, spaces at the start of `text` do not count: a server may omit them.
    """
    if not target[:1].isspace():
        text = text.lstrip()
    return target.startswith(text) or text.rstrip() == target


def _is_same(text: str, target: str) -> bool:
    """Return whether texts are equal apart from outer spaces."""
    return text.strip() == target.strip()
