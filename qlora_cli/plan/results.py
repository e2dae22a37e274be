"""Results that the planner derives from dry runs, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """A change of the recipe and its planned effect.

    change: one or more overrides, such as `train.micro_batch=1`. saves_bytes: reduction of the
    peak; negative if the change needs more. peak_bytes: planned peak after the change. fits:
    whether the job then fits the device. limit: for the largest size that fits, what limits it:
    "model" (its positions), "memory" (of the device) or "search" (its upper end); else empty.
    seconds_per_token: estimated time of training after the change. time_ratio: the same divided by
    that of the unchanged recipe. time_source: of the estimate.
    """

    change: str
    saves_bytes: int
    peak_bytes: int
    fits: bool
    limit: str = ""
    seconds_per_token: float = 0.0
    time_ratio: float = 1.0
    time_source: str = ""


@dataclass(frozen=True)
class Chosen:
    """A setting that the plan chose, its value and the reason."""

    key: str
    value: int
    reason: str


@dataclass(frozen=True)
class PolicySummary:
    """What the blocks of a planned job do with their activations.

    blocks: number of blocks. recomputed: number of first blocks that are recomputed in the backward
    pass; the others keep their activations. recomputed_share: operations that are done twice,
    divided by those of a step without recomputation. copied_inputs, copied_weights: bytes that a
    step copies between host memory and the device because of `train.offload_inputs` and of
    `base.residency: host`, if all its micro-batches are as large as the largest one.
    """

    blocks: int
    recomputed: int
    recomputed_share: float
    copied_inputs: int = 0
    copied_weights: int = 0


@dataclass(frozen=True)
class LinkTime:
    """The copies of a step. All times are in seconds.

    contents: what is copied, and the direction. bytes_per_step: of the copies, at most.
    copy_seconds: of all copies of a step. compute_seconds: of a step without them. step_seconds: of
    a step in which they overlap. source: of the link's speed.
    """

    contents: str
    bytes_per_step: int
    bytes_per_second: float
    copy_seconds: float
    compute_seconds: float
    step_seconds: float
    source: str

    def text(self, copied: str, copying: str, computing: str) -> str:
        """Return one sentence. copied: the bytes. copying, computing: the times, as text."""
        hidden = self.copy_seconds <= self.compute_seconds
        effect = (
            "the copies can be hidden behind the computation"
            if hidden
            else "the copies decide; a larger micro-batch or longer rows compute more per copy"
        )
        return (
            f"A step copies up to {copied} of {self.contents}, which takes {copying} "
            f"({self.source}), and computes for {computing}: {effect}."
        )


@dataclass(frozen=True)
class TimeEstimate:
    """The time that training takes, in seconds; None if it is not known.

    source: of the figures. copies: of a base that is not on the device.
    """

    step_seconds: float | None = None
    total_seconds: float | None = None
    source: str = "not measured"
    copies: LinkTime | None = None


@dataclass(frozen=True)
class DiskNeeds:
    """Files that a job writes, in bytes.

    checkpoint_bytes: one checkpoint, with the optimizer states. run_bytes: the run's folder with as
    many checkpoints as `train.keep_checkpoints` keeps, and one for the best step. merged_bytes: a
    merged model in 16 bit.
    """

    checkpoint_bytes: int
    run_bytes: int
    merged_bytes: int


@dataclass(frozen=True)
class Line:
    """One line of the LoRA paper's arithmetic.

    unit: "B" (bytes), "x" (a ratio) or "". assumption: what the value counts, in words.
    """

    name: str
    value: float
    unit: str
    assumption: str


@dataclass(frozen=True)
class Compared:
    """The peak memory of one method, on the same data and batch size.

    method: name of the adapter method, or "full". bits: bits of the base weights; None for the mix
    of `base.overrides`. at_peak: category -> bytes. ratio: the peak of full fine-tuning divided by
    this peak.
    """

    method: str
    bits: int | None
    peak_bytes: int
    at_peak: dict[str, int]
    ratio: float
