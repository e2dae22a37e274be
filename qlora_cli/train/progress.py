"""The steps that a process has done, and how long they took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StepTimes:
    """Sums over steps of one kind. tokens: all tokens, with or without a target."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Add one step."""
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds


@dataclass
class Progress:
    """The steps that this process has done.

    first: the first step, which is slower because kernels and memory are initialized. tracked,
    plain: later steps with and without the memory tracker, which slows a step down. is_in_step: a
    step is being computed now. parts: number of parts that each micro-batch is divided into.
    """

    first: StepTimes = field(default_factory=StepTimes)
    tracked: StepTimes = field(default_factory=StepTimes)
    plain: StepTimes = field(default_factory=StepTimes)
    is_in_step: bool = False
    parts: int = 1

    def add(self, tokens: int, seconds: float, tracked: bool) -> None:
        """Add one step. tracked: whether the memory tracker was on."""
        later = self.tracked if tracked else self.plain
        (later if self.steps else self.first).add(tokens, seconds)

    @property
    def steps(self) -> int:
        """Number of steps of all kinds."""
        return self.first.steps + self.tracked.steps + self.plain.steps

    @property
    def tokens_per_second(self) -> float:
        """Speed of plain steps, else of tracked ones, else of the first; 0 without a step."""
        for times in (self.plain, self.tracked, self.first):
            if times.seconds:
                return times.tokens / times.seconds
        return 0.0
