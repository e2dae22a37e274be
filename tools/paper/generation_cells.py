"""Experiments `e2e` (BLEU and chrF of generated texts) and `instruct` (a real instruct model)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper_cells import Cell, CellError, Experiment, Workspace

BEAMS = 10
"""As in the paper, for E2E."""
_ANSWER_TOKENS = {"e2e": 80, "sums": 24}
_FULL = ("adapter.method=full", "train.lr=1e-4")
_NUMBER = re.compile(r"-?\d+")


def measure_e2e(cell: Cell, space: Workspace) -> dict[str, Any]:
    """Train, answer each meaning of the test set by beam search, and score against all references.

    Raises CellError if sacrebleu is not installed.
    """
    corpus_scores([""], [[""]])
    run = f"runs/e2e-{cell.name}-{cell.seed}"
    settings = [*cell.settings, f"train.seed={cell.seed}"]
    if space.small:
        settings += ["train.epochs=", "train.steps=2", "data.seq_len=64"]
    trained = space.train("e2e", run, *settings)
    beams = 2 if space.small else BEAMS
    answers = _answers(run, "e2e", space, "--beams", str(beams))
    lines = (space.folder / "e2e" / "references.jsonl").read_text("utf-8").splitlines()
    references = [json.loads(line) for line in lines][: len(answers)]
    result = {
        "eval_loss": trained["eval_loss"],
        "steps": trained["steps"],
        "texts": len(answers),
        "beams": beams,
        **corpus_scores([answer["answer"] for answer in answers], references),
    }
    space.discard(run)
    return result


def corpus_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return BLEU and chrF in percent. references: all that belong to an answer, at least one.

    Raises CellError if sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise CellError("BLEU and chrF need the package sacrebleu") from error
    most = max(map(len, references))
    # sacrebleu takes one list for each place; None where an answer has fewer references.
    columns = [[row[n] if n < len(row) else None for row in references] for n in range(most)]
    return {
        "bleu": sacrebleu.corpus_bleu(answers, columns).score,
        "chrf": sacrebleu.corpus_chrf(answers, columns).score,
    }


def measure_instruct(cell: Cell, space: Workspace) -> dict[str, Any]:
    """Train on the rows that the setting `rows` names, and return the held-out loss.

    With rows=sums also the share of held-out sums whose last number is right. The cell `base` is
    not trained.
    """
    settings = [setting for setting in cell.settings if not setting.startswith("rows=")]
    rows = cell.options()["rows"]
    if cell.name.startswith("base"):
        score = space.qlora("eval", "smollm2", "--data", f"{rows}/held-out.jsonl")
        return {"eval_loss": score["loss"], **_exact_match("smollm2", rows, space)}
    run = f"runs/instruct-{cell.name.replace(', ', '-').replace(' ', '-')}-{cell.seed}"
    data = [f"data.train={rows}/train.jsonl", f"data.eval={rows}/held-out.jsonl"]
    small = ["train.steps=2", "train.grad_accum=1", "data.seq_len=128"] if space.small else []
    words = [*settings, *data, *small, f"train.seed={cell.seed}"]
    trained = space.train("instruct", run, *words)
    result = {
        "eval_loss": trained["eval_loss"],
        "eval_loss_before": trained["eval_loss_before"],
        "steps": trained["steps"],
        "peak_bytes": trained["ledger"]["measured_peak_bytes"],
        **_exact_match(run, rows, space),
    }
    space.discard(run)
    return result


def _exact_match(where: str, rows: str, space: Workspace) -> dict[str, Any]:
    if rows != "sums":
        return {}
    answers = _answers(where, rows, space)
    right = sum(last_number(a["answer"]) == last_number(a["reference"]) for a in answers)
    return {"exact_match": right / len(answers), "questions": len(answers)}


def last_number(text: str) -> int | None:
    """Return the last whole number in a text, None if there is none."""
    found = _NUMBER.findall(text)
    return int(found[-1]) if found else None


def _answers(where: str, rows: str, space: Workspace, *options: str) -> list[dict[str, str]]:
    """Return what `qlora eval --generate` writes for the test rows of a data set."""
    file = Path("runs") / f"answers-{rows}.jsonl"
    (space.folder / file).parent.mkdir(exist_ok=True)
    (space.folder / file).unlink(missing_ok=True)
    data = f"{rows}/{'test' if rows == 'e2e' else 'held-out'}.jsonl"
    tokens = str(_ANSWER_TOKENS[rows])
    words = ["--data", data, "--generate", str(file), "--max-new-tokens", tokens, *options]
    space.qlora("eval", where, *words)
    lines = (space.folder / file).read_text("utf-8").splitlines()
    (space.folder / file).unlink()
    return [json.loads(line) for line in lines]


_E2E_CELLS = (
    Cell("lora", minutes=25.0),
    Cell("full", ("adapter.method=full", "train.lr=1e-3"), minutes=25.0),
    Cell("nf4", ("base.bits=4",), minutes=30.0),
    *Cell("lora", minutes=25.0).with_seeds(3)[1:],
)
E2E = Experiment("e2e", ("books-gpt2", "e2e"), _E2E_CELLS, _E2E_CELLS[:1], measure_e2e)
_ALL_LINEARS = ("adapter.targets=all", "adapter.rank=16", "train.lr=1e-3")
_KINDS = {
    "base": (),
    "nf4": ("base.bits=4",),
    "lora": (),
    "full": _FULL,
    "lora, all linears": _ALL_LINEARS,
    "lora with a prefix, all linears": ("adapter.prefix=16", *_ALL_LINEARS),
    "nf4, all linears": ("base.bits=4", *_ALL_LINEARS),
    "nf4 with measured scales, all linears": ("base.bits=4", "base.scales=measured", *_ALL_LINEARS),
}
_INSTRUCT_CELLS = tuple(
    Cell(f"{name}, {rows}", (*settings, f"rows={rows}"), minutes=5.0 if name == "base" else 15.0)
    for rows in ("sums", "alpaca")
    for name, settings in _KINDS.items()
)
INSTRUCT = Experiment(
    "instruct",
    ("smollm2", "sums", "alpaca"),
    _INSTRUCT_CELLS,
    _INSTRUCT_CELLS[1:2],
    measure_instruct,
)
