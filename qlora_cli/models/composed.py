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
    """Return the path of the module that maps token ids to hidden states; "" if there is none."""
    modules = dict(model.named_modules())
    path: str = model.base_model_prefix
    if hasattr(model.config, "text_config"):
        decoder = model.get_decoder()
        path = next((path for path, module in modules.items() if module is decoder), "")
    path = path if path in modules else ""
    head = model.get_output_embeddings()
    # Llama 4 names its whole language model, with the head, or a module that it does not have.
    while not path or any(module is head for module in modules[path].modules()):
        parts = (name for name, part in modules[path].named_children() if _has_blocks(part))
        name = next(parts, None)
        if name is None:
            return ""
        path = f"{path}.{name}" if path else name
    return path


def _has_blocks(module: nn.Module) -> bool:
    return any(isinstance(part, nn.ModuleList) for part in module.modules())


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
