"""Write the model card of an upload: where the model comes from and what was measured.

The model card contains no local path: data files and local models are listed by their names only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.errors import UsageError
from qlora_cli.export.merge.folder import CONFIG
from qlora_cli.export.push.contents import UploadContents, is_hub_id
from qlora_cli.files.atomic import read_json
from qlora_cli.files.composed import is_composed
from qlora_cli.files.locate import read_config
from qlora_cli.memory.ledger import Ledger
from qlora_cli.recipe.describe import to_yaml
from qlora_cli.runs.run import Run
from qlora_cli.tasks.classification import CLASSIFICATION, ClassificationTask, task_of_model
from qlora_cli.units import format_bytes


def model_card(contents: UploadContents, repo: str) -> str:
    """Return the text of README.md. repo: `owner/name` of the upload."""
    run = contents.run
    sections = [_front_matter(contents), f"# {repo.split('/')[-1]}", *_summary(contents)]
    sections += _usage(contents, repo)
    sections += _verification(contents)
    if run is not None:
        sections += [*_losses(run), *_memory(run), *_data(run), *_recipe(run), *_versions(run)]
    return "\n\n".join(sections) + "\n"


def _front_matter(contents: UploadContents) -> str:
    lines = ["---", f"library_name: {'peft' if contents.kind == 'adapter' else 'transformers'}"]
    kind = "text-generation" if _classifier(contents) is None else "text-classification"
    lines += [f"pipeline_tag: {kind}", "tags:", "- qlora-cli"]
    if contents.kind != "full":
        lines.append("- lora")
    base = _hub_base(contents.run)
    if base is not None:
        lines.append(f"base_model: {base}")
    lines.append(f"license: {license_of(contents)}")
    return "\n".join([*lines, "---"])


def _hub_base(run: Run | None) -> str | None:
    """Return the hub id of the base; None if it is a local folder or not known."""
    name = "" if run is None else run.recipe.model.name
    return name if name and is_hub_id(name) else None


def license_of(contents: UploadContents) -> str:
    """Return the license in the front matter of the base's own card; `unknown` without one."""
    base = contents.run.record.get("base_folder") if contents.run is not None else None
    try:
        text = (Path(base) / "README.md").read_text(encoding="utf-8") if base else ""
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        front = None
    name = front.get("license") if isinstance(front, dict) else None
    return name if isinstance(name, str) and name else "unknown"


def _summary(contents: UploadContents) -> Iterator[str]:
    run = contents.run
    base = "another model" if run is None else f"`{_without_folder(run.recipe.model.name)}`"
    if run is not None and run.recipe.model.revision:
        base += f" (revision `{run.recipe.model.revision}`)"
    kinds = {
        "adapter": f"{_adapter_name(run)} for {base}, in PEFT's format.",
        "full": f"A full fine-tuning of {base}.",
        "merged": f"A fine-tuning of {base} with LoRA. The adapter is merged into the weights.",
    }
    text = f"{kinds[contents.kind]} Trained with qlora-cli."
    if contents.base is not None:
        text += (
            f" Merged into the {contents.base} weights of the base and written in {contents.dtype}."
        )
    yield text
    if run is not None and run.recipe.adapter.method != "full":
        bits = " and ".join(map(str, sorted(run.recipe.base.all_bits)))
        yield f"During training, the weights of the base were stored in {bits} bit and frozen."


def _adapter_name(run: Run | None) -> str:
    is_head = run is not None and not run.recipe.adapter.has_layers
    return "A classification head" if is_head else "A LoRA adapter"


def _usage(contents: UploadContents, repo: str) -> Iterator[str]:
    task = _classifier(contents)
    purpose = "CausalLM" if task is None else "SequenceClassification"
    if contents.kind == "adapter":
        name = f"AutoPeftModelFor{purpose}"
        # The config of the base states the number of labels that it was made with.
        labels = "" if task is None else f", num_labels={len(task.settings.names) or 1}"
        loaded = f'from peft import {name}\n\nmodel = "{repo}"\n'
        loaded += f"model = {name}.from_pretrained(model{labels})"
    else:
        is_whole = is_composed(read_config(contents.folder / CONFIG))
        name = f"AutoModelFor{'ImageTextToText' if is_whole else purpose}"
        loaded = f"from transformers import {name}, AutoTokenizer\n\n"
        loaded += f'model = {name}.from_pretrained("{repo}")\n'
        loaded += f'tokenizer = AutoTokenizer.from_pretrained("{repo}")'
    yield f"## Use\n\n```python\n{loaded}\n```"


def _classifier(contents: UploadContents) -> ClassificationTask | None:
    """Return the task of a classifier with its labels; None for another model."""
    if contents.kind != "adapter":
        return task_of_model(read_config(contents.folder / CONFIG))
    recipe = contents.run.recipe if contents.run is not None else None
    if recipe is None or recipe.task != CLASSIFICATION.name:
        return None
    return CLASSIFICATION.configured(recipe)


def _verification(contents: UploadContents) -> Iterator[str]:
    if contents.kind != "merged":
        return
    record = contents.verification
    if record is None:
        yield "## Verification\n\nThis merge was not verified."
        return
    lines = [f"Verification {'passed' if record['passed'] else 'FAILED'}."]
    rows = [
        ("mean KL divergence from the trained model (nats)", record.get("mean_kl")),
        ("top-1 agreement", record.get("top1_agreement")),
        ("largest logit difference", record.get("max_logit_difference")),
        ("greedy tokens that agree", record.get("greedy_agreement")),
        ("greedy tokens compared", record.get("greedy_tokens")),
    ]
    lines.append(_table(("measured on held-out rows", ""), rows))
    lines += [f"- {fault}" for fault in record.get("faults", ())]
    lines += [f"- {sentence}" for sentence in record.get("explanation", ())]
    yield "## Verification\n\n" + "\n\n".join(lines)


def _losses(run: Run) -> Iterator[str]:
    result = run.record.get("result") or {}
    labels = {
        "steps": "optimizer steps",
        "train_loss": "training loss",
        "eval_loss_before": "held-out loss before training",
        "eval_loss": "held-out loss",
    }
    rows = [(label, result.get(key)) for key, label in labels.items()]
    if any(value is not None for _, value in rows):
        yield "## Losses\n\n" + _table(("nats per token", ""), rows)


def _memory(run: Run) -> Iterator[str]:
    if not run.folder.memory_json.is_file():
        return
    try:
        ledger = read_json(run.folder.memory_json, Ledger.from_dict)
    except UsageError:  # A damaged ledger does not stop an upload of the model.
        return
    rows = [
        (f"{label} ({peak.source})", format_bytes(peak.peak_bytes))
        for label, peak in (("full fine-tuning", ledger.before), ("this run", ledger.after))
    ]
    rows.append(("ratio", f"{ledger.ratio:.1f}"))
    yield f"## Peak memory of training\n\nDevice: {ledger.device.name}\n\n" + _table(
        ("method", "peak"), rows
    )


def _data(run: Run) -> Iterator[str]:
    data = _local_names(run.recipe.data.model_dump(mode="json"))
    held_out = data.get("eval") or "none"
    yield f"## Data\n\n- training rows: {data['train']}\n- held-out rows: {held_out}"


def _recipe(run: Run) -> Iterator[str]:
    recipe = run.recipe.model_dump(mode="json", exclude_defaults=True)
    recipe.pop("output", None)
    text = "\n".join(f"{key}: {to_yaml(value)}" for key, value in _local_names(recipe).items())
    yield f"## Recipe\n\nSettings that differ from the defaults.\n\n```yaml\n{text}\n```"


def _versions(run: Run) -> Iterator[str]:
    versions = run.record.get("versions")
    if isinstance(versions, Mapping):
        yield "## Versions\n\n" + _table(("package", "version"), list(versions.items()))


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    """Return a Markdown table; rows without a value are left out."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows if value is not None]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _local_names(value: Any) -> Any:
    """Return a recipe's value with each absolute path replaced by the name of its file."""
    if isinstance(value, Mapping):
        return {key: _local_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_local_names(item) for item in value]
    return _without_folder(value) if isinstance(value, str) else value


def _without_folder(name: str) -> str:
    is_path = name.startswith(("/", "~", "./", "../")) or Path(name).is_dir()
    return Path(name).name if is_path else name
