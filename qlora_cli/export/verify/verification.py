"""Verify that a merged folder contains the model that was trained.

The verification passes if all of these checks pass:

1. Tensors (`tensor_checks.py`): names, shapes and dtypes are those of the base, in the merged
   dtype. Every tensor equals bit for bit what merging computes from the base and the adapter. No
   layer of the adapter is missing.
2. Files: config, tokenizer, chat templates and generation settings are the base's
   (`file_checks.py`). Every GGUF file has the values of the merged tensors (`gguf_checks.py`).
3. Predictions (`prediction_checks.py`): transformers loads the folder without a missing or
   unexpected key, and on held-out rows
   KL(trained || merged) <= 4 KL(frozen base || base as merged into) + `ROUNDING_KL`,
   where neither base has the adapter. So the effect of changing the base is measured on the same
   rows. It is next to nothing for a merge into `dequantized` if training computed in float32. Else
   it includes the 16-bit arithmetic or int8 activations of the training. For `original` it
   includes the quantization of the base. The factor is 4 because the fine-tuned model may be more
   sensitive than the base.
4. Fine-tuning: if an adapter that was trained on a quantized base is merged into `original`, the
   merge keeps the fine-tuning by the rule of `base_choice.py`. Checked only on rows of the task.
5. Range: in float16, no activation overflows on these rows (`dtype_range.py`).

The number of greedy tokens on which both models agree (`greedy_agreement.py`) is reported and is
not a check: rounding can decide a tie between two tokens.

No complete model needs to be in memory: tensors are compared one at a time, and models run streamed
(`comparison_models.py`, which also defines in which arithmetic each of them computes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_cli.data.template import trained_template
from qlora_cli.errors import InputError, UsageError
from qlora_cli.events import Observer
from qlora_cli.export.compare.greedy_agreement import GreedyAgreement
from qlora_cli.export.compare.logit_comparison import Comparison
from qlora_cli.export.merge.combine import weighted_adapters_of
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.merge.manifest import MANIFEST, MergeManifest
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.verify.faults import shorten_faults
from qlora_cli.export.verify.file_checks import config_faults, file_faults, prefix_faults
from qlora_cli.export.verify.gguf_checks import gguf_file_faults
from qlora_cli.export.verify.prediction_checks import compare_predictions
from qlora_cli.export.verify.tensor_checks import structure_faults, value_faults
from qlora_cli.runs.run import Run


@dataclass(frozen=True)
class VerificationReport:
    """The result of a verification.

    faults: one line per failed check; empty if the verification passed.
    comparison, greedy: the predictions compared with the trained model's; None if the tensors of
        the folder do not form this model, so that it cannot run.
    explanation: what the figures include and which are checked, one sentence each.
    """

    faults: tuple[str, ...]
    comparison: Comparison | None = None
    greedy: GreedyAgreement | None = None
    explanation: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True if no fault was found."""
        return not self.faults


def verify(merged: Path, run: Run, device: torch.device, observer: Observer) -> VerificationReport:
    """Compare a merged folder with the run that it was merged from.

    merged: the merged folder.
    run: the run.
    device: packs weights and runs the models; of the kind that trained.
    observer: receives notes and the number of compared tensors.

    Raises UsageError if `merged` is not a model's folder, or if `run` is not a finished run, and
    ModelError if the run's base is missing.
    """
    if not (merged / CONFIG).is_file():
        raise UsageError(
            f"{merged} is not a model's folder: it has no {CONFIG}",
            hint="name the folder that `qlora merge` wrote",
        )
    base = run.base_folder
    try:
        manifest = MergeManifest.read(merged)
        expected = open_merged_tensors(
            run, manifest.base, manifest.dtype, device, manifest.weight, manifest.others, observer
        )
    except UsageError:
        raise
    except InputError as fault:
        return VerificationReport((f"the expected tensors cannot be determined: {fault}",))
    for note in manifest.notes():
        observer.note(note)
    entries = expected.config_entries
    broken = [
        *structure_faults(merged, expected),
        *config_faults(merged, base, expected.dtype, entries),
    ]
    template = trained_template(run.recipe.data, base)
    faults = [*_adapter_faults(manifest, expected), *broken, *file_faults(merged, base, template)]
    faults += prefix_faults(merged, expected.prefix)
    faults += gguf_file_faults(merged, can_compare=not broken, observer=observer)
    if broken:
        return VerificationReport(shorten_faults(faults))
    return _compare_values(merged, run, expected, faults, observer)


def _compare_values(
    merged: Path, run: Run, expected: MergedTensors, faults: list[str], observer: Observer
) -> VerificationReport:
    """Compare the values of all tensors and the predictions.

    expected: the tensors that merging must write. faults: those that were found before.
    """
    faults = [*faults, *value_faults(merged, expected, observer)]
    predictions = compare_predictions(merged, run, expected, observer)
    return VerificationReport(
        shorten_faults([*faults, *predictions.faults]),
        predictions.comparison,
        predictions.greedy,
        predictions.explanation,
    )


def _adapter_faults(manifest: MergeManifest, expected: MergedTensors) -> Iterator[str]:
    """Yield a line for each adapter that has changed since the merge."""
    if expected.adapter is None or not manifest.digests:
        return
    own, *others = (
        weighted.to_dict()["digest"] for weighted in weighted_adapters_of(expected.adapter)
    )
    if manifest.digests[0] != own:
        yield f"the run's adapter is not the one in {MANIFEST} (its digest differs); merge again"
    for (folder, _), merged, now in zip(
        manifest.others, manifest.digests[1:], others, strict=False
    ):
        if merged != now:
            yield (
                f"the adapter in {folder} is not the one in {MANIFEST} (its digest differs); merge "
                "again"
            )
