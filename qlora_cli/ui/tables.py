"""Each command's result as something rich can print. Nothing here computes a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_cli.jobs.results import (
    DataResult,
    DoctorResult,
    EvalResult,
    GenerateResult,
    MergeResult,
    QuickstartResult,
    ReportResult,
    ShownRow,
    TrainResult,
    VerifyResult,
)
from qlora_cli.memory.ledger import Ledger
from qlora_cli.ui import memory
from qlora_cli.ui.summary import summary
from qlora_cli.units import format_bytes, format_count

_STATES = {"ok": "green", "limited": "yellow", "missing": "red"}
_MARKS = ("⟦", "⟧")
"""Around what is trained on; rare enough not to be taken for the row's own text."""


def train(result: TrainResult) -> RenderableType:
    """What was trained, where it lies, and the memory it took."""
    tables = (memory.phase_table(result.ledger), memory.before_and_after(result.ledger))
    return Group(*tables, fact_lines(_trained(result)))


def report(result: ReportResult) -> RenderableType:
    """A finished or running job: its memory, its last step, its choices."""
    facts = summary(result) | memory.differences(result.ledger)
    for name, path in (("html", result.html), ("png", result.png)):
        if path is not None:
            facts[name] = str(path)
    tables = (memory.phase_table(result.ledger), memory.before_and_after(result.ledger))
    notes = [Text(f"! {note}", style="yellow") for note in result.ledger.notes]
    return Group(*tables, *notes, fact_lines(facts))


def merge(result: MergeResult) -> RenderableType:
    """Where the merged model lies and what it is."""
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
    """Passed or not, by how much, and every fault."""
    word, style = ("passed", "bold green") if result.passed else ("FAILED", "bold red")
    parts = [Text(f"verification {word}", style=style)]
    parts += [Text(f"  {fault}") for fault in result.faults]
    if math.isnan(result.mean_kl):  # The two models could not be run side by side.
        return Group(*parts)
    facts = {
        "largest logit difference": f"{result.max_logit_difference:.3g}",
        "mean KL divergence": f"{result.mean_kl:.3g} nats",
        "same first choice": f"{result.top1_agreement:.2%} of tokens",
    }
    if result.greedy_tokens is not None:
        told = f"the first {result.greedy_agreement} of {result.greedy_tokens}"
        facts["same greedy tokens"] = told
    return Group(*parts, fact_lines(facts))


def evaluation(result: EvalResult) -> RenderableType:
    """Loss, perplexity and accuracy over the trained tokens of the rows."""
    return fact_lines(
        {
            "loss": f"{result.loss:.4f} nats a token",
            "perplexity": f"{result.perplexity:.4g}",
            "accuracy": f"{result.accuracy:.2%} of tokens predicted first",
            "tokens": format_count(result.tokens),
        }
    )


def generation(result: GenerateResult) -> RenderableType:
    """The text and nothing else, in its own lines; with several answers, whose each is."""
    if len(result.answers) == 1:
        return Text(result.text)
    shown = [Text(f"{name}:\n{text}") for name, text in result.answers.items()]
    return Text("\n\n").join(shown)


def data(result: DataResult) -> RenderableType:
    """Totals, what is odd about the rows, and some of them as the model sees them."""
    share = result.trained_tokens / max(result.tokens, 1)
    facts = {
        "rows": f"{format_count(result.rows)} ({result.format})",
        "sequences": format_count(result.sequences),
        "tokens": f"{format_count(result.tokens)}, {share:.1%} trained on",
        "longest row": f"{format_count(result.longest_row)} tokens",
    }
    findings = [Text(f"! {finding}", style="yellow") for finding in result.findings]
    key = [Text("Trained tokens are green and stand between ⟦ and ⟧.", style="dim")]
    shown = [row(one) for one in result.shown]
    return Group(fact_lines(facts), *findings, *(key if shown else []), *shown)


def row(shown: ShownRow) -> RenderableType:
    """A row's tokens; what is trained on is marked by colour and, for eyes without, by brackets."""
    text = Text()
    inside = False
    for token, trained in shown.tokens:
        if trained != inside:
            text.append(_MARKS[not trained], style="bold green")
            inside = trained
        text.append(token, style="green" if trained else "dim")
    if inside:
        text.append(_MARKS[1], style="bold green")
    return Group(Text(f"\n{shown.origin}", style="bold"), text)


def doctor(result: DoctorResult) -> RenderableType:
    """One line a check, with what to do where something is not ok."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in result.checks:
        told = Text(check.detail)
        if check.hint:
            told.append(f"\n{check.hint}", style="dim")
        table.add_row(Text(check.state, style=_STATES.get(check.state, "")), check.name, told)
    return table


def quickstart(result: QuickstartResult) -> RenderableType:
    """The whole way: memory, loss, proof, and the same prompts before and after."""
    facts = _trained(result.train) | {
        "held-out loss": f"{result.loss_before:.3f} before, {result.loss_after:.3f} after",
        "merged model": f"{result.merge.out} ({format_bytes(result.merge.bytes)}, "
        f"{result.merge.dtype})",
    }
    samples = [_sample(*sample) for sample in result.samples]
    return Group(
        memory.before_and_after(result.train.ledger),
        fact_lines(facts),
        verify(result.verify),
        *samples,
    )


def _trained(result: TrainResult) -> dict[str, str]:
    facts = {
        "run": str(result.run),
        "steps": format_count(result.steps),
        "train loss": f"{result.train_loss:.3f}",
        "speed": f"{result.tokens_per_second:,.0f} tokens/s",
    }
    if result.eval_loss is not None:
        facts["held-out loss"] = f"{result.eval_loss:.3f}"
    return facts | _planned(result.ledger)


def _planned(ledger: Ledger) -> dict[str, str]:
    told = memory.planned_against_measured(ledger)
    return {} if told is None else {"peak": told}


def _sample(prompt: str, before: str, after: str) -> RenderableType:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, show_lines=False)
    for name, text in (("prompt", prompt), ("before", before), ("after", after)):
        table.add_row(Text(name, style="bold"), Text(text.strip()))
    return table


def fact_lines(facts: Mapping[str, str]) -> RenderableType:
    """One line a fact; no table, because a path that is broken over lines cannot be copied."""
    width = max(map(len, facts)) + 2
    lines = (Text.assemble((f"{name:{width}}", "bold"), told) for name, told in facts.items())
    return Text("\n").join(lines)
