"""Render the result of each command with rich. Nothing here computes a result."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.data.findings import Finding
from qlora_cli.jobs.gguf_results import GgufResult
from qlora_cli.jobs.label_results import LabelEvalResult
from qlora_cli.jobs.pair_results import PairEvalResult
from qlora_cli.jobs.results import (
    DataResult,
    DoctorResult,
    EvalResult,
    MergeResult,
    PushResult,
    QuickstartResult,
    ReportResult,
    ShownRow,
    TrainResult,
    VerifyResult,
)
from qlora_cli.jobs.server_results import ServerResult
from qlora_cli.ui import memory
from qlora_cli.ui.memory_facts import counter_differences, planned_and_measured
from qlora_cli.ui.summary import summary
from qlora_cli.units import format_bytes, format_count

_STATE_STYLES = {"ok": "green", "limited": "yellow", "missing": "red"}
_BRACKETS = ("⟦", "⟧")
"""Enclose trained tokens. These characters are rare in real text."""


def train(result: TrainResult) -> RenderableType:
    """Render the memory tables, the run's folder, the losses and the speed."""
    tables = (memory.phase_table(result.ledger), memory.method_table(result.ledger))
    return Group(*tables, fact_lines(_training_facts(result)))


def report(result: ReportResult) -> RenderableType:
    """Render the memory tables, the notes and the summary of a run."""
    facts = summary(result) | counter_differences(result.ledger)
    for name, path in (("html", result.html), ("png", result.png)):
        if path is not None:
            facts[name] = str(path)
    tables = (memory.phase_table(result.ledger), memory.method_table(result.ledger))
    notes = [Text(f"! {note}", style="yellow") for note in result.ledger.notes]
    return Group(*tables, *notes, fact_lines(facts))


def merge(result: MergeResult) -> RenderableType:
    """Render the folder, dtype, base and size of a merged model."""
    return fact_lines(
        {
            "merged model": str(result.out),
            "dtype": f"{result.dtype} ({result.dtype_reason})",
            "base": result.base,
            "tensors": format_count(result.tensors),
            "size": format_bytes(result.bytes),
        }
    )


def verify(result: VerifyResult) -> RenderableType:
    """Render whether the verification passed, every fault and the measured differences."""
    verdict, style = ("passed", "bold green") if result.passed else ("FAILED", "bold red")
    parts = [Text(f"verification {verdict}", style=style)]
    parts += [Text(f"  {fault}") for fault in result.faults]
    if math.isnan(result.mean_kl):  # The two models could not be compared.
        return Group(*parts)
    compared = "rows" if result.greedy_tokens is None else "tokens"
    facts = {
        "largest logit difference": f"{result.max_logit_difference:.3g}",
        "mean KL divergence": f"{result.mean_kl:.3g} nats",
        "top-1 agreement": f"{result.top1_agreement:.2%} of {compared}",
    }
    if result.greedy_tokens is not None:
        agreement = f"the first {result.greedy_agreement} of {result.greedy_tokens} tokens agree"
        facts["greedy decoding"] = agreement
    explanation = [Text(f"  {sentence}") for sentence in result.explanation]
    return Group(*parts, fact_lines(facts), *explanation)


def verification(result: VerifyResult | ServerResult | GgufResult) -> RenderableType:
    """Render the result of `qlora verify`, of the files, of a server or of GGUF files."""
    if isinstance(result, GgufResult):
        return verify_gguf(result)
    return verify(result) if isinstance(result, VerifyResult) else verify_server(result)


def verify_gguf(result: GgufResult) -> RenderableType:
    """Render each GGUF file's differences from the merged model."""
    verdict, style = ("passed", "bold green") if result.passed else ("FAILED", "bold red")
    parts = [Text(f"verification of GGUF files {verdict}", style=style)]
    parts += [Text(f"  {fault}") for fault in result.faults]
    table = Table(box=box.SIMPLE)
    names = ("type", "size", "mean KL (nats)", "largest logit difference", "top-1", "same answers")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    for file in result.files:
        table.add_row(
            file.type,
            format_bytes(file.bytes),
            f"{file.mean_kl:.3g}",
            f"{file.max_logit_difference:.3g}",
            f"{file.top1_agreement:.1%}",
            f"{file.same_answers} of {file.answers}",
        )
    return Group(*parts, table)


def verify_server(result: ServerResult) -> RenderableType:
    """Render whether a server gives the merged model's answers, and every cause if it does not."""
    verdict, style = ("passed", "bold green") if result.passed else ("FAILED", "bold red")
    parts = [Text(f"verification of {result.model} at {result.server} {verdict}", style=style)]
    parts += [Text(f"  {fault}") for fault in result.faults]
    facts = {"greedy answers to texts": f"{result.same_texts} of {result.texts} are the same"}
    if result.chats:
        facts["greedy answers to chats"] = f"{result.same_chats} of {result.chats} are the same"
    explanation = [Text(f"  {sentence}") for sentence in result.explanation]
    return Group(*parts, fact_lines(facts), *explanation)


def push(result: PushResult) -> RenderableType:
    """Render where the files of an upload are."""
    where = f"uploaded to {result.url}" if result.url else f"nothing uploaded; see {result.folder}"
    return fact_lines(
        {
            result.repo: where,
            "files": f"{len(result.files)}, {format_bytes(result.bytes)}",
            "verification": "passed" if result.verified else "none",
        }
    )


def evaluation(result: EvalResult | PairEvalResult | LabelEvalResult) -> RenderableType:
    """Render loss, perplexity and accuracy over trained tokens, or another task's metrics."""
    if isinstance(result, LabelEvalResult):
        metrics = {name: f"{value:.4f}" for name, value in result.metrics.items()}
        rows = format_count(result.rows)
        return fact_lines({"loss": f"{result.loss:.4f} per row", **metrics, "rows": rows})
    if isinstance(result, PairEvalResult):
        return fact_lines(
            {
                "loss": f"{result.loss:.4f} per pair",
                "accuracy": f"{result.accuracy:.2%} of pairs have a higher reward for the chosen "
                "answer",
                "margin": f"{result.margin:.4f}",
                "rewards": f"chosen {result.reward_chosen:.4f}, rejected "
                f"{result.reward_rejected:.4f}",
                "pairs": format_count(result.pairs),
            }
        )
    return fact_lines(
        {
            "loss": f"{result.loss:.4f} nats per token",
            "perplexity": f"{result.perplexity:.4g}",
            "accuracy": f"{result.accuracy:.2%} of tokens (top-1)",
            "tokens": format_count(result.tokens),
        }
    )


def data(result: DataResult) -> RenderableType:
    """Render the totals of a data file, the findings and the rows to show."""
    share = result.trained_tokens / max(result.tokens, 1)
    has_labels = result.format == "classification"
    trained = "" if has_labels else f", {share:.1%} of them trained"
    facts = {
        "rows": f"{format_count(result.rows)} ({result.format})",
        "sequences": format_count(result.sequences),
        "tokens": f"{format_count(result.tokens)}{trained}",
        "longest row": f"{format_count(result.longest_row)} tokens",
    }
    if result.held_out_rows:
        facts["held-out rows"] = format_count(result.held_out_rows)
    if result.updates:
        facts["updates"] = format_count(result.updates)
    findings = [_finding(found) for found in result.findings]
    notes = (*result.notes, *([result.warning] if result.warning else []))
    lines = [Text(f"! {note}", style="yellow") for note in notes]
    opening, closing = _BRACKETS
    legend = Text(f"Trained tokens are green and between {opening} and {closing}.", style="dim")
    rows = [_row(shown) for shown in result.shown]
    legends = [legend] if rows and not has_labels else []
    return Group(fact_lines(facts), *findings, *lines, *legends, *rows)


def _finding(found: Finding) -> RenderableType:
    """Render a finding, with its code, and what to do."""
    style = "bold red" if found.severity == "error" else "yellow"
    lead = (f"{found.severity} [{found.code}]: ", style)
    return Text.assemble(lead, found.text, (f"\n  {found.remedy}", "dim"))


def _row(shown: ShownRow) -> RenderableType:
    """Render the tokens of a row. Trained ones are green and, without color, in brackets."""
    text = Text()
    inside = False
    for token, trained in shown.tokens:
        if trained != inside:
            text.append(_BRACKETS[not trained], style="bold green")
            inside = trained
        text.append(token, style="green" if trained else "dim")
    if inside:
        text.append(_BRACKETS[1], style="bold green")
    return Group(Text(f"\n{shown.origin}", style="bold"), text)


def doctor(result: DoctorResult) -> RenderableType:
    """Render one line per check, with a hint if something does not work."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in result.checks:
        detail = Text(check.detail)
        if check.hint:
            detail.append(f"\n{check.hint}", style="dim")
        style = _STATE_STYLES.get(check.state, "")
        table.add_row(Text(check.state, style=style), check.name, detail)
    return table


def quickstart(result: QuickstartResult) -> RenderableType:
    """Render memory, losses, verification and the text generated before and after training."""
    facts = _training_facts(result.train) | {
        "held-out loss": f"{result.loss_before:.3f} before training, {result.loss_after:.3f} after",
        "merged model": f"{result.merge.out} ({format_bytes(result.merge.bytes)}, "
        f"{result.merge.dtype})",
    }
    samples = [_sample(*sample) for sample in result.samples]
    return Group(
        memory.method_table(result.train.ledger),
        fact_lines(facts),
        verify(result.verify),
        *samples,
    )


def _training_facts(result: TrainResult) -> dict[str, str]:
    facts = {
        "run": str(result.run),
        "steps": format_count(result.steps),
        "train loss": f"{result.train_loss:.3f}",
        "speed": f"{result.tokens_per_second:,.0f} tokens/s",
    }
    if result.eval_loss is not None:
        facts["held-out loss"] = _before_and_after(result.eval_loss_before, result)
    facts |= {f"held-out {name}": f"{value:.4f}" for name, value in result.metrics.items()}
    if peak := planned_and_measured(result.ledger):
        facts["peak memory"] = peak
    return facts


def _before_and_after(before: float | None, result: TrainResult) -> str:
    """Return the held-out loss before and after training, and the step of the exported weights."""
    text = f"{result.eval_loss:.3f}"
    if before is not None:
        text = f"{before:.3f} before training, {text} after"
    if result.best_step is not None and result.best_step != result.steps:
        text += f" (the exported weights, of step {result.best_step:,})"
    return text


def _sample(prompt: str, before: str, after: str) -> RenderableType:
    """Render a prompt with the text generated before and after training."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, show_lines=False)
    for name, text in (("prompt", prompt), ("before", before), ("after", after)):
        table.add_row(Text(name, style="bold"), Text(text.strip()))
    return table


def fact_lines(facts: Mapping[str, str]) -> RenderableType:
    """Render one line per fact: label and text.

    Not a table, because a table would break a long path over several lines, and then the path
    cannot be copied.
    """
    width = max(map(len, facts)) + 2
    lines = (Text.assemble((f"{label:{width}}", "bold"), text) for label, text in facts.items())
    return Text("\n").join(lines)
