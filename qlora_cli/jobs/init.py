"""`qlora init`: write a recipe for a model, a data file and a device, with a reason per setting."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_cli.data.mixture import sources_text
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import DoesNotFit, UsageError
from qlora_cli.events import Observer, Silent
from qlora_cli.files.atomic import atomic_file, report_write_errors
from qlora_cli.files.locate import find_config, find_tokenizer, read_config
from qlora_cli.jobs.init_result import InitResult
from qlora_cli.jobs.init_rows import FoundRows, HeldOut, find_rows
from qlora_cli.jobs.init_training import Length, learning_rate
from qlora_cli.memory.device import inspect_device
from qlora_cli.plan.choose import MIN_SEQ_LEN, SizeChooser
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.describe import keys
from qlora_cli.recipe.gpus import size_that_fits
from qlora_cli.recipe.resolve import RESIDENCY, Choice, resolve
from qlora_cli.recipe.schema import Recipe, Sources
from qlora_cli.recipe.write import recipe_of, recipe_text
from qlora_cli.units import format_bytes, format_count

_SILENT = Silent()
_TARGETS = "every linear layer gets an adapter, as in the QLoRA paper; [q, v] needs less memory"


@dataclass
class Draft:
    """The settings that are chosen so far: dotted key -> choice. profile: the target device."""

    profile: DeviceProfile
    chosen: dict[str, Choice] = field(default_factory=dict)

    def put(self, *choices: Choice) -> None:
        """Add choices, or replace earlier ones of the same settings."""
        self.chosen |= {choice.key: choice for choice in choices}

    def value(self, key: str) -> Any:
        """Return the chosen value of a setting."""
        return self.chosen[key].value

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The choices in the order of a recipe's settings."""
        order = {key: number for number, key in enumerate(keys())}
        return tuple(sorted(self.chosen.values(), key=lambda choice: order[choice.key]))

    @property
    def recipe(self) -> Recipe:
        """The recipe with the choices, without `auto` values.

        Blocks are in host memory only if that was chosen, because it is slow.
        """
        recipe, _ = resolve(recipe_of(self.choices), self.profile)
        if RESIDENCY in self.chosen:
            return recipe
        return with_settings(recipe, "base", residency="device")


def run(
    file: Path,
    *,
    model: str,
    train: Sources,
    held_out: HeldOut = "auto",
    device_profile: DeviceProfile | None = None,
    force: bool = False,
    observer: Observer = _SILENT,
) -> InitResult:
    """Choose a recipe's settings, write it to `file` and return the settings with their reasons.

    model: a hub id or a folder; its config and its tokenizer are read. train: `data.train`.
    held_out: what `data.eval` is. device_profile: the target device; None for this machine's.
    force: replace an existing file.
    Raises UsageError if the file exists or cannot be written, DoesNotFit if the job does not fit
    the device with any settings, and the errors of reading the base and the rows.
    """
    check_target(file, force=force)
    profile = device_profile or inspect_device()
    observer.note(f"read the config and the tokenizer of {model}")
    config = read_config(find_config(model, None))
    tokenizer = load_tokenizer(str(find_tokenizer(model, None)))
    has_template = bool(getattr(tokenizer, "chat_template", None))
    observer.note("read the rows and count their tokens")
    rows = find_rows(model, train, held_out, tokenizer, config)
    draft = Draft(profile)
    draft.put(Choice("model.name", model, ""), *rows.choices, rows.seq_len())
    draft.put(Choice("adapter.targets", "all", _TARGETS))
    observer.note(f"plan the memory on {profile.name}")
    chooser = SizeChooser(config, profile)
    length = _choose_sizes(draft, chooser, rows)
    plan = chooser.planner.plan(draft.recipe)
    is_preference = draft.recipe.task == "preference"
    draft.put(
        learning_rate(plan.total_parameters, is_instruct=has_template, is_preference=is_preference)
    )
    draft.put(Choice("model.name", model, _model_reason(plan, rows)))
    return _write(file, draft, plan, rows, length)


def _choose_sizes(draft: Draft, chooser: SizeChooser, rows: FoundRows) -> Length:
    """Choose bits, sequence length, batch and passes. Raises DoesNotFit if nothing fits."""
    _choose_base(draft, chooser)
    sequences = rows.sequences(draft.value("data.seq_len"))
    has_eval = "data.eval" in draft.chosen and draft.value("data.eval") is not None
    length = Length(rows.train_rows, sequences, has_eval, is_text=rows.is_split)
    micro_batch, accum = chooser.micro_batch(draft.recipe, length.batch)
    about = "about " if rows.survey.is_sample else ""
    draft.put(micro_batch, replace(accum, reason=length.batch_reason(about)))
    draft.put(*length.choices(about))
    return length


def check_target(file: Path, *, force: bool) -> None:
    """Raise UsageError if a recipe cannot be written to `file`."""
    if file.is_dir():
        raise UsageError("is a folder; name the recipe file to write", where=str(file))
    if file.exists() and not force:
        raise UsageError(
            "already exists and is not overwritten",
            where=str(file),
            hint="name another file, or replace it with --force",
        )
    if not file.parent.is_dir():
        raise UsageError("this folder does not exist", where=str(file.parent))


def _choose_base(draft: Draft, chooser: SizeChooser) -> None:
    """Choose the bits of the base and, if the rows are too long for the device, `data.seq_len`.

    A base that does not fit a GPU with any length is put into host memory.
    """
    bits = chooser.bits(draft.recipe)
    if bits is not None:
        draft.put(bits)
        return
    draft.put(Choice("base.bits", 4, "the fewest; the rows are too long for more"))
    seq_len = chooser.seq_len(draft.recipe)
    if seq_len is None and draft.profile.kind == "cuda":
        reason = (
            "a base on the device does not fit in 4 bit; its blocks are copied when they compute"
        )
        draft.put(Choice(RESIDENCY, "host", reason), Choice("base.bits", 4, "the fewest"))
        if chooser.fits(draft.recipe):
            return
        seq_len = chooser.seq_len(draft.recipe)
    if seq_len is None:
        raise _does_not_fit(draft, chooser)
    draft.put(seq_len)


def _does_not_fit(draft: Draft, chooser: SizeChooser) -> DoesNotFit:
    shortest = chooser.smallest(draft.recipe)
    size = size_that_fits(shortest.needed_bytes)
    return DoesNotFit(
        f"{draft.value('model.name')} does not fit {draft.profile.name}: in 4 bit, with "
        f"{format_count(MIN_SEQ_LEN)} tokens per sequence, it needs "
        f"{format_bytes(shortest.needed_bytes)} of {chooser.memory_text()}",
        hint=(f"a GPU with {size} would do, or " if size else "") + "name a smaller model",
    )


def _model_reason(plan: MemoryPlan, rows: FoundRows) -> str:
    text = f"{format_count(plan.total_parameters)} parameters"
    return text + (f", {format_count(rows.positions)} positions" if rows.positions else "")


def _write(
    file: Path, draft: Draft, plan: MemoryPlan, rows: FoundRows, length: Length
) -> InitResult:
    """Write the recipe and return the result."""
    profile, needed = draft.profile, plan.needed_bytes
    device = f"{profile.name} ({format_bytes(profile.capacity_bytes)})"
    text = recipe_text(_header(draft, plan, device), draft.choices)
    with report_write_errors("the recipe", file), atomic_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return InitResult(
        file=file,
        choices=draft.choices,
        device=device,
        usable_bytes=profile.usable_bytes,
        peak_bytes=plan.peak_bytes,
        needed_bytes=needed,
        rows=rows.train_rows,
        updates=length.updates,
        is_estimate=rows.survey.is_sample,
    )


def _header(draft: Draft, plan: MemoryPlan, device: str) -> list[str]:
    """Return the paragraphs of the comment at the top of the recipe."""
    peak, usable = format_bytes(plan.peak_bytes), format_bytes(draft.profile.usable_bytes)
    reserved = f", {format_bytes(plan.reserved_bytes)} reserved" if plan.reserved_bytes else ""
    return [
        f"{draft.value('model.name')} on {sources_text(draft.value('data.train'))}, for {device}.",
        f"Written by `qlora init`. Not measured: planned peak {peak}{reserved}, of {usable} that "
        "can be used. Each comment is the reason of the setting below it, and every setting can be "
        "changed; those that are not here have their defaults.",
    ]
