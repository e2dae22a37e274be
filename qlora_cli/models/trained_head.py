"""The parameters of a classification head in a model and in an adapter's folder."""

from __future__ import annotations

import torch
from torch import nn

from qlora_cli.adapters.peft_file import MAX_LISTED, AdapterFile
from qlora_cli.errors import ModelError
from qlora_cli.files.safetensors_io import read_tensor
from qlora_cli.models.model import LoadedModel


def head_parameters(loaded: LoadedModel) -> dict[str, nn.Parameter]:
    """Return name -> parameter of a classification head; empty for a language model."""
    return {
        f"{path}.{name}": parameter
        for path in loaded.family.classifier.modules
        for name, parameter in loaded.model.get_submodule(path).named_parameters()
    }


@torch.no_grad()
def load_head(loaded: LoadedModel, adapter: AdapterFile) -> None:
    """Copy the head of an adapter, which was checked, into the head that `loaded` has."""
    for name, parameter in head_parameters(loaded).items():
        parameter.copy_(read_tensor(adapter.saved[name]))


def check_head(loaded: LoadedModel, adapter: AdapterFile) -> None:
    """Raise ModelError if an adapter has not the head of the model: other labels or another task.

    The shapes of the head depend on the number of labels.
    """
    expected = dict(loaded.family.classifier.shapes)
    stored = {name: entry.shape for name, entry in adapter.saved.items()}
    if stored == expected:
        return
    if not expected:
        what = "the adapter has a classification head, and the model is not a classifier"
    elif not stored:
        what = "the adapter has no classification head, and the model is a classifier"
    else:
        names = sorted(name for name in expected if stored.get(name) != expected[name])
        what = f"the classification heads differ in {', '.join(names[:MAX_LISTED])}"
    raise ModelError(
        what, where=str(adapter.folder), hint="use an adapter of the same task and labels"
    )
