"""Derives the family of a model type that has no file in `families/`, from transformers' own model.

The result describes what is found: paths, roles by name, and the norms and MLPs for which our
layers compute the same values. Whether the package trains such a model correctly is not decided
here: `proof/` proves it on a small model at the first use. What a `Family` cannot describe is
refused with the reason.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import ModelError
from qlora_cli.models.buffers import created_buffers, persistent_buffers
from qlora_cli.models.coverage import check_mlp, check_norm
from qlora_cli.models.family import Family, LinearSpec, MlpSpec
from qlora_cli.models.head import measured_transform
from qlora_cli.models.registry import unsupported
from qlora_cli.models.tables import is_plain_table, measured_scale
from qlora_cli.nn.mlp import ACTIVATIONS, Projections

ROLES: Mapping[str, str] = {
    "q_proj": "q",
    "query": "q",
    "k_proj": "k",
    "key": "k",
    "v_proj": "v",
    "value": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "fc1": "up",
    "fc_in": "up",
    "c_fc": "up",
    "dense_h_to_4h": "up",
    "down_proj": "down",
    "fc2": "down",
    "fc_out": "down",
    "dense_4h_to_h": "down",
}
"""Name of a linear -> its role. A linear with another name has its own name as its role."""
_OUTPUTS = ("out_proj", "dense", "c_proj", "proj")
"""Names that are used for the last linear of attention and of an MLP."""
_PROJECTIONS = (
    Projections(gate="gate_proj", up="up_proj", down="down_proj"),
    Projections(gate=None, up="up_proj", down="down_proj"),
    Projections(gate=None, up="fc1", down="fc2"),
    Projections(gate=None, up="c_fc", down="c_proj"),
    Projections(gate=None, up="dense_h_to_4h", down="dense_4h_to_h"),
    Projections(gate=None, up="fc_in", down="fc_out"),
)
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
_DROPOUT = re.compile(r"dropout|drop_rate|layerdrop|_pdrop|_drop$")


def derive_family(model: Any) -> Family:
    """Return the family of a model on meta that transformers created.

    Raises ModelError, with the reason, for a model that a `Family` cannot describe.
    """
    config = model.config
    backbone = model.base_model_prefix
    if not isinstance(getattr(model, backbone, None), nn.Module):
        raise unsupported(config, f"it has no module {backbone!r} for its hidden states")
    blocks = _blocks_path(model, backbone)
    block = _first_of_equal_blocks(model, blocks)
    _check_tensors(model, block, blocks)
    head = _head_path(model)
    embeddings = tuple(_embedding_paths(model, blocks))
    table = model.get_submodule(embeddings[0])
    return Family(
        name=config.model_type,
        model_types=(config.model_type,),
        backbone=backbone,
        blocks=blocks,
        head=head,
        embeddings=embeddings,
        embedding_scale=measured_scale(model, table, embeddings[0]),
        linears=tuple(_linears(block)),
        mlp=_mlp(model, block),
        norms=tuple(path for path, child in block.named_modules() if _is_our_norm(child, path)),
        final_norm=_final_norm(model, backbone, blocks),
        dropouts=tuple(dropout_keys(config)),
        ignored=(".rotary_emb.inv_freq",),
        logits=measured_transform(model, backbone, head),
        own_attention=not type(model)._can_set_attn_implementation(),
        packs=type(model)._can_set_attn_implementation() and not _mixes_tokens(block),
        merged_attention=_merged_attention(model),
    )


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a plain linear or transformers' transposed one."""
    return isinstance(module, nn.Linear | Conv1D)


def _blocks_path(model: Any, backbone: str) -> str:
    """Return the path of the only list of modules that contains linears."""
    found: list[str] = []
    for path, module in model.get_submodule(backbone).named_modules(prefix=backbone):
        is_inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not is_inside and _has_linears(module):
            found.append(path)
    if len(found) != 1:
        lists = ", ".join(found) or "none"
        raise unsupported(model.config, f"one list of blocks is needed; it has {lists}")
    return found[0]


def _has_linears(module: nn.Module) -> bool:
    return any(is_linear(child) for child in module.modules())


def _first_of_equal_blocks(model: Any, blocks: str) -> nn.Module:
    """Return the first block. Raises ModelError if another one has other modules."""
    first, *others = model.get_submodule(blocks)
    structure = _structure(first)
    for index, block in enumerate(others, 1):
        if different := sorted(structure ^ _structure(block)):
            path, kind = different[0]
            raise unsupported(
                model.config, f"blocks 0 and {index} differ: only one has {path or kind} ({kind})"
            )
    return first  # type: ignore[no-any-return]


def _structure(block: nn.Module) -> set[tuple[str, str]]:
    """Return (path, class and shapes) of every module with tensors in a block."""
    return {
        (path, f"{type(child).__name__}{[tuple(p.shape) for p in child.parameters(recurse=False)]}")
        for path, child in block.named_modules()
    }


def _check_tensors(model: Any, block: nn.Module, blocks: str) -> None:
    """Raise ModelError for weights with more dimensions than a matrix, and for unknown buffers.

    A matrix that is not a linear, such as a router, stays as it is.
    """
    for path, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2 and not isinstance(module, nn.Conv1d):
                raise unsupported(
                    model.config,
                    f"{blocks}.*.{path}.{name} of {type(module).__name__} has "
                    f"{parameter.dim()} dimensions and is not a linear",
                )
    for path, module in model.named_modules():
        for name, value in created_buffers(model, module).items():
            if value is None and name not in persistent_buffers(module):
                raise unsupported(
                    model.config, f"it is not known how {path}.{name} is created, a buffer"
                )


def _mixes_tokens(block: nn.Module) -> bool:
    """Return whether a part of a block other than attention mixes tokens, such as a convolution."""
    return any(
        isinstance(module, nn.Conv1d) or hasattr(module, "A_log") for module in block.modules()
    )


def _merged_attention(model: Any) -> Literal["sdpa", "eager"]:
    """Return the attention of transformers that computes this model; SDPA if it does."""
    eager = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    has_soft_cap = eager is not None and "softcap" in inspect.signature(eager).parameters
    return "sdpa" if model._supports_sdpa and not has_soft_cap else "eager"


def _head_path(model: Any) -> str:
    """Return the path of the head, a linear."""
    head = model.get_output_embeddings()
    path: str | None = next((p for p, module in model.named_modules() if module is head), None)
    if path is None or not isinstance(head, nn.Linear):
        raise unsupported(model.config, "its head is not a linear")
    return path


def _embedding_paths(model: Any, blocks: str) -> Iterator[str]:
    """Yield the path of the token table, then those of other plain tables outside the blocks."""
    tokens = model.get_input_embeddings()
    yield next(path for path, module in model.named_modules() if module is tokens)
    for path, module in model.named_modules():
        is_other = module is not tokens and not path.startswith(f"{blocks}.")
        if isinstance(module, nn.Embedding) and is_other and is_plain_table(module, path):
            yield path


def _linears(block: nn.Module) -> Iterator[LinearSpec]:
    for path, module in block.named_modules():
        if is_linear(module):
            yield LinearSpec(path, (_role(path),), transposed=isinstance(module, Conv1D))


def _role(path: str) -> str:
    """Return the role of the linear at `path` within a block."""
    parent, _, name = path.rpartition(".")
    if name in _OUTPUTS:
        return "o" if "att" in parent.lower() else "down"
    return ROLES.get(name, name)


def _mlp(model: Any, block: nn.Module) -> MlpSpec | None:
    """Return the MLP that `Mlp` can replace, or None: then transformers' own one stays."""
    for path, module in block.named_modules():
        linears = {name for name, child in module.named_children() if is_linear(child)}
        for projections in _PROJECTIONS:
            if linears == set(projections.names):
                key = _activation_key(model.config, module, projections)
                return MlpSpec(path, projections, key) if key else None
    return None


def _activation_key(config: Any, module: nn.Module, projections: Projections) -> str | None:
    """Return the key of the config that names the MLP's activation, if `Mlp` computes the same."""
    for key in _ACTIVATION_KEYS:
        name = getattr(config, key, None)
        if isinstance(name, str) and name in ACTIVATIONS:
            try:
                check_mlp(module, "mlp", projections, ACTIVATIONS[name])
            except ModelError:
                return None
            return str(key)
    return None


def _is_our_norm(module: nn.Module, path: str) -> bool:
    """Return whether `RmsNorm` computes the same as this module."""
    if any(True for _ in module.children()) or not hasattr(module, "variance_epsilon"):
        return False
    try:
        check_norm(module, path)
    except (ModelError, TypeError):
        return False
    return True


def _final_norm(model: Any, backbone: str, blocks: str) -> str | None:
    """Return the path of an RMSNorm of ours next to the list of blocks, if there is one."""
    modules: Iterator[tuple[str, nn.Module]] = model.get_submodule(backbone).named_modules(
        prefix=backbone
    )
    outside = ((path, module) for path, module in modules if not path.startswith(f"{blocks}."))
    return next((path for path, module in outside if _is_our_norm(module, path)), None)


def dropout_keys(config: Any) -> Iterator[str]:
    """Yield the keys of the config with a dropout rate."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and _DROPOUT.search(key):
            yield key
