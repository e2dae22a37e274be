"""Plans and runs one configuration: the planner's figures and those of independent instruments."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_facts import is_fake_gpu, version_of
from plan_cases import Case, SyntheticSource, random_values, step_batches_of
from plan_estimates import accelerate_adam, accelerate_load, litgpt_training
from profiler_peak import PeakProfiler

from qlora_cli.data.collate import Batch
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import QloraError
from qlora_cli.events import Silent
from qlora_cli.files.packed_store import PackedStore
from qlora_cli.memory.device import inspect_device, profile_of
from qlora_cli.memory.host import host_capacity_bytes
from qlora_cli.models.build import ModelRequest
from qlora_cli.nn.codebook import scale_codebook
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.planner import Batches, Planner
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.runtime import setup_device
from qlora_cli.train.state import State, build_state
from qlora_cli.train.step import train_step

PHASES = ("load", "first_step", "step", "eval")


def plan_case(case: Case, profile: DeviceProfile) -> MemoryPlan:
    """Return the plan of a case for a device."""
    config = case.config()
    recipe = resolved_recipe(case, profile)
    batches = step_batches_of(recipe, config)
    return dry_run(recipe, config, profile, batches, batches[:1])


def resolved_recipe(case: Case, profile: DeviceProfile) -> Recipe:
    """Return the recipe of a case without `auto`. A policy that is `auto` is chosen by plans."""
    recipe, _ = resolve(case.recipe(), profile)
    if recipe.train.activation_checkpointing != "auto":
        return recipe
    config = case.config()

    def batches(given: Recipe) -> Batches:
        step = step_batches_of(given, config)
        return Batches(step, step[:1])

    return Planner(config, profile, batches).settle(recipe).recipe


@dataclass(frozen=True)
class Run:
    """One case on a real device; its methods are the parts of a job in their order."""

    case: Case
    recipe: Recipe
    config: Any
    device: torch.device

    @classmethod
    def of(cls, case: Case, profile: DeviceProfile) -> Run:
        """Set up device and seed as the job does."""
        recipe = resolved_recipe(case, profile)
        device = setup_device(profile, recipe.train.seed)
        random_values()  # Not part of the job: create it before the measurement starts.
        return cls(case, recipe, case.config(), device)

    def run_phases(self, phase: Callable[[str], Any]) -> None:
        """Run load, first step, later steps and evaluation, each inside `phase(name)`.

        The pass that computes the constants of the rows, if the task has one, counts as evaluation.
        """
        with phase("load"):
            state = self.load()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if state.task.needs_constants:
            with phase("eval"):
                self.compute_constants(state)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        # The allocator's cache still changes after the second step; a CPU has no cache.
        for name in ("first_step", *("step",) * (3 if self.device.type == "cuda" else 1)):
            with phase(name):
                self.step(state)
        with phase("eval"):
            self.evaluate(state)

    def load(self) -> State:
        """Return the state before the first step, with synthetic weights.

        A base on disk is packed into a temporary folder, whose files stay readable.
        """
        with TemporaryDirectory() as folder:
            return build_state(
                ModelRequest(
                    self.recipe,
                    self.config,
                    lambda model, family: SyntheticSource(
                        model, family, with_values=not is_fake_gpu()
                    ),
                    self.device,
                    profile_of(self.device),
                    copy=self._copy(Path(folder)),
                )
            )

    def _copy(self, folder: Path) -> PackedStore | None:
        """Return an empty packed copy, if the base of the case is on disk."""
        if self.recipe.base.residency != "disk":
            return None
        return PackedStore(folder / "packed" / "copy", self.case.name, Silent())

    def batches(self, state: State) -> list[Batch]:
        """Return the micro-batches of a step."""
        batches = step_batches_of(self.recipe, self.config)
        return [state.task.planned(batch) for batch in batches]

    def compute_constants(self, state: State) -> None:
        """Compute the constants of the rows of a step and of one evaluation batch."""
        batches = step_batches_of(self.recipe, self.config)
        for batch in (*batches, batches[0]):
            state.task.constants(state.loaded, batch, self.device)

    def step(self, state: State) -> None:
        """Run optimizer steps until one is not skipped; a skipped one had too high a loss scale."""
        while True:
            try:
                if not train_step(state, self.batches(state), 1e-3).skipped:
                    return
            except QloraError:
                # A fake GPU copies nothing back. The previous content of CPU memory is read as the
                # loss, and sometimes it is not a finite number.
                if not is_fake_gpu():
                    raise

    def evaluate(self, state: State) -> None:
        """Evaluate one batch."""
        state.task.evaluate(state.loaded, self.batches(state)[:1], self.device)


def measure_with_profiler(case: Case, profile: DeviceProfile) -> dict[str, int]:
    """Return the peak bytes of each phase on the CPU, measured by torch's profiler."""
    profiler, run = PeakProfiler(), Run.of(case, profile)
    # Created once per process and kept; a plan counts this kilobyte in the phase that creates it.
    scale_codebook(run.device)
    run.run_phases(profiler.phase)
    return profiler.peaks


@dataclass
class AllocatorPeaks:
    """Peaks of torch's caching allocator by phase, in bytes."""

    allocated: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block; a phase that runs more than once keeps the highest peak."""
        torch.cuda.reset_peak_memory_stats()
        yield
        for peaks, num_bytes in (
            (self.allocated, torch.cuda.max_memory_allocated()),
            (self.reserved, torch.cuda.max_memory_reserved()),
        ):
            peaks[name] = max(num_bytes, peaks.get(name, 0))


def measure_with_allocator(case: Case, profile: DeviceProfile) -> AllocatorPeaks:
    """Return the peaks of each phase on the GPU, measured by its caching allocator."""
    counters = AllocatorPeaks()
    Run.of(case, profile).run_phases(counters.phase)
    return counters


def write_trace(case: Case, file: Path) -> int:
    """Write every event of the caching allocator in order and return their number.

    Each line is a JSON object. action: alloc, free_requested, free_completed, segment_alloc or
    segment_free, as torch names them. size: requested bytes. where: the innermost line of Python
    and, if it is outside of the package, also the innermost line inside of it; empty in the
    backward pass, which runs outside of Python.
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

    run.run_phases(phase)
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
        _, separator, tail = path.rpartition(folder)
        if separator:
            return tail if folder == "site-packages/" else folder + tail
    return path


def compare(case: Case, kind: str) -> dict[str, Any]:
    """Return one row: planned and measured bytes on this kind of device, phase by phase."""
    profile = profile_of_kind(kind)
    plan = plan_case(case, profile)
    if kind == "cuda":
        counters = measure_with_allocator(case, profile)
        peaks, reserved = counters.allocated, max(counters.reserved.values())
    else:
        peaks, reserved = measure_with_profiler(case, profile), 0
    by_phase = {phase.name: phase.peak_bytes for phase in plan.phases if phase.name in PHASES}
    return {
        "case": case.name,
        "recipe": case.recipe().model_dump(mode="json", exclude_defaults=True),
        "phases": {name: _pair(by_phase[name], peaks[name]) for name in PHASES},
        **_pair(max(by_phase.values()), max(peaks.values())),
        "reserved": _pair(plan.reserved_bytes, reserved),
        "others": _others(case, plan.total_parameters),
    }


def profile_of_kind(kind: str) -> DeviceProfile:
    """Return the profile of this machine's CPU or first GPU. Raises SystemExit without a GPU."""
    profile = inspect_device()
    if profile.kind == kind:
        return profile
    if kind == "cuda":
        raise SystemExit("no CUDA GPU found")
    return DeviceProfile(
        kind="cpu", name=platform.processor(), capacity_bytes=host_capacity_bytes()
    )


def describe_machine(kind: str) -> dict[str, Any]:
    """Return device, versions and measuring instrument, for the head of a report."""
    profile = profile_of_kind(kind)
    name = profile.name
    if kind == "cuda":
        major, minor = profile.capability or (0, 0)
        name += f", compute capability {major}.{minor}, {profile.multiprocessors} multiprocessors"
        name += f", {profile.capacity_bytes / 2**30:.0f} GiB"
    if is_fake_gpu():
        name = f"a fake GPU, not a real one ({name}): torch's own allocator, empty kernels"
    packages = ("torch", "bitsandbytes", "transformers")
    instrument = "torch's profiler" if kind == "cpu" else "torch's CUDA caching allocator"
    return {
        "device": name,
        "fake_gpu": is_fake_gpu(),
        "versions": {"python": platform.python_version()} | dict(map(version_of, packages)),
        "measured_with": instrument,
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
