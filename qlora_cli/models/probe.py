"""Runs a model on meta once: which attention computes it, and which linears have an effect."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.files.composed import text_config_of
from qlora_cli.models.derive_blocks import is_linear, structure_of
from qlora_cli.models.registry import unsupported
from qlora_cli.nn.full_mask import full_mask
from qlora_cli.nn.spans import Spans, use_spans

_NUM_TOKENS = 3
"""Tokens of the run; more if the model attends to groups of tokens (`compress_rates`)."""
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def takes_positions(backbone: nn.Module) -> bool:
    """Return whether positions can be passed to the backbone, or to the only part of a wrapper."""
    parameters = inspect.signature(backbone.forward).parameters
    if "position_ids" in parameters:
        return True
    children = list(backbone.children())
    is_wrapper = all(p.kind in _VARIABLE for p in parameters.values())
    return is_wrapper and len(children) == 1 and takes_positions(children[0])


def arguments_of(config: Any, backbone: nn.Module) -> dict[str, int]:
    """Return the arguments of the backbone with one value for all rows: X-MOD's language.

    config: of the language model. Raises ModelError if it does not name the language.
    """
    if "lang_ids" not in inspect.signature(backbone.forward).parameters:
        return {}
    if config.default_language not in config.languages:
        raise unsupported(
            config,
            f"its config.json must name the language of the rows, one of "
            f"{', '.join(config.languages)}, as default_language",
        )
    return {"lang_ids": list(config.languages).index(config.default_language)}


def constant_arguments(values: Mapping[str, int]) -> dict[str, Tensor]:
    """Return arguments of a backbone for one sequence. values: name -> value.

    The tensors are on the CPU: the model selects by their values, also in a dry run.
    """
    return {name: torch.tensor([value], device="cpu") for name, value in values.items()}


@dataclass(frozen=True)
class Probe:
    """What one forward pass of a model showed.

    idle: paths, within a block, of linears without an effect that has a gradient: they are not
    called, or they only choose tokens. adds_tokens: the blocks get more tokens than the model.
    """

    idle: tuple[str, ...] = ()
    adds_tokens: bool = False


def probe(model: Any, backbone: str, blocks: str, has_mask: bool) -> Probe | None:
    """Run the first blocks of a model on meta, so many that every kind is among them.

    has_mask: the model gets a mask. Returns None if the model fails, also with all blocks.
    """
    found = list(model.get_submodule(blocks))
    kinds = [
        f"{structure_of(block)} {_layer_kind(text_config_of(model), i)}"
        for i, block in enumerate(found)
    ]
    number = max(kinds.index(kind) for kind in kinds) + 1
    if number < len(found):
        with _first_blocks(model, blocks, number):
            shorter = _probe(model, backbone, blocks, has_mask)
        if shorter is not None:
            return shorter
    return _probe(model, backbone, blocks, has_mask)


@contextmanager
def _first_blocks(model: Any, blocks: str, number: int) -> Iterator[None]:
    """Let the model have its first `number` blocks only, inside the block."""
    parent, _, name = blocks.rpartition(".")
    owner, old = model.get_submodule(parent), model.get_submodule(blocks)
    setattr(owner, name, nn.ModuleList(list(old)[:number]))
    try:
        yield
    finally:
        setattr(owner, name, old)


def _layer_kind(config: Any, index: int) -> str:
    """Return the kind of a layer by the config, if it names kinds."""
    kinds = getattr(config, "layer_types", None) or ()
    return str(kinds[index]) if index < len(kinds) else ""


def _probe(model: Any, backbone: str, blocks: str, has_mask: bool) -> Probe | None:
    num_tokens = max(
        [_NUM_TOKENS, *(getattr(text_config_of(model), "compress_rates", None) or {}).values()]
    )
    has_other_length: list[bool] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        # Gemma 3n has several hidden states of each token: (states, 1, T, d).
        has_other_length.append(hidden is not None and num_tokens not in hidden.shape[1:-1])

    ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    parts = model.get_submodule(backbone)
    arguments = constant_arguments(arguments_of(text_config_of(model), parts))
    if has_mask:
        arguments["attention_mask"] = full_mask(num_tokens, ids.device)
    found = model.get_submodule(blocks)
    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in found]
    try:
        with torch.enable_grad(), use_spans(Spans((num_tokens,), "cpu")):
            hidden: Tensor = parts(input_ids=ids, use_cache=False, **arguments)[0]
            has_effect = _has_gradient(model, hidden)
    except Exception:  # Code of any model class runs here.
        return None
    finally:
        for handle in handles:
            handle.remove()
    return Probe(tuple(_idle(found, has_effect)), any(has_other_length))


def _has_gradient(model: nn.Module, hidden: Tensor) -> set[int]:
    """Return the ids of the linears' weights that have a gradient."""
    weights: Any = [module.weight for module in model.modules() if is_linear(module)]
    gradients = torch.autograd.grad(hidden.sum(), weights, allow_unused=True)
    return {id(w) for w, grad in zip(weights, gradients, strict=True) if grad is not None}


def _idle(blocks: Iterable[nn.Module], has_effect: Container[int]) -> Iterator[str]:
    """Yield the paths of linears that have no effect in any of the blocks."""
    found: dict[str, bool] = {}
    for block in blocks:
        for path, module in block.named_modules():
            if is_linear(module):
                found[path] = found.get(path, False) or id(module.weight) in has_effect
    yield from (path for path, is_used in found.items() if not is_used)
