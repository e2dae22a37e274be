"""The language model inside a composed model of transformers, such as vision and text."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_cli.files.composed import is_composed


def auto_class(config: Any, model_class: Any) -> Any:
    """Return the transformers Auto class that creates the model of a config.

    model_class: the Auto class of the task, for a language model alone.
    """
    if not is_composed(config):
        return model_class
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText


def language_model_path(model: Any) -> str:
    """Return the path of the module that maps token ids to hidden states."""
    if not hasattr(model.config, "text_config"):
        prefix: str = model.base_model_prefix
        return prefix
    decoder = model.get_decoder()
    return next((path for path, module in model.named_modules() if module is decoder), "")


def other_parts(model: Any, backbone: str, head: str) -> tuple[str, ...]:
    """Return the paths of the modules next to the language model: vision tower, projector.

    backbone, head: paths of the language model and of its head.
    """
    if not hasattr(model.config, "text_config"):
        return ()
    found: list[str] = []
    ancestors = backbone.split(".")
    for depth in range(len(ancestors)):
        parent = ".".join(ancestors[:depth])
        for name, _ in model.get_submodule(parent).named_children():
            path = f"{parent}.{name}" if parent else name
            if path != head and not f"{backbone}.".startswith(f"{path}."):
                found.append(path)
    return tuple(found)


def modules_inside(model: nn.Module, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Return the paths of all modules in the modules at `paths`."""
    return tuple(
        name for path in paths for name, _ in model.get_submodule(path).named_modules(prefix=path)
    )


def remove_other_parts(model: nn.Module, paths: tuple[str, ...]) -> None:
    """Remove modules that the language model does not use. Their weights are never loaded."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)
