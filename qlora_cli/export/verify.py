"""Proof that a merged checkpoint is the model that was trained.

It passes where all of this holds:

1. Tensors: names, shapes and dtypes are those of the base, in the merged dtype; every tensor is bit
   for bit what base and adapter give (`proof.py`); no layer of the adapter is missing.
2. Files: config, tokenizer, templates and generation settings are the base's.
3. Answers: transformers loads the folder without a missing or unexpected key, and on held-out rows
   KL(trained || merged) <= 4 KL(frozen base || the base as merged into) + `ROUNDING`,
   where both bases are without the adapter. So what the base's own change costs is measured on the
   same rows: next to nothing where it is `dequantized` and arithmetic was float32; the arithmetic
   of 16 bit or of int8 activations where training used them; the whole quantization where it is
   `original`. Four times that, because the fine-tuned model may be the more sensitive one.
4. Where an adapter trained on a packed base is merged into `original`: the fine-tune survives by
   the rule of `choose.py` (on rows of the task only).

What is compared with what: the merged model in float32 on a CPU and in its own dtype on a card,
the trained model in the dtype that it was trained in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_cli.checkpoint.layout import RunFolder
from qlora_cli.checkpoint.open import base_folder, read_recipe
from qlora_cli.data.chat import Example
from qlora_cli.errors import InputError, UsageError
from qlora_cli.events import Observer
from qlora_cli.export.candidates import as_written, place_to_answer, trained_and_frozen
from qlora_cli.export.choose import loses_fine_tune
from qlora_cli.export.folder import ABOUT, CONFIG
from qlora_cli.export.judge import Answers, Comparison, answers, compare, free_memory
from qlora_cli.export.merge import digest
from qlora_cli.export.proof import (
    config_faults,
    file_faults,
    structure_faults,
    value_faults,
)
from qlora_cli.export.rows import judged_rows
from qlora_cli.export.tensors import Base, MergedTensors, merged_tensors
from qlora_cli.families.registry import family_of
from qlora_cli.weights.build import torch_dtype
from qlora_cli.weights.locate import read_config

ROUNDING = 1e-4
"""Nats: ten times what rounding the weights to float16 cost at most on random tiny models."""
_TIMES = 4.0
MAX_FAULTS = 10
"""Told one by one; the rest is counted."""


@dataclass(frozen=True)
class Verdict:
    """Passed where there is no fault. comparison: None where the tensors cannot be a model."""

    faults: tuple[str, ...]
    comparison: Comparison | None

    @property
    def passed(self) -> bool:
        """No fault was found."""
        return not self.faults


def verify(merged: Path, run: RunFolder, device: torch.device, observer: Observer) -> Verdict:
    """Compares the folder with the run.

    Raises UsageError where `merged` is no model's folder or the run is none or not finished,
    ModelError where the run's base is gone.
    """
    if not (merged / CONFIG).is_file():
        raise UsageError(f"{merged} is no model's folder", hint="it must hold config.json")
    base = base_folder(run)
    try:
        expected = _expected(merged, run, device)
    except UsageError:
        raise
    except InputError as fault:
        return Verdict((f"the run cannot be merged, so nothing can equal it: {fault}",), None)
    broken = [*structure_faults(merged, expected), *config_faults(merged, base, expected.dtype)]
    faults = [*_origin_faults(merged, expected), *broken, *file_faults(merged, base)]
    if broken:
        return Verdict(_shortened(faults), None)
    faults += value_faults(merged, expected, observer)
    comparison, more = _compare_answers(merged, run, expected, observer)
    return Verdict(_shortened([*faults, *more]), comparison)


def _expected(merged: Path, run: RunFolder, device: torch.device) -> MergedTensors:
    """What should lie in the folder, by its merge.json; without one, merged into the original."""
    told = _settings(merged)
    dtype = told.get("dtype") or json.loads((merged / CONFIG).read_text()).get("dtype")
    base: Base = "dequantized" if told.get("base") == "dequantized" else "original"
    return merged_tensors(run, base, torch_dtype(dtype or "float32"), device)


def _settings(merged: Path) -> dict[str, Any]:
    file = merged / ABOUT
    settings: dict[str, Any] = json.loads(file.read_text())["settings"] if file.is_file() else {}
    return settings


def _origin_faults(merged: Path, expected: MergedTensors) -> Iterator[str]:
    told = _settings(merged).get("adapter")
    if told and expected.adapter is not None and told != digest(expected.adapter.folder):
        yield f"{ABOUT} names another adapter than the run has now"


def _compare_answers(
    merged: Path, run: RunFolder, expected: MergedTensors, observer: Observer
) -> tuple[Comparison | None, list[str]]:
    """(merged against trained, what is wrong with that); nothing where it does not fit anywhere."""
    base = base_folder(run)
    place = place_to_answer(expected)
    if place is None:
        observer.note("the merged model is too large for this machine: answers were not compared")
        return None, []
    judged = judged_rows(read_recipe(run), base, read_config(base / CONFIG))
    for note in judged.notes:
        observer.note(note)
    trained, frozen = trained_and_frozen(run, expected.device, judged.rows)
    try:
        found, faults = _merged_answers(merged, expected.dtype, place, judged.rows)
    except (OSError, ValueError, RuntimeError) as fault:
        return None, [f"transformers cannot load or run it: {fault}"]
    comparison = compare(trained, found)
    alone = as_written(run, replace(expected, adapter=None), place, judged.rows)
    allowed = _TIMES * compare(frozen, alone).mean_kl + ROUNDING
    # Written so that NaN is a fault.
    if not comparison.mean_kl <= allowed:
        faults.append(
            f"its answers are {comparison.mean_kl:.3g} nats from the trained model's; "
            f"{allowed:.3g} are allowed"
        )
    if judged.of_task and _into_original(expected):
        other = as_written(run, replace(expected, base="dequantized"), place, judged.rows)
        if loses_fine_tune(comparison, compare(trained, other), compare(trained, frozen)):
            faults.append("into the original base it lost the fine-tune; use --base dequantized")
    return comparison, faults


def _into_original(expected: MergedTensors) -> bool:
    """Whether the adapter was added to other values than it was trained on."""
    trained_on_other = expected.adapter is not None and expected.held.bits < 16
    return trained_on_other and expected.base == "original"


def _merged_answers(
    merged: Path, dtype: torch.dtype, place: torch.device, rows: Sequence[Example]
) -> tuple[Answers, list[str]]:
    """Answers of the model as transformers loads it, and what it complained of."""
    from transformers import AutoModelForCausalLM

    compute = torch.float32 if place.type == "cpu" else dtype
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        merged, dtype=compute, output_loading_info=True
    )
    model, info = loaded
    model.eval().to(place)
    faults = [
        f"transformers finds {kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    backbone = model.get_submodule(family_of(model.config).backbone)
    found = answers(backbone, model.get_output_embeddings(), rows)
    del loaded, model, backbone
    free_memory()
    return found, faults


def _shortened(faults: Sequence[str]) -> tuple[str, ...]:
    rest = len(faults) - MAX_FAULTS
    return (*faults[:MAX_FAULTS], *([f"and {rest} more"] if rest > 0 else []))
