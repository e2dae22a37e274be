"""Check the files of a merged folder other than its tensors, and load it with transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_cli.adapters.peft_config import CONFIG as ADAPTER_CONFIG
from qlora_cli.adapters.peft_config import WEIGHTS as ADAPTER_WEIGHTS
from qlora_cli.adapters.peft_prefix import FOLDER
from qlora_cli.data.template import TEMPLATE_FILE
from qlora_cli.export.merge.folder import CONFIG, copied_files, merged_config
from qlora_cli.files.composed import language_config
from qlora_cli.files.source import read_folder
from qlora_cli.models.composed import auto_class
from qlora_cli.models.progress_bars import without_progress_bars

_MAX_VALUE_CHARACTERS = 80
"""Length to which a JSON value is cut in a message."""


def file_faults(merged: Path, base: Path, chat_template: str | None = None) -> Iterator[str]:
    """Yield a line for each missing, different or foreign file among those that merging copies.

    merged, base: folders of the merged model and of the base. chat_template: Jinja text that the
    merged model has in place of the base's; None if it has the base's.
    """
    own = {Path(TEMPLATE_FILE)} if chat_template is not None else set()
    if chat_template is not None:
        yield from _template_faults(merged / TEMPLATE_FILE, chat_template)
    for path in copied_files(base):
        if path in own:
            continue
        if not (merged / path).is_file():
            yield f"{path} is missing; copy it from the base"
        elif not _has_same_content(merged / path, base / path):
            difference = _first_difference(merged / path, base / path)
            yield f"{path} differs from the base's{difference or '; copy it from the base'}"
    for path in copied_files(merged):
        if not (base / path).is_file() and path not in own:
            yield f"{path} is not among the base's files; remove it"


def prefix_faults(merged: Path, prefix: Path | None) -> Iterator[str]:
    """Yield a line for each file of the merged model's prefix that differs from the run's.

    prefix: folder of the run's prefix; None if it has none.
    """
    own = merged / FOLDER
    if prefix is None:
        if own.exists():
            yield f"{FOLDER} is a prefix that the run does not have; remove it"
        return
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        path = f"{FOLDER}/{name}"
        if not (own / name).is_file():
            yield f"{path} is missing; merge again"
        elif (own / name).read_bytes() != (prefix / name).read_bytes():
            yield f"{path} differs from the run's; merge again"


def _template_faults(path: Path, chat_template: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name} of data.template is missing; merge again"
    elif path.read_bytes() != chat_template.encode():
        yield f"{path.name} differs from data.template of the run; merge again"


def config_faults(
    merged: Path, base: Path, dtype: torch.dtype, entries: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a line for each key of config.json that differs from what merging writes.

    merged, base: folders of the merged model and of the base. dtype: dtype of the merged weights.
    entries: that differ from the base's.
    """
    expected = merged_config(base, dtype, entries)
    try:
        config = json.loads((merged / CONFIG).read_text())
    except ValueError as fault:
        yield f"{CONFIG} is damaged: {fault}; merge again"
        return
    for key in sorted(expected.keys() | config.keys()):
        # A missing key differs from null: the config class may have another default for it.
        value, expected_value = (
            json.dumps(content[key]) if key in content else "absent"
            for content in (config, expected)
        )
        if value != expected_value:
            yield f"{CONFIG}: {key} is {value}; it must be {expected_value}"


def loading_faults(merged: Path, model_class: Any) -> Iterator[str]:
    """Yield what transformers reports when it loads the folder's tensors.

    transformers receives the names, shapes and dtypes of the tensors on meta. If it read the files,
    it would map all of them, which may exceed a limit on the memory of the process.

    merged: the merged folder. model_class: transformers Auto class of the task.
    """
    from transformers import AutoConfig

    tensors = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in read_folder(merged).items()
    }
    try:
        config = AutoConfig.from_pretrained(merged, trust_remote_code=False)
        with torch.device("meta"):
            auto = auto_class(language_config(config), model_class)
            concrete_class: Any = type(auto.from_config(config, trust_remote_code=False))
        with without_progress_bars():
            _, info = concrete_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map="meta",
                output_loading_info=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, TypeError, RuntimeError) as fault:
        yield f"transformers cannot load the folder: {fault}; merge again"
        return
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            keys = ", ".join(map(str, sorted(info[kind])))
            yield f"transformers reports {kind.replace('_', ' ')}: {keys}; merge again"


def _has_same_content(file: Path, base_file: Path) -> bool:
    """Return whether both files have the same bytes, or the same JSON in another layout."""
    if file.read_bytes() == base_file.read_bytes():
        return True
    return file.suffix == ".json" and _read_json(file) == _read_json(base_file) is not None


def _first_difference(file: Path, base_file: Path) -> str:
    """Return `: bos_token is "<s>"; it must be "<|im_start|>"` if both files are JSON objects."""
    content, expected = _read_json(file), _read_json(base_file)
    if not isinstance(content, dict) or not isinstance(expected, dict):
        return ""
    for key in sorted(content.keys() | expected.keys()):
        value, expected_value = (json.dumps(c.get(key)) for c in (content, expected))
        if value != expected_value:
            limit = _MAX_VALUE_CHARACTERS
            return f": {key} is {value[:limit]}; it must be {expected_value[:limit]}"
    return ""


def _read_json(file: Path) -> Any:
    """Return the content of a JSON file, or None if the file is not JSON."""
    if file.suffix != ".json":
        return None
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None
