"""The language model inside a composed model of transformers, such as vision and text."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from qlora_cli.files.composed import is_composed, model_type_of
from qlora_cli.nn.full_mask import full_mask

_PARTS = ("vision_config", "audio_config")
"""Keys of a config with the configs of parts for images and sound."""
_NUM_TOKENS = 3


def auto_class(config: Any, model_class: Any) -> Any:
    """Return the transformers Auto class that creates the model of a config.

    model_class: the Auto class of the task, for a language model alone.
    """
    if not is_composed(config):
        return model_class
    from transformers import AutoModelForImageTextToText

    # A model for sound and text is only in the list of causal language models.
    is_listed = model_type_of(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if is_listed else model_class


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
        return _parts_without_text(model, backbone)
    found: list[str] = []
    ancestors = backbone.split(".")
    for depth in range(len(ancestors)):
        parent = ".".join(ancestors[:depth])
        for name, _ in model.get_submodule(parent).named_children():
            path = f"{parent}.{name}" if parent else name
            if path != head and not f"{backbone}.".startswith(f"{path}."):
                found.append(path)
    return tuple(found)


def _parts_without_text(model: Any, backbone: str) -> tuple[str, ...]:
    """Return the paths of the modules in the language model that rows of text do not run.

    Some models contain their parts for images or sound in the language model (GIT, Phi-4
    multimodal). Other models have no such parts.
    """
    if not any(hasattr(getattr(model.config, key, None), "to_dict") for key in _PARTS):
        return ()
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
        for path, module in model.named_modules()
    ]
    ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model.get_submodule(backbone)(
                input_ids=ids, use_cache=False, attention_mask=full_mask(_NUM_TOKENS, ids.device)
            )
    except Exception:  # Code of any model class runs here. The laws find what is wrong.
        return ()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_uncalled(model.get_submodule(backbone), backbone, called))


def _uncalled(module: nn.Module, path: str, called: Collection[str]) -> Iterator[str]:
    """Yield the paths of the outermost modules with weights of which no part was called."""
    for name, child in module.named_children():
        inside = f"{path}.{name}"
        if any(f"{one}.".startswith(f"{inside}.") for one in called):
            yield from _uncalled(child, inside, called)
        elif any(True for _ in child.parameters()):
            yield inside


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
