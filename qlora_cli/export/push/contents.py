"""Select what is uploaded to the Hugging Face Hub: the files of a merged model or of an adapter.

A merged folder is uploaded only if its last verification passed and its weights have not changed
since. merge.json and verification.json stay on this computer, because they contain local paths;
their content is in the model card. adapter_config.json is uploaded without the path of a local
base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.adapters.peft_prefix import prefix_folder
from qlora_cli.data.template import TEMPLATE_FILE
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.export.merge.folder import CONFIG, copied_files
from qlora_cli.export.merge.manifest import MANIFEST, MergeManifest
from qlora_cli.export.verify.record import read_record
from qlora_cli.files.atomic import read_json
from qlora_cli.files.source import WEIGHTS_INDEX, read_folder
from qlora_cli.runs.run import Run

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MODELFILE = "Modelfile"
"""The file for Ollama that `gguf/modelfile.py` writes."""


@dataclass(frozen=True)
class UploadContents:
    """What is uploaded, without the model card.

    folder: contains the files. files: their paths relative to `folder`.
    kind: "merged", "adapter" or "full" (the model that full fine-tuning wrote).
    run: the run that trained the model; None if it is not known.
    verification: the content of verification.json; None if there is no result of these weights.
    base, dtype: how the model was merged; None for an adapter and if there is no merge.json.
    replaced: path -> content that is uploaded in place of the file's own.
    """

    folder: Path
    files: tuple[Path, ...]
    kind: str
    run: Run | None
    verification: dict[str, Any] | None = None
    base: str | None = None
    dtype: str | None = None
    replaced: Mapping[Path, bytes] = field(default_factory=dict)

    def num_bytes(self, path: Path) -> int:
        """Return the size of one of the files as it is uploaded."""
        content = self.replaced.get(path)
        return (self.folder / path).stat().st_size if content is None else len(content)


def select_contents(target: Path, *, unverified: bool) -> UploadContents:
    """Return what to upload.

    target: a run, one of its checkpoints, or a merged folder. unverified: True to also accept a
    merged folder without a passed verification.

    Raises UsageError if `target` is neither, or is a merge that was not verified; ModelError if the
    weights are damaged.
    """
    run = Run.find(target)
    if prefix_folder(target if run is None or run.is_full_fine_tuning else run.adapter_file.folder):
        raise UsageError(
            f"{target} has a prefix (adapter.prefix), which needs a repository of its own",
            hint="upload the folders with `hf upload`, the prefix apart from the weights",
        )
    if run is not None:
        return _of_run(run)
    if (target / ADAPTER_FILES[0]).is_file() or not (target / CONFIG).is_file():
        raise UsageError(
            f"{target} is neither a run's folder nor a merged model",
            hint="name the folder that `qlora train` or `qlora merge` wrote",
        )
    return _of_merge(target, unverified)


def _of_run(run: Run) -> UploadContents:
    if run.is_full_fine_tuning:
        folder = run.trained_weights
        return UploadContents(folder, _model_files(folder), "full", run)
    folder = run.adapter_file.folder
    files = [*map(Path, ADAPTER_FILES)]
    if (folder / TEMPLATE_FILE).is_file():
        files.append(Path(TEMPLATE_FILE))
    return UploadContents(folder, tuple(files), "adapter", run, replaced=_without_path(folder))


def _without_path(folder: Path) -> dict[Path, bytes]:
    """Return adapter_config.json with the base's name in place of a local path, if it has one."""
    path = Path(ADAPTER_FILES[0])
    config = read_json(folder / path, dict, ModelError)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or is_hub_id(base):
        return {}
    return {path: json.dumps(config | {"base_model_name_or_path": Path(base).name}).encode()}


def is_hub_id(name: str) -> bool:
    """Return whether the name of a base is `owner/name` on the hub, and not a local path."""
    return name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def _of_merge(merged: Path, unverified: bool) -> UploadContents:
    record = read_record(merged)
    if not unverified and (record is None or not record.get("passed")):
        state = "its verification failed" if record is not None else "it was not verified"
        raise UsageError(
            f"{merged} is a merged model, and {state}",
            hint=f"run `qlora verify {merged} --against RUN`, or upload it anyway with "
            "--unverified",
        )
    base = dtype = None
    if (merged / MANIFEST).is_file():
        manifest = MergeManifest.read(merged)
        base, dtype = manifest.base, str(manifest.dtype).removeprefix("torch.")
    run = Run.find(record["run"]) if record is not None and record.get("run") else None
    return UploadContents(merged, _model_files(merged), "merged", run, record, base, dtype)


def _model_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a model's folder. Raises ModelError if its weights are damaged."""
    names = {CONFIG, *(entry.file.name for entry in read_folder(folder).values())}
    names |= {name for name in (WEIGHTS_INDEX, _MODELFILE) if (folder / name).is_file()}
    names |= {file.name for file in folder.glob("*.gguf")}
    return tuple(sorted({*map(Path, names), *map(Path, copied_files(folder))}))
