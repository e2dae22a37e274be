"""Verify what a server answers: the greedy answers of the merged folder in transformers.

Held-out rows go to the server as texts (completions) and as chats (chat completions). The merged
model on this computer follows the server's answers (`answer_path.py`). If they are not its own, the
cause is looked for:

- special tokens, template: the server counts another number of prompt tokens, or another prompt
  explains its answers (`variants.py`).
- sampling: a penalty to repeated tokens explains them.
- weights: the base without the adapter explains them, or they differ more than rounding the weights
  to 4 bits changes this model (`weight_checks.py`).
- quantization: they differ as much as a rounding does. It is a fault only if it is stronger than
  expected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.compare.eval_rows import eval_rows
from qlora_cli.export.compare.logit_comparison import free_memory
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.serve.answer_path import Penalty
from qlora_cli.export.serve.client import Answer, ServerClient
from qlora_cli.export.serve.fit import NUM_TOKENS, Exchange, Fit, fit
from qlora_cli.export.serve.local_model import LocalModel
from qlora_cli.export.serve.prompts import Prompt, chat_prompts, text_prompts
from qlora_cli.export.serve.rounding import Bits, Change, changes_by_rounding
from qlora_cli.export.serve.variants import variants
from qlora_cli.export.serve.weight_checks import quantization_text, weight_fault
from qlora_cli.files.locate import read_config
from qlora_cli.runs.run import Run

_PENALTY = Penalty(1.1, 64)
"""The default of llama.cpp's programs before 2024, of llama-cpp-python's server and of Ollama."""


@dataclass
class ServerReport:
    """The result of the verification of a server.

    model: its name on the server. texts, chats: number of prompts of each kind. same_texts,
    same_chats: number of equal answers. change: how much the answers differ, over those that no
    other prompt explains; None if there are none. rounding: change by rounding the merged model to
    so many bits; empty if the answers are close. faults, explanation: one line each.
    """

    model: str
    texts: int = 0
    same_texts: int = 0
    chats: int = 0
    same_chats: int = 0
    change: Change | None = None
    rounding: dict[Bits, Change] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    explanation: list[str] = field(default_factory=list)


def verify_server(
    merged: Path,
    run: Run,
    client: ServerClient,
    bits: Bits,
    device: torch.device,
    observer: Observer,
) -> ServerReport:
    """Compare a server's answers with those of the merged folder.

    run: the run that was merged, for the held-out rows and the base. bits: per weight, of the
    strongest quantization that is allowed. device: runs the models.

    Raises UsageError if `merged` is not a model's folder, or if `bits` is not 4 and the server
    reports no log-probabilities; ModelError if the folder cannot be loaded; QloraError if the
    server fails.
    """
    if not (merged / CONFIG).is_file():
        raise UsageError(
            f"{merged} is not a model's folder: it has no {CONFIG}",
            hint="name the folder that `qlora merge` wrote",
        )
    base = run.base_folder
    rows = eval_rows(run.recipe, base, read_config(base / CONFIG))
    for note in rows.notes:
        observer.note(note)
    model = LocalModel(merged, device)
    prompts = text_prompts(model, rows.rows), chat_prompts(model, rows.rows, run.recipe.data)
    observer.stage("server", sum(map(len, prompts)))
    groups = dict(zip(("texts", "chats"), _sent(prompts, client, observer), strict=True))
    report = ServerReport(client.name, len(groups["texts"]), chats=len(groups["chats"]))
    report.explanation += _notes(model, client, groups["chats"])
    _require_log_probabilities(bits, groups)
    exchanges, own = _explain_prompts(report, model, groups)
    if own.is_exact:
        return report
    if not own.is_close:
        report.rounding = _rounding(model, exchanges, own)
    del model
    free_memory()
    _explain_weights(report, own, fit(LocalModel(base, device), exchanges), bits)
    return report


def _require_log_probabilities(bits: Bits, groups: Mapping[str, Sequence[Exchange]]) -> None:
    """Raise UsageError if `bits` is not 4 and the server reports no log-probabilities."""
    if bits != 4 and not any(e.answer.logprobs for part in groups.values() for e in part):
        raise UsageError(
            "the server reports no log-probabilities, without which 8 bits cannot be verified",
            where="--bits",
            hint="leave --bits out, or let the server report log-probabilities",
        )


def _sent(
    prompts: Sequence[Sequence[Prompt]], client: ServerClient, observer: Observer
) -> Iterator[list[Exchange]]:
    done = 0
    for group in prompts:
        exchanges = []
        for prompt in group:
            exchanges.append(Exchange(prompt, _answer(client, prompt)))
            done += 1
            observer.advance(done)
        yield exchanges


def _answer(client: ServerClient, prompt: Prompt) -> Answer:
    if prompt.messages is None:
        return client.complete(prompt.text, NUM_TOKENS)
    return client.chat(prompt.messages, NUM_TOKENS)


def _notes(model: LocalModel, client: ServerClient, chats: Sequence[Exchange]) -> Iterator[str]:
    if not model.tokenizer.chat_template:
        yield "The model has no chat template, so no chat was compared."
    elif not chats:
        yield "No held-out row can be sent as a chat, so no chat was compared."
    if not client.accepts_penalties:
        yield "The server refuses requests that switch penalties to repeated tokens off."


def _explain_prompts(
    report: ServerReport, model: LocalModel, groups: Mapping[str, Sequence[Exchange]]
) -> tuple[list[Exchange], Fit]:
    """Set the number of equal answers and the change, and report causes other than the weights.

    Returns the exchanges that have no such cause, and their fit.
    """
    fits = {kind: fit(model, exchanges) for kind, exchanges in groups.items()}
    report.same_texts, report.same_chats = (fits[kind].num_greedy for kind in groups)
    left = [
        kind
        for kind, exchanges in groups.items()
        if exchanges and not _has_other_prompt(report, model, exchanges, fits[kind], kind)
    ]
    own = Fit.joined([fits[kind] for kind in left])
    if left:
        report.change = Change(own.mean_gap, own.mean_difference)
    return [exchange for kind in left for exchange in groups[kind]], own


def _has_other_prompt(
    report: ServerReport,
    model: LocalModel,
    exchanges: Sequence[Exchange],
    own: Fit,
    kind: str,
) -> bool:
    """Report template, special tokens or a penalty and return True if they cause the differences.

    own: the fit of the prompts that the model should read. kind: `texts` or `chats`.
    """
    num_other = sum(exchange.is_other_prompt for exchange in exchanges)
    if own.is_close and not num_other:
        return False
    cause = _cause(model, exchanges, own, has_other_prompts=num_other > 0)
    if cause is None and num_other:
        first = next(exchange for exchange in exchanges if exchange.is_other_prompt)
        name = "special tokens" if kind == "texts" else "template"
        cause = _Cause(
            f"{name}: the server reads {first.answer.prompt_tokens} tokens where the model's own "
            f"prompt has {len(first.prompt.ids)}"
        )
    if cause is not None:
        lines = report.faults if cause.is_fault else report.explanation
        lines.append(f"{cause.text} ({num_other or len(exchanges)} of {len(exchanges)} {kind})")
    return cause is not None


@dataclass(frozen=True)
class _Cause:
    """Why answers differ. is_fault: whether the server must not do so."""

    text: str
    is_fault: bool = True


def _cause(
    model: LocalModel, exchanges: Sequence[Exchange], own: Fit, has_other_prompts: bool
) -> _Cause | None:
    """Return the prompt or penalty that explains answers best; None if the own prompt does."""
    found: list[tuple[float, _Cause]] = []
    counts = [exchange.answer.prompt_tokens for exchange in exchanges]
    own_ids = [exchange.prompt.ids for exchange in exchanges]
    for variant in variants(model, [exchange.prompt for exchange in exchanges]):
        is_possible = all(
            ids and count in (None, len(ids))
            for ids, count in zip(variant.prompts, counts, strict=True)
        )
        if not is_possible or variant.prompts == own_ids:
            continue
        other = fit(model, exchanges, variant.prompts)
        # If the number of tokens is another one, the own prompt is wrong in any case.
        is_right = other.mean_gap <= own.mean_gap if has_other_prompts else False
        if is_right or other.explains_better_than(own):
            text = f"{variant.cause}: the server {variant.what}"
            found.append((other.mean_gap, _Cause(text, variant.is_fault)))
    if not has_other_prompts:
        other = fit(model, exchanges, penalty=_PENALTY)
        if other.explains_better_than(own, by_gaps=True):
            text = f"sampling: the server applies a repetition penalty of {_PENALTY.factor:g}"
            found.append((other.mean_gap, _Cause(text)))
    return min(found, key=lambda item: item[0])[1] if found else None


def _rounding(model: LocalModel, exchanges: Sequence[Exchange], own: Fit) -> dict[Bits, Change]:
    """Return the change of the model's own answers by rounding its weights. It is changed."""
    prompts = [exchange.prompt.ids for exchange in exchanges]
    answers = [
        path.ids if path.is_greedy else model.greedy(prompt, NUM_TOKENS)
        for prompt, path in zip(prompts, own.paths, strict=True)
    ]
    # An empty answer is compared by the token that ends it.
    end = sorted(model.ends)[:1]
    pairs = zip(prompts, answers, strict=True)
    return changes_by_rounding(model, [(prompt, answer or end) for prompt, answer in pairs])


def _explain_weights(report: ServerReport, own: Fit, of_base: Fit, bits: Bits) -> None:
    """Report weights or quantization as the cause of differences.

    own, of_base: the fits of the merged model and of the base without the adapter.
    """
    assert report.change is not None
    if of_base.explains_better_than(own):
        report.faults.append(
            "weights: the base without the adapter explains the server's answers "
            f"({of_base.num_greedy} of {len(of_base.paths)} are its own)"
        )
        return
    if report.rounding:
        fault = weight_fault(report.change, report.rounding, bits)
        report.faults += [fault] if fault else []
    report.explanation.append(quantization_text(report.change, report.rounding))
