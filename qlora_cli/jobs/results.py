"""The result of each job, as dataclasses. `to_dict` is the JSON object that `--json` prints.

The names of the fields are keys of these objects, which other programs read. This module imports no
torch, because `ui/` imports it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.data.findings import Finding
from qlora_cli.jobs.training_length import TrainingLength
from qlora_cli.memory.ledger import Ledger
from qlora_cli.memory.timeline import PhaseTrace
from qlora_cli.plan.results import (
    Advice,
    Chosen,
    Compared,
    DiskNeeds,
    Line,
    PolicySummary,
    TimeEstimate,
)


class Result:
    """Base class of the results. `to_dict` returns the object that `--json` prints."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values: paths become text, ledgers and results objects."""
        assert hasattr(self, "__dataclass_fields__")
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: _plain(value) for name, value in content.items()}


@dataclass(frozen=True)
class PlanResult(Result):
    """Result of `qlora plan`.

    usable_bytes: memory of the device that the job may use. floor_bytes: lower bound of the job's
    memory. arithmetic: the same by the LoRA paper's formulas. seconds: time that planning took.
    notes: how the figures were obtained, one sentence each. steps: optimizer steps, None if they
    depend on the rows and these cannot be read. length: of the job. length_problem: why the rows
    cannot be read though their files exist. data_problem: which file is missing; None if none is.
    row_limit: the base's positions if packed sequences are longer; rows are not longer than these.
    choices: settings that the plan chose. activation_policy: which blocks are recomputed.
    """

    device: dict[str, Any]
    ledger: Ledger
    fits: bool
    usable_bytes: int
    floor_bytes: int
    advice: tuple[Advice, ...]
    compare: tuple[Compared, ...]
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    arithmetic: tuple[Line, ...]
    notes: tuple[str, ...]
    seconds: float
    steps: int | None = None
    length: TrainingLength | None = None
    length_problem: str | None = None
    time: TimeEstimate = field(default_factory=TimeEstimate)
    disk: DiskNeeds | None = None
    data_problem: str | None = None
    row_limit: int | None = None
    choices: tuple[Chosen, ...] = ()
    activation_policy: PolicySummary | None = None


@dataclass(frozen=True)
class TrainResult(Result):
    """Result of `qlora train`.

    steps: optimizer steps that were done. train_loss: mean loss of the last steps. eval_loss: loss
    of the exported weights on the held-out set; None without one. best_step: the step of the
    exported weights if they were evaluated. eval_loss_before: held-out loss before the first step.
    metrics: the task's other held-out metrics of the exported weights.
    """

    run: Path
    steps: int
    train_loss: float
    eval_loss: float | None
    tokens_per_second: float
    ledger: Ledger
    best_step: int | None = None
    eval_loss_before: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeResult(Result):
    """Result of `qlora merge`.

    base: "original" or "dequantized". bytes: size of the tensors. dtype_reason: why this dtype.
    """

    out: Path
    dtype: str
    base: str
    tensors: int
    bytes: int
    dtype_reason: str


@dataclass(frozen=True)
class VerifyResult(Result):
    """Result of `qlora verify`.

    faults: every difference that is not allowed, one line each. greedy_tokens: number of tokens
    that the trained model generated greedily. greedy_agreement: number of leading ones that the
    merged model generates too; both are None if the models could not be compared, and then the
    other figures are NaN. explanation: what the figures include and which of them are checked, one
    sentence each.
    """

    passed: bool
    max_logit_difference: float
    mean_kl: float
    top1_agreement: float
    faults: tuple[str, ...]
    greedy_agreement: int | None
    greedy_tokens: int | None
    explanation: tuple[str, ...] = ()


@dataclass(frozen=True)
class PushResult(Result):
    """Result of `qlora push`.

    url: address of the repository; None in a dry run. folder: folder of a dry run, else None.
    files: paths in the repository. bytes: their size. verified: whether a verification of this
    merged model passed; False for an adapter.
    """

    repo: str
    url: str | None
    folder: Path | None
    files: tuple[str, ...]
    bytes: int
    verified: bool


@dataclass(frozen=True)
class EvalResult(Result):
    """Result of `qlora eval`.

    loss: mean nats per trained token. tokens: number of trained tokens. accuracy: share of trained
    tokens that are the model's top-1 prediction.
    """

    loss: float
    perplexity: float
    tokens: int
    accuracy: float


@dataclass(frozen=True)
class GenerateResult(Result):
    """Result of `qlora generate`.

    answers: name of an adapter -> generated text, in the order of generation; `run` is a run's own
    adapter, `base` is the model without an adapter. text: the first of these texts. format: how the
    prompt was formatted: "chat", "alpaca" or "plain".
    """

    prompt: str
    text: str
    answers: dict[str, str]
    format: str = "plain"


@dataclass(frozen=True)
class ReportResult(Result):
    """Result of `qlora report`.

    run: the content of run.json. metrics: the lines of metrics.jsonl that are of optimizer steps.
    evaluations: those of evaluations, with the keys `step` (0 before training) and `eval_loss`.
    timeline: memory over time, for the figures. html, png: files to write; None for none.
    """

    run: dict[str, Any]
    ledger: Ledger
    metrics: tuple[dict[str, Any], ...]
    timeline: tuple[PhaseTrace, ...] = ()
    html: Path | None = None
    png: Path | None = None
    evaluations: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object, without the timeline, which is in timeline.json."""
        content = super().to_dict() | {"eval_loss": self.eval_loss}
        return {name: value for name, value in content.items() if name != "timeline"}

    @property
    def eval_loss(self) -> float | None:
        """The held-out loss of the exported weights or, in an unfinished run, the last one."""
        exported = (self.run.get("result") or {}).get("eval_loss")
        trained = [line["eval_loss"] for line in self.evaluations if line["step"] > 0]
        return exported if exported is not None else next(reversed(trained), None)


@dataclass(frozen=True)
class Check:
    """One line of `qlora doctor`.

    state: "ok", "limited" or "missing". hint: what to do; None if nothing is to be done.
    """

    name: str
    state: str
    detail: str
    hint: str | None = None


@dataclass(frozen=True)
class DoctorResult(Result):
    """Result of `qlora doctor`: what works on this machine and what does not."""

    checks: tuple[Check, ...]


@dataclass(frozen=True)
class ShownRow:
    """A row as the model sees it.

    origin: file and line. tokens: (text of the token, whether it is trained).
    """

    origin: str
    tokens: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class DataResult(Result):
    """Result of `qlora data`.

    longest_row: in tokens. shown: the requested rows, token by token. stops: whether a finding
    stops training. updates: optimizer steps. warning: what to change if they are too few to learn.
    """

    rows: int
    sequences: int
    tokens: int
    trained_tokens: int
    longest_row: int
    format: str
    shown: tuple[ShownRow, ...]
    findings: tuple[Finding, ...]
    stops: bool = False
    notes: tuple[str, ...] = ()
    held_out_rows: int = 0
    dropped: int = 0
    long_rows: dict[str, Any] = field(default_factory=dict)
    sources: tuple[dict[str, Any], ...] = ()
    updates: int = 0
    warning: str | None = None


@dataclass(frozen=True)
class QuickstartResult(Result):
    """Result of `qlora quickstart`: the result of each job, and generated samples.

    loss_before, loss_after: loss on the held-out set before and after training.
    """

    plan: PlanResult
    train: TrainResult
    merge: MergeResult
    verify: VerifyResult
    loss_before: float
    loss_after: float
    samples: tuple[tuple[str, str, str], ...] = field(default=())
    """(prompt, text generated before training, text generated after training)."""


def _plain(value: Any) -> Any:
    if isinstance(value, Result | Ledger):
        return value.to_dict()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    return value
