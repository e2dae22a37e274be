"""What each job returns: the JSON objects of the contract, as types. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.memory.ledger import Ledger
from qlora_cli.memory.timeline import PhaseTrace
from qlora_cli.plan.results import Advice, Line


class Result:
    """A job's outcome; `to_dict` is the object that `--json` prints."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: paths become text, ledgers their own object."""
        assert hasattr(self, "__dataclass_fields__")
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: _plain(value) for name, value in content.items()}


@dataclass(frozen=True)
class Compared:
    """One method's worst instant on the same data and batch.

    method: full | lora. ratio: full fine-tuning's peak to this one.
    """

    method: str
    bits: int
    peak_bytes: int
    at_peak: dict[str, int]
    ratio: float


@dataclass(frozen=True)
class PlanResult(Result):
    """`qlora plan`. usable_bytes: of the device. notes: what is a model, what a bound."""

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


@dataclass(frozen=True)
class TrainResult(Result):
    """`qlora train`. train_loss: mean of the last steps; eval_loss: None without held-out rows."""

    run: Path
    steps: int
    train_loss: float
    eval_loss: float | None
    tokens_per_second: float
    ledger: Ledger


@dataclass(frozen=True)
class MergeResult(Result):
    """`qlora merge`. base: original | dequantized. dtype_reason: why this dtype, in words."""

    out: Path
    dtype: str
    base: str
    tensors: int
    bytes: int
    dtype_reason: str


@dataclass(frozen=True)
class VerifyResult(Result):
    """`qlora verify`. faults: what differs, in words, one line each.

    greedy_agreement: of the trained model's `greedy_tokens` greedy tokens, how many the merged one
    says too, up to the first difference; None where the two could not be asked.
    """

    passed: bool
    max_logit_difference: float
    mean_kl: float
    top1_agreement: float
    faults: tuple[str, ...]
    greedy_agreement: int | None
    greedy_tokens: int | None


@dataclass(frozen=True)
class EvalResult(Result):
    """`qlora eval`. loss: mean nats a trained token; accuracy: share of them predicted first."""

    loss: float
    perplexity: float
    tokens: int
    accuracy: float


@dataclass(frozen=True)
class GenerateResult(Result):
    """`qlora generate`. answers: who answered -> the text, in turn; text: the first of them.

    Who is an adapter's name, `run` for a run's own adapter, `base` for a model without one.
    """

    prompt: str
    text: str
    answers: dict[str, str]


@dataclass(frozen=True)
class ReportResult(Result):
    """`qlora report`. run: the content of run.json; metrics: the lines of metrics.jsonl.

    timeline: for the figures; the object that is printed leaves it to timeline.json.
    """

    run: dict[str, Any]
    ledger: Ledger
    metrics: tuple[dict[str, Any], ...]
    timeline: tuple[PhaseTrace, ...] = ()
    html: Path | None = None
    png: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Without the timeline's thousands of figures."""
        return {name: value for name, value in super().to_dict().items() if name != "timeline"}


@dataclass(frozen=True)
class Check:
    """One line of `qlora doctor`. state: ok | limited | missing."""

    name: str
    state: str
    detail: str
    hint: str | None = None


@dataclass(frozen=True)
class DoctorResult(Result):
    """What works on this machine and what does not."""

    checks: tuple[Check, ...]


@dataclass(frozen=True)
class ShownRow:
    """A row as the model will see it. tokens: (text of the token, is it trained on)."""

    origin: str
    tokens: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class DataResult(Result):
    """`qlora data`. findings: what the doctor of data noticed, one sentence each."""

    rows: int
    sequences: int
    tokens: int
    trained_tokens: int
    longest_row: int
    format: str
    shown: tuple[ShownRow, ...]
    findings: tuple[str, ...]


@dataclass(frozen=True)
class QuickstartResult(Result):
    """`qlora quickstart`: each stage's own result, and samples of the same prompts."""

    plan: PlanResult
    train: TrainResult
    merge: MergeResult
    verify: VerifyResult
    loss_before: float
    loss_after: float
    samples: tuple[tuple[str, str, str], ...] = field(default=())
    """(prompt, text before training, text after)."""


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
