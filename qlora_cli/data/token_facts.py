"""What the checks need of the tokens of each row, computed for many rows at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.encoded import Part
from qlora_cli.data.examples import Examples, chosen_of_parts

_NONE = -1
"""A token id that no token has."""
_SHIFTED = 0.9
"""Share of the trained labels that are those of a neighbour if labels are shifted."""


@dataclass(frozen=True)
class TokenIds:
    """The special ids of a tokenizer; -1 for one that it does not have."""

    bos: int = _NONE
    eos: int = _NONE
    unknown: int = _NONE

    @classmethod
    def of(cls, tokenizer: Any) -> TokenIds:
        """Return the ids of a tokenizer, which may be None."""
        names = ("bos_token_id", "eos_token_id", "unk_token_id")
        ids = (getattr(tokenizer, name, None) for name in names)
        return cls(*(_NONE if token is None else token for token in ids))


@dataclass(frozen=True)
class TokenFacts:
    """Facts about the tokens of rows, in arrays of one item per row.

    digest, prompt, answer: hash of all tokens, of those before the first trained one, and of the
    trained ones; equal hashes are taken as equal tokens (of two million different rows, two have
    the same one with a probability of 1e-6). first: position of the first trained token.
    second: the second token. bos, early_bos, unknown: number of BOS tokens, of those among the
    first four tokens, and of unknown tokens. last, last_target: the last token, and the last
    trained one. tail: number of equal tokens at the end. before_tail: the token in front of
    these. is_shifted: whether the labels are those
    of a neighbour.
    """

    digest: NDArray[np.uint64]
    prompt: NDArray[np.uint64]
    answer: NDArray[np.uint64]
    first: NDArray[np.int32]
    begin: NDArray[np.int32]
    second: NDArray[np.int32]
    bos: NDArray[np.int32]
    early_bos: NDArray[np.int32]
    unknown: NDArray[np.int32]
    last: NDArray[np.int32]
    last_target: NDArray[np.int32]
    tail: NDArray[np.int32]
    before_tail: NDArray[np.int32]
    is_shifted: NDArray[np.bool_]

    @classmethod
    def of(cls, examples: Examples, ids: TokenIds) -> TokenFacts:
        """Return the facts about one or more examples, part by part."""
        places, pieces = [], []
        weights = _weights(int(examples.lengths.max(initial=0)))
        for part, chosen in chosen_of_parts(examples):
            places.append(chosen)
            pieces.append(_facts(_Tokens.of(examples, part, chosen), ids, weights))
        order = np.argsort(np.concatenate(places), kind="stable")
        return cls(
            *(np.concatenate([getattr(p, f.name) for p in pieces])[order] for f in fields(cls))
        )


@dataclass(frozen=True)
class _Tokens:
    """The tokens of several rows, one after the other.

    starts: index of each row's first token. lengths: of each row. position: of each token in its
    row. is_trained: for each token. labels: None if they are the tokens themselves.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32] | None
    is_trained: NDArray[np.bool_]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    position: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Examples, part: Part, chosen: NDArray[np.int64]) -> _Tokens:
        lengths = examples.lengths[chosen].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        position = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        begins = part.bounds[examples.rows[chosen] - part.first] + examples.starts[chosen]
        index = np.repeat(begins, lengths) + position
        labels = None if part.labels is None else part.labels[index]
        trained = part.trained[index].astype(bool)
        return cls(part.ids[index], labels, trained, starts, lengths, position)

    def sums(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the sum of the values of each row's tokens."""
        return np.add.reduceat(values, self.starts)

    def counts(self, mask: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Return the number of True of each row."""
        return self.sums(mask.astype(np.int32))

    def of_rows(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the value of its row for each token."""
        return np.repeat(values, self.lengths)


def _weights(length: int) -> NDArray[np.uint64]:
    """Return one random odd factor per position, the same ones in every process."""
    random = np.random.Generator(np.random.PCG64(0))
    return random.integers(2**63, size=length + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def _facts(tokens: _Tokens, special: TokenIds, weights: NDArray[np.uint64]) -> TokenFacts:
    ids, starts, position = tokens.ids, tokens.starts, tokens.position
    values = ids.astype(np.uint64) + np.uint64(1)
    products = values * weights[position]
    far = np.iinfo(np.int32).max
    first = np.minimum.reduceat(np.where(tokens.is_trained, position, far), starts)
    last = np.maximum.reduceat(np.where(tokens.is_trained, position, 0), starts)
    trained = np.cumsum(tokens.is_trained, dtype=np.int64)
    rank = trained - tokens.of_rows(trained[starts])
    answers = np.where(tokens.is_trained, values * weights[rank], np.uint64(0))
    is_bos = ids == special.bos
    ends = starts + tokens.lengths - 1
    differs = ids != tokens.of_rows(ids[ends])
    last_other = np.maximum.reduceat(np.where(differs, position, -1), starts)
    labels = ids if tokens.labels is None else tokens.labels
    return TokenFacts(
        digest=tokens.sums(products),
        prompt=tokens.sums(np.where(position < tokens.of_rows(first), products, np.uint64(0))),
        answer=tokens.sums(answers),
        first=first.astype(np.int32),
        begin=ids[starts],
        second=np.where(tokens.lengths > 1, ids[np.minimum(starts + 1, ends)], _NONE),
        bos=tokens.counts(is_bos),
        early_bos=tokens.counts(is_bos & (position < 4)),
        unknown=tokens.counts(ids == special.unknown),
        last=ids[ends],
        last_target=labels[starts + last],
        tail=(tokens.lengths - 1 - last_other).astype(np.int32),
        before_tail=np.where(last_other < 0, _NONE, ids[starts + np.maximum(last_other, 0)]),
        is_shifted=_is_shifted(tokens),
    )


def _is_shifted(tokens: _Tokens) -> NDArray[np.bool_]:
    """Return for each row whether its labels are those of the next or the previous token."""
    labels, ids = tokens.labels, tokens.ids
    if labels is None:
        return np.zeros(len(tokens.starts), bool)
    trained = tokens.counts(tokens.is_trained)
    own = tokens.counts(tokens.is_trained & (labels == ids))
    shifted = np.zeros(len(trained), bool)
    for step in (1, -1):
        neighbours = np.roll(ids, -step)
        same = tokens.counts(tokens.is_trained & (labels == neighbours))
        # The first or last label of a row has no neighbour.
        shifted |= (same >= _SHIFTED * (trained - 1)) & (own < same) & (same > 1)
    return shifted
