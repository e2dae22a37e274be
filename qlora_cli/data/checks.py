"""Findings about rows that can be tokenized but may not be what the user intends.

Each check in `CHECKS` yields the findings of one kind from the tokens of all rows. The checks of
texts (`text_checks.py`) ran when the rows were tokenized; their result is in `faults`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from qlora_cli.data.encoded_dataset import OWN_PROMPTS, EncodedDataset
from qlora_cli.data.finding_codes import CODES
from qlora_cli.data.findings import Finding, finding
from qlora_cli.data.label_checks import label_findings
from qlora_cli.data.repeat_checks import duplicates, held_out_rows, similar
from qlora_cli.data.row_findings import about
from qlora_cli.data.token_facts import TokenIds
from qlora_cli.units import format_count

_NEARLY_FULL = 0.95
"""Share of seq_len above which a row nearly fills it."""
_LONG = 10
"""Multiple of the median length above which a row is reported as long."""
_TOO_LARGE = 0.9
"""Share of seq_len that the longest row should reach if rows are not packed."""
_SAME_ANSWER = 0.9
"""Share of the rows that have one answer if it is reported."""
_LEAST_ROWS = 10
"""Rows from which on a property of nearly all rows is not by chance."""
_SHORT_ANSWER = 8
"""Trained tokens of an answer that contradicts another one; longer texts have many wordings."""


def examine(dataset: EncodedDataset) -> tuple[Finding, ...]:
    """Return the findings of all checks, in the order of `CODES`."""
    checks = LABEL_CHECKS if dataset.format == "classification" else CHECKS
    found = [*dataset.faults.findings(), *(one for check in checks for one in check(dataset))]
    return tuple(sorted(found, key=lambda one: list(CODES).index(one.code)))


def _bos(dataset: EncodedDataset) -> Iterator[Finding]:
    ids, facts = TokenIds.of(dataset.tokenizer), dataset.facts
    is_double = (facts.begin == ids.bos) & (facts.second == ids.bos) & (ids.bos >= 0)
    yield from about("double-bos", dataset.examples, is_double)
    # Some templates write it in front of every turn, and GPT-2 uses it between documents.
    again = facts.early_bos > 1 if ids.bos == ids.eos else facts.bos > 1
    if not dataset.uses_template:
        yield from about("bos-inside", dataset.examples, again & ~is_double)


def _no_end(dataset: EncodedDataset) -> Iterator[Finding]:
    tokenizer, row_format = dataset.tokenizer, dataset.row_format
    if tokenizer is None:
        return
    adds_end = row_format.tokenized and not row_format.uses_chat_template(tokenizer)
    if tokenizer.eos_token_id is None and adds_end:
        yield finding("no-end-token")
        return
    ends = [*{*tokenizer.get_added_vocab().values(), tokenizer.eos_token_id} - {None}]
    # A piece of a split row ends in the middle, except the last one.
    is_complete = dataset.examples.piece == dataset.examples.pieces
    is_open = is_complete & ~np.isin(dataset.facts.last_target, ends)
    is_masked = is_open & (dataset.facts.last == TokenIds.of(tokenizer).eos)
    if row_format.tokenized:
        yield from about("no-end", dataset.examples, is_open)
    else:
        yield from about("masked-end", dataset.examples, is_masked)
        yield from about("no-end", dataset.examples, is_open & ~is_masked)


def _ids(dataset: EncodedDataset) -> Iterator[Finding]:
    """Check rows of ready ids: shifted labels and padding."""
    if dataset.row_format.tokenized:
        return
    facts, lengths = dataset.facts, dataset.examples.lengths
    yield from about("labels-shifted", dataset.examples, facts.is_shifted)
    ids = TokenIds.of(dataset.tokenizer)
    padding = getattr(dataset.tokenizer, "pad_token_id", None)
    known = [token for token in (padding, ids.eos, ids.unknown) if token is not None and token >= 0]
    after_end = (facts.before_tail == ids.eos) & (ids.eos >= 0)
    at_end = (np.isin(facts.last, known) | after_end) & (facts.tail > 1)
    at_begin = np.isin(facts.begin, known) & (facts.begin == facts.second)
    if dataset.tokenizer is None:
        # Rows of one length that end in different numbers of one token.
        is_one = len(lengths) > 2 and len({*lengths.tolist()}) == len({*facts.last.tolist()}) == 1
        at_end = (facts.tail > 1) & is_one & (facts.tail.max() > facts.tail.min())
    yield from about("padded-rows", dataset.examples, (at_end | at_begin) & ~dataset.is_split)


def _template(dataset: EncodedDataset) -> Iterator[Finding]:
    template = getattr(dataset.tokenizer, "chat_template", None)
    if template and dataset.format == "completion":
        yield finding("outside-template")
    if dataset.replaces_template and dataset.uses_template:
        yield finding("template-replaced")
    if dataset.uses_template and "strftime_now" in str(template):
        yield finding("dated-template")


def _unknown_tokens(dataset: EncodedDataset) -> Iterator[Finding]:
    ids, unknown = TokenIds.of(dataset.tokenizer), dataset.facts.unknown
    if ids.unknown in (ids.bos, ids.eos):
        return
    number = format_count(int(unknown.sum(dtype=np.int64)))
    detail = f"{number} times {getattr(dataset.tokenizer, 'unk_token', None)}"
    yield from about("unknown-tokens", dataset.examples, unknown > 0, detail)


def _answers(dataset: EncodedDataset) -> Iterator[Finding]:
    facts, examples = dataset.facts, dataset.examples
    chosen = np.flatnonzero(dataset.has_prompt)
    if len(chosen) >= _LEAST_ROWS:
        _, counts = np.unique(facts.answer[chosen], return_counts=True)
        if counts.max() >= _SAME_ANSWER * len(examples):
            yield finding("one-answer", detail=f"{counts.max()} of {len(examples)} rows")
            return
    _, first, inverse = np.unique(facts.prompt[chosen], return_index=True, return_inverse=True)
    if len(first) < OWN_PROMPTS * len(chosen):
        return
    other = facts.answer[chosen] != facts.answer[chosen][first[inverse]]
    short = examples.targets[chosen] <= _SHORT_ANSWER
    yield from about("contradictions", examples, chosen[other & short & short[first[inverse]]])


def _equal_answers(dataset: EncodedDataset) -> Iterator[Finding]:
    """Check pairs: both answers of one should differ."""
    if dataset.format != "preference":
        return
    examples = dataset.examples
    is_equal = np.zeros(len(examples), np.bool_)
    for index in range(len(examples)):
        ids, _ = examples.arrays(index)
        first, *others = np.split(ids, np.cumsum(examples.segments(index))[:-1])
        is_equal[index] = bool(others) and all(np.array_equal(first, part) for part in others)
    yield from about("equal-answers", examples, is_equal)


def _lengths(dataset: EncodedDataset) -> Iterator[Finding]:
    lengths = dataset.examples.lengths
    median = float(np.median(lengths))
    detail = f"of {median:g} tokens"
    yield from about("long-rows", dataset.examples, lengths > _LONG * median, detail)


def _few_targets(dataset: EncodedDataset) -> Iterator[Finding]:
    if dataset.row_format.tokenized and not dataset.faults.counts.get("empty-answer"):
        is_empty = (dataset.examples.targets == 1) & ~dataset.is_split
        yield from about("empty-answer", dataset.examples, is_empty)


CHECKS: tuple[Callable[[EncodedDataset], Iterator[Finding]], ...] = (
    _bos,
    _no_end,
    _ids,
    _template,
    _unknown_tokens,
    duplicates,
    similar,
    held_out_rows,
    _answers,
    _few_targets,
    _equal_answers,
    _lengths,
)


def _labels(dataset: EncodedDataset) -> Iterator[Finding]:
    yield from label_findings(dataset.examples, dataset.facts.digest)


LABEL_CHECKS = (_unknown_tokens, duplicates, similar, held_out_rows, _lengths, _labels)
"""The checks of labelled rows, no token of which is trained."""


def length_notes(dataset: EncodedDataset, num_sequences: int) -> Iterator[str]:
    """Yield what is worth knowing about the lengths of the rows, one sentence each.

    num_sequences: number of sequences in an epoch.
    """
    examples, seq_len = dataset.examples, dataset.seq_len
    full = int(((examples.lengths > _NEARLY_FULL * seq_len) & ~dataset.is_split).sum())
    if full:
        plural = "" if full == 1 else "s"
        yield f"{format_count(full)} row{plural} nearly fill data.seq_len={seq_len}"
    longest = int(examples.lengths.max())
    if not dataset.packing and longest < _TOO_LARGE * seq_len:
        yield (
            f"the longest row has {format_count(longest)} tokens: without packing, "
            f"data.seq_len={longest} is enough, and the plan needs less memory"
        )
    if dataset.packing:
        tokens = int(examples.lengths.sum(dtype=np.int64))
        share = tokens / (num_sequences * seq_len)
        number = f"{format_count(num_sequences)} sequence"
        plural = "" if num_sequences == 1 else "s"
        yield f"packing fills {number}{plural} of {seq_len} tokens to {share:.1%}"
