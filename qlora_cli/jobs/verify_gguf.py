"""`qlora verify --gguf`: compare what GGUF files compute in llama.cpp with the merged folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.export.compare.eval_rows import EvalRows, eval_rows, file_rows
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.serve.local_model import LocalModel
from qlora_cli.export.verify.gguf_checks import gguf_file_faults
from qlora_cli.files.locate import read_config
from qlora_cli.jobs.gguf_results import GgufFileResult, GgufResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.memory.host import return_freed_memory
from qlora_cli.runs.run import Run


def run(merged: Path, *, against: Path | None, data: str | None, observer: Observer) -> GgufResult:
    """Compare every GGUF file of a merged folder with the folder's own model.

    merged: folder of the merged model. against: the run's folder, for its held-out rows. data: a
    data file, whose rows are used if `against` is None.

    A file whose tensors differ from the merged ones is not opened in llama.cpp. Raises UsageError
    if there is no GGUF file or llama-cpp-python is not installed, InputError if a folder is missing
    or incomplete, ModelError if llama.cpp cannot load a file.
    """
    files = sorted(merged.glob("*.gguf"))
    if not files:
        raise UsageError(
            f"{merged} has no GGUF file",
            where="--gguf",
            hint="write one with `qlora merge RUN --out MERGED --gguf q8_0`",
        )
    _check_packages()
    faults = list(gguf_file_faults(merged, can_compare=True, observer=observer))
    is_sound = [not any(fault.startswith(file.name) for fault in faults) for file in files]
    usable = [file for file, sound in zip(files, is_sound, strict=True) if sound]
    results = _results(merged, _rows(merged, against, data), usable, observer) if usable else []
    faults += [f"{result.file}: {fault}" for result in results for fault in result.faults]
    return GgufResult(not faults, tuple(results), tuple(faults))


def _check_packages() -> None:
    from qlora_cli.export.gguf.llama_library import require_llama_cpp

    require_llama_cpp("comparing GGUF files in llama.cpp")
    if find_spec("gguf") is None:
        raise UsageError(
            "comparing GGUF files needs the gguf package, which is not installed",
            where="--gguf",
            hint="pip install 'qlora-cli[gguf]'",
        )


def _rows(merged: Path, against: Path | None, data: str | None) -> EvalRows:
    if against is None:
        assert data is not None
        return file_rows(data, merged, read_config(merged / CONFIG))
    run = Run(against)
    base = run.base_folder
    return eval_rows(run.recipe, base, read_config(base / CONFIG))


def _results(
    merged: Path, rows: EvalRows, files: list[Path], observer: Observer
) -> list[GgufFileResult]:
    from qlora_cli.export.gguf.predictions import Reference, compare_file

    for note in rows.notes:
        observer.note(note)
    return_freed_memory()
    model = LocalModel(merged, torch.device(inspect_device().kind))
    reference = Reference(model, rows.rows)
    results = []
    for file in files:
        found = compare_file(file, reference, observer)
        results.append(
            GgufFileResult(
                file=file.name,
                type=found.kind,
                bytes=file.stat().st_size,
                mean_kl=found.mean_kl,
                max_logit_difference=found.max_logit_difference,
                top1_agreement=found.top1_agreement,
                answers=found.answers,
                same_answers=found.same_answers,
                faults=found.faults,
            )
        )
    return results
