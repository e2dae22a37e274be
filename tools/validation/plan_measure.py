"""One configuration, planned and run: what the planner says and what other instruments see."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_facts import is_fake_gpu, version_of
from plan_cases import Case, MadeSource, matrix_values, window_of
from plan_estimates import accelerate_adam, accelerate_load, litgpt_training
from profiler_peak import Judge

from qlora_cli.device import DeviceProfile
from qlora_cli.errors import QloraError
from qlora_cli.memory.device import inspect_device, profile_of
from qlora_cli.memory.host import host_capacity_bytes
from qlora_cli.models.build import ModelRequest
from qlora_cli.nn.quant import scale_codebook
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.train.runtime import setup_device
from qlora_cli.train.state import State, build_state
from qlora_cli.train.step import train_step

PHASES = ("load", "first_step", "step", "eval")


def planned(case: Case, facts: DeviceProfile) -> MemoryPlan:
    """What the planner says of this case on this device."""
    config = case.config()
    recipe, _ = resolve(case.recipe(), facts)
    window = window_of(recipe, config)
    return dry_run(recipe, config, facts, window, window[:1])


@dataclass(frozen=True)
class Run:
    """One case on a real device, with its parts in the order in which a job does them."""

    case: Case
    recipe: Recipe
    config: Any
    device: torch.device

    @classmethod
    def of(cls, case: Case, facts: DeviceProfile) -> Run:
        """Settles device and seed as the job does."""
        recipe, _ = resolve(case.recipe(), facts)
        device = setup_device(facts, recipe.train.seed)
        matrix_values()  # No part of the job; so it is not made while something watches.
        return cls(case, recipe, case.config(), device)

    def go(self, phase: Callable[[str], Any]) -> None:
        """Load, first step, later steps and evaluation, each inside `phase(name)`."""
        with phase("load"):
            state = self.load()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        # The allocator's cache goes on changing after the second step; a CPU has none.
        for name in ("first_step", *("step",) * (3 if self.device.type == "cuda" else 1)):
            with phase(name):
                self.step(state)
        with phase("eval"):
            self.evaluate(state)

    def load(self) -> State:
        """The state before its first step, from weights made on the spot."""
        return build_state(
            ModelRequest(
                self.recipe,
                self.config,
                lambda model, family: MadeSource(model, family, touched=not is_fake_gpu()),
                self.device,
                profile_of(self.device),
            )
        )

    def step(self, state: State) -> None:
        """One optimizer step that updates; a skipped one had too high a loss scale."""
        while True:
            try:
                if not train_step(state, window_of(self.recipe, self.config), 1e-3).skipped:
                    return
            except QloraError:
                # A stand-in for a card copies nothing back: what lay in the host's memory is read
                # as the loss, and now and then it is no number.
                if not is_fake_gpu():
                    raise

    def evaluate(self, state: State) -> None:
        """One held-out batch."""
        CAUSAL.evaluate(state.loaded, window_of(self.recipe, self.config)[:1], self.device)


def seen_by_profiler(case: Case, facts: DeviceProfile) -> dict[str, int]:
    """Peak bytes of each phase on the CPU, as torch's profiler sees them."""
    judge, run = Judge(), Run.of(case, facts)
    # Made once a process and kept; a plan counts this kilobyte where it is first made.
    scale_codebook(run.device)
    run.go(judge.phase)
    return judge.peaks


@dataclass
class CardCounters:
    """Peaks of torch's caching allocator by phase, in bytes."""

    allocated: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase seen twice is its worse time."""
        torch.cuda.reset_peak_memory_stats()
        yield
        for peaks, seen in (
            (self.allocated, torch.cuda.max_memory_allocated()),
            (self.reserved, torch.cuda.max_memory_reserved()),
        ):
            peaks[name] = max(seen, peaks.get(name, 0))


def seen_by_allocator(case: Case, facts: DeviceProfile) -> CardCounters:
    """Peaks of each phase on the card, as its caching allocator counts them."""
    counters = CardCounters()
    Run.of(case, facts).go(counters.phase)
    return counters


def write_trace(case: Case, file: Path) -> int:
    """Every event of the caching allocator in order, one JSON object a line; how many there are.

    action: alloc, free_requested, free_completed, segment_alloc, segment_free (torch's own words).
    size: bytes as asked for. allocated: bytes in use after the event, as the allocator rounds them.
    where: the innermost line of Python and, where that is not of the package, the innermost of it
    too; empty in backward, which has no Python around it.
    """
    run = Run.of(case, inspect_device())
    torch.cuda.memory._record_memory_history(
        "all", context="alloc", stacks="python", max_entries=10**7
    )
    ends: list[tuple[int, str]] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        yield
        ends.append((len(_events()), name))

    run.go(phase)
    events = _events()
    torch.cuda.memory._record_memory_history(None)
    with file.open("w") as stream:
        for number, event in enumerate(events):
            name = next((name for end, name in ends if number < end), "end")
            about = {key: event[key] for key in ("action", "addr", "size")}
            line = {"phase": name, **about, "where": _where(event.get("frames", ()))}
            stream.write(json.dumps(line) + "\n")
    return len(events)


def _events() -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = torch.cuda.memory._snapshot()["device_traces"][0]
    return events


def _where(frames: Iterable[Mapping[str, Any]]) -> str:
    lines = [f"{_short(frame['filename'])}:{frame['line']} {frame['name']}" for frame in frames]
    own = [line for line in lines if line.startswith("qlora_cli/")]
    return " < ".join(dict.fromkeys([*lines[:1], *own[:1]]))


def _short(path: str) -> str:
    for folder in ("site-packages/", "qlora_cli/"):
        _, found, after = path.rpartition(folder)
        if found:
            return after if folder == "site-packages/" else folder + after
    return path


def compare(case: Case, kind: str) -> dict[str, Any]:
    """One row: what was planned and what was measured on this kind of device, phase by phase."""
    facts = facts_of(kind)
    plan = planned(case, facts)
    if kind == "cuda":
        counters = seen_by_allocator(case, facts)
        peaks, reserved = counters.allocated, max(counters.reserved.values())
    else:
        peaks, reserved = seen_by_profiler(case, facts), 0
    by_phase = {phase.name: phase.peak_bytes for phase in plan.phases if phase.name in PHASES}
    return {
        "case": case.name,
        "recipe": case.recipe().model_dump(mode="json", exclude_defaults=True),
        "phases": {name: _pair(by_phase[name], peaks[name]) for name in PHASES},
        **_pair(max(by_phase.values()), max(peaks.values())),
        "reserved": _pair(plan.reserved_bytes, reserved),
        "others": _others(case, plan.total_parameters),
    }


def facts_of(kind: str) -> DeviceProfile:
    """This machine's CPU or its first card. Raises SystemExit where there is no card."""
    facts = inspect_device()
    if facts.kind == kind:
        return facts
    if kind == "cuda":
        raise SystemExit("no CUDA card here")
    return DeviceProfile(
        kind="cpu", name=platform.processor(), capacity_bytes=host_capacity_bytes()
    )


def describe_machine(kind: str) -> dict[str, Any]:
    """Device, versions and judge, for the head of a report."""
    facts = facts_of(kind)
    name = facts.name
    if kind == "cuda":
        major, minor = facts.capability or (0, 0)
        name += f", compute capability {major}.{minor}, {facts.multiprocessors} multiprocessors"
        name += f", {facts.capacity_bytes / 2**30:.0f} GiB"
    if is_fake_gpu():
        name = f"a fake GPU and no real card ({name}): torch's own allocator, empty kernels"
    packages = ("torch", "bitsandbytes", "transformers")
    judge = "torch's profiler" if kind == "cpu" else "torch's CUDA caching allocator"
    return {
        "device": name,
        "fake_gpu": is_fake_gpu(),
        "versions": {"python": platform.python_version()} | dict(map(version_of, packages)),
        "judge": judge,
    }


def _pair(planned_bytes: int | None, measured_bytes: int) -> dict[str, Any]:
    error = None if planned_bytes is None else planned_bytes / measured_bytes - 1
    return {"planned_bytes": planned_bytes, "measured_bytes": measured_bytes, "error": error}


def _others(case: Case, parameters: int) -> dict[str, int]:
    bits = case.recipe().base.bits
    return {
        "accelerate_load": accelerate_load(parameters, bits),
        "accelerate_adam": accelerate_adam(parameters, bits),
        "litgpt_training": litgpt_training(case.config()),
    }
