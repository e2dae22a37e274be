"""Verify what a server answers: the same greedy answers as the merged folder in transformers.

The same prompts go to the server and to the merged model on this computer, as text (completions)
and as chats (chat completions). An answer that differs is explained:

- special tokens or template: the server counts another number of prompt tokens, or the local model
  gives the server's answer to another prompt (`variants.py`).
- weights: the base without the adapter gives the server's answer, or the first token that differs
  is much less likely than the local model's.
- quantization or rounding: that token is almost as likely. This is reported and is not a fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qlora_cli.data.encode import Example
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.compare.eval_rows import eval_rows
from qlora_cli.export.compare.logit_comparison import free_memory
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.serve.client import Answer, ServerClient
from qlora_cli.export.serve.local_model import GreedyAnswer, LocalModel
from qlora_cli.export.serve.variants import Messages, chat_ids, chat_variants, text_variants
from qlora_cli.files.locate import read_config
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.runs.run import Run

MAX_PROMPTS = 8
NUM_TOKENS = 24
_MAX_GAP = 1.0
"""Nats by which quantization may make another token the most likely one."""
_MAX_LOGPROB_DIFFERENCE = 1.0
"""Nats by which quantization may change the log-probability of a generated token."""
_MAX_CHARACTERS = 400


@dataclass
class ServerReport:
    """The result of the verification of a server.

    model: its name on the server. texts, chats: number of prompts of each kind. same_texts,
    same_chats: number of equal answers. max_logprob_difference: over the tokens of equal answers;
    None if the server reports no log-probabilities. faults, explanation: one line each.
    """

    model: str
    texts: int = 0
    same_texts: int = 0
    chats: int = 0
    same_chats: int = 0
    max_logprob_difference: float | None = None
    faults: list[str] = field(default_factory=list)
    explanation: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Exchange:
    """One prompt with both answers. ids: the expected tokens. messages: None for a text."""

    ids: list[int]
    expected: GreedyAnswer
    answer: Answer
    messages: Messages | None = None

    @property
    def is_same(self) -> bool:
        return self.expected.text.strip() == self.answer.text.strip()


def verify_server(
    merged: Path, run: Run, client: ServerClient, device: torch.device, observer: Observer
) -> ServerReport:
    """Compare a server's answers with those of the merged folder.

    run: the run that was merged, for the held-out rows and the base. device: runs the models.

    Raises UsageError if `merged` is not a model's folder, ModelError if it cannot be loaded,
    QloraError if the server fails.
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
    prompts = _prompts(model, rows.rows)
    has_template = bool(model.tokenizer.chat_template)
    observer.stage("server", len(prompts) * (1 + has_template))
    texts = list(_text_exchanges(model, client, prompts, observer))
    chats = list(_chat_exchanges(model, client, prompts, observer)) if has_template else []
    report = ServerReport(client.name, len(texts), sum(e.is_same for e in texts))
    report.chats, report.same_chats = len(chats), sum(e.is_same for e in chats)
    if not has_template:
        report.explanation.append("The model has no chat template, so no chat was compared.")
    _compare_logprobs(report, texts)
    unexplained = [*_explain_prompts(report, model, texts), *_explain_prompts(report, model, chats)]
    gaps = [model.gap(exchange.expected, exchange.answer.text) for exchange in unexplained]
    del model
    free_memory()
    if unexplained:
        _explain_weights(report, unexplained, gaps, base, device)
    return report


def _prompts(model: LocalModel, rows: Sequence[Example]) -> list[str]:
    """Return the prompts of the first rows as texts, without a leading BOS token."""
    texts = []
    for row in rows[:MAX_PROMPTS]:
        first = next((i for i, label in enumerate(row.labels) if label != IGNORE_INDEX), 0)
        ids = list(row.ids[: first if first > 1 else max(1, len(row.ids) // 2)])
        if ids[0] == model.tokenizer.bos_token_id and len(ids) > 1:
            ids = ids[1:]
        texts.append(str(model.tokenizer.decode(ids, skip_special_tokens=False)))
    return texts


def _text_exchanges(
    model: LocalModel, client: ServerClient, prompts: Sequence[str], observer: Observer
) -> Iterator[_Exchange]:
    for done, prompt in enumerate(prompts, 1):
        ids = model.encode(prompt, special=True)
        yield _Exchange(ids, model.greedy(ids, NUM_TOKENS), client.complete(prompt, NUM_TOKENS))
        observer.advance(done)


def _chat_exchanges(
    model: LocalModel, client: ServerClient, prompts: Sequence[str], observer: Observer
) -> Iterator[_Exchange]:
    for done, prompt in enumerate(prompts, 1):
        words = model.decode(model.encode(prompt, special=False)).strip()[:_MAX_CHARACTERS]
        messages = [{"role": "user", "content": words}]
        ids = chat_ids(model, messages)
        answer = client.chat(messages, NUM_TOKENS)
        yield _Exchange(ids, model.greedy(ids, NUM_TOKENS), answer, messages)
        observer.advance(len(prompts) + done)


def _compare_logprobs(report: ServerReport, texts: Sequence[_Exchange]) -> None:
    """Set the largest difference of log-probabilities and report it if it is too large."""
    differences = [
        abs(float(log_probs[token]) - value)
        for exchange in texts
        if exchange.is_same and len(exchange.answer.logprobs) >= len(exchange.expected.ids)
        for token, log_probs, value in zip(
            exchange.expected.ids,
            exchange.expected.log_probs,
            exchange.answer.logprobs,
            strict=False,
        )
    ]
    if not differences:
        return
    report.max_logprob_difference = max(differences)
    # `not <=` also reports NaN.
    if not report.max_logprob_difference <= _MAX_LOGPROB_DIFFERENCE:
        report.faults.append(
            "weights: the log-probability of a generated token differs by "
            f"{report.max_logprob_difference:.3g} nats, which is more than quantization causes"
        )


def _explain_prompts(
    report: ServerReport, model: LocalModel, exchanges: Sequence[_Exchange]
) -> list[_Exchange]:
    """Report template and special tokens as causes; return the differences that are left."""
    left: list[_Exchange] = []
    causes: dict[str, int] = {}
    for exchange in exchanges:
        count = exchange.answer.prompt_tokens
        is_other_prompt = count is not None and count != len(exchange.ids)
        if exchange.is_same and not is_other_prompt:
            continue
        cause = _prompt_cause(model, exchange)
        if cause is None and is_other_prompt:
            kind = "special tokens" if exchange.messages is None else "template"
            cause = f"{kind}: the server's prompt has other tokens than the model's"
        if cause is None:
            left.append(exchange)
        else:
            causes[cause] = causes.get(cause, 0) + 1
    kind = "texts" if exchanges and exchanges[0].messages is None else "chats"
    report.faults += [
        f"{cause} ({num} of {len(exchanges)} {kind})" for cause, num in causes.items()
    ]
    return left


def _prompt_cause(model: LocalModel, exchange: _Exchange) -> str | None:
    """Return the other prompt that explains an answer; None if none does."""
    if exchange.messages is None:
        variants = text_variants(model, exchange.ids)
    else:
        variants = chat_variants(model, exchange.messages)
    count = exchange.answer.prompt_tokens
    for what, ids in variants:
        if ids == exchange.ids or not ids or count not in (None, len(ids)):
            continue
        # If the answers agree, only the number of tokens shows the other prompt.
        is_explained = model.greedy(ids, NUM_TOKENS).text.strip() == exchange.answer.text.strip()
        if is_explained or (exchange.is_same and count is not None):
            kind = "special tokens" if "BOS" in what and "applies" not in what else "template"
            return f"{kind}: the server {what}"
    return None


def _explain_weights(
    report: ServerReport,
    exchanges: Sequence[_Exchange],
    gaps: Sequence[float],
    base: Path,
    device: torch.device,
) -> None:
    """Report weights or quantization as the cause of differences that no prompt explains.

    gaps: of each exchange, nats between the local and the server's first token that differs.
    """
    num = len(exchanges)
    model = LocalModel(base, device)
    num_base = sum(
        model.greedy(exchange.ids, NUM_TOKENS).text.strip() == exchange.answer.text.strip()
        for exchange in exchanges
    )
    if num_base == num:
        report.faults.append(
            f"weights: the server gives the answers of the base without the adapter ({num} of them)"
        )
    elif not max(gaps) <= _MAX_GAP:
        report.faults.append(
            f"weights: {num} answers differ, and the first token that differs is up to "
            f"{max(gaps):.3g} nats less likely than the merged model's, which is more than "
            "quantization causes"
        )
    else:
        report.explanation.append(
            f"Quantization or rounding: {num} answers differ from a token on that is at most "
            f"{max(gaps):.3g} nats less likely than the merged model's."
        )
