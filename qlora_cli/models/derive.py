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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from qlora_cli.files.composed import text_config_of
from qlora_cli.models.buffers import created_buffers, persistent_buffers
from qlora_cli.models.causality import check_causal
from qlora_cli.models.composed import language_model_path, modules_inside, other_parts
from qlora_cli.models.conversions import Stacks, parameter_names, parts_of_rows, stacked_parts
from qlora_cli.models.derive_blocks import (
    has_experts,
    is_linear,
    is_our_norm,
    linears_of,
    mlp_of,
    modules_of,
    norms_of,
    read_directly,
    structure_of,
)
from qlora_cli.models.family import Family, RowSettings
from qlora_cli.models.head import measured_head
from qlora_cli.models.mixers import mixers_of, position_tables
from qlora_cli.models.probe import Probe, arguments_of, probe, takes_positions
from qlora_cli.models.registry import unsupported
from qlora_cli.models.tables import is_plain_table, measured_scale
from qlora_cli.models.tying import share_modules, shared_modules, tied_names
from qlora_cli.models.weight_reads import read_weights
from qlora_cli.nn import attention, stacked_experts
from qlora_cli.nn.own_experts import has_own_experts
from qlora_cli.nn.plannable import replace_value_dependent

_DROPOUT = re.compile(r"dropout|drop_rate|layerdrop|_pdrop|_drop$|jitter_noise$")


def derive_family(model: Any) -> Family:
    """Return the family of a model on meta that transformers created.

    Raises ModelError, with the reason, for a model that a `Family` cannot describe.
    """
    family = derive_backbone(model, _head_path)
    outermost = family.backbone.partition(".")[0]
    is_outside = not family.head.startswith(f"{outermost}.")
    code = measured_head(model, outermost if is_outside else family.backbone, family.head)
    return replace(family, logits=code.transform, has_head_input=code.has_own_input)


def derive_backbone(model: Any, head_path: Callable[[Any], str]) -> Family:
    """Return the family of a model on meta, without what it does with the output of its head.

    head_path: returns the path of the head. Errors as of `derive_family`.
    """
    config = text_config_of(model)
    backbone = language_model_path(model)
    if not backbone:
        raise unsupported(config, "it has no module for its hidden states")
    check_causal(model, model.get_submodule(backbone))
    head = head_path(model)
    others = other_parts(model, backbone, head)
    blocks = _blocks_path(model, backbone, others)
    found = list(model.get_submodule(blocks))
    experts, stacks = _experts(model, blocks, found)
    tied = tied_names(model, head, others)
    shared = shared_modules(model, tied)
    tied = {name: other for name, other in tied.items() if name.rpartition(".")[0] not in shared}
    share_modules(model, shared)
    row_parts = parts_of_rows(model, list(_convolutions(model, blocks)))
    embeddings = tuple(_embedding_paths(model, blocks, others))
    if experts:
        model.set_experts_implementation(stacked_experts.NAME)
    replace_value_dependent(model)
    own_attention, probed = _attention(model, backbone, blocks)
    unquantized = tuple(dict.fromkeys((*read_directly(found), *probed.idle)))
    has_positions = takes_positions(model.get_submodule(backbone))
    rows = RowSettings(
        own_attention=own_attention,
        packs=not probed.adds_tokens,
        mixers=tuple(mixers_of(found, own_attention)),
        takes_positions=has_positions,
        first_position=_first_position(model, embeddings),
        counting_tables=() if has_positions else tuple(_counting_tables(model, backbone, found)),
        arguments=arguments_of(config, model.get_submodule(backbone)),
    )
    return Family(
        name=model.config.model_type,
        model_types=(model.config.model_type,),
        backbone=backbone,
        blocks=blocks,
        head=head,
        embeddings=embeddings,
        embedding_scale=measured_scale(model, embeddings[0], _buffers(model, others)),
        linears=tuple(linears_of(config, found, unquantized)),
        unquantized=unquantized,
        blocks_differ=any(structure_of(block) != structure_of(found[0]) for block in found),
        mlp=mlp_of(model, found),
        norms=tuple(norms_of(found)),
        final_norm=_final_norm(model, backbone, blocks),
        dropouts=tuple(dropout_keys(config)),
        ignored=(".rotary_emb.inv_freq",),
        rename=parameter_names(model, stacks, row_parts, others),
        row_parts=row_parts,
        experts=experts,
        kept_stacks=tuple(dict.fromkeys(_kept_stacks(found))),
        stacks=stacks,
        rows=rows,
        tied=tied,
        shared=shared,
        merged_attention=_merged_attention(model, backbone),
        others=others,
        other_modules=modules_inside(model, others),
    )


def _experts(model: Any, blocks: str, found: Sequence[nn.Module]) -> tuple[tuple[str, ...], Stacks]:
    """Return the paths of experts within a block, and the parts of their stacks in a checkpoint."""
    paths = dict.fromkeys(path for path, module in modules_of(found) if has_experts(module))
    own = dict.fromkeys(path for path, module in modules_of(found) if has_own_experts(module))
    stacks = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and _is_in(name, blocks, (*paths, *own))
    }
    return tuple(paths), stacked_parts(model, stacks)


def _convolutions(model: Any, blocks: str) -> Iterator[str]:
    """Yield the names of the weights of convolutions in the blocks."""
    for path, module in model.get_submodule(blocks).named_modules(prefix=blocks):
        if isinstance(module, nn.Conv1d):
            yield f"{path}.weight"


def _is_in(name: str, blocks: str, paths: Sequence[str]) -> bool:
    """Return whether a parameter belongs to a module at one of `paths` of a block."""
    within = name.removeprefix(f"{blocks}.").partition(".")[2].rpartition(".")[0]
    return name.startswith(f"{blocks}.") and within in paths


def _blocks_path(model: Any, backbone: str, others: Sequence[str]) -> str:
    """Return the path of the only list of modules that contains linears.

    A list of linears, such as Gemma 3n has next to its blocks, is not counted.
    """
    found: list[str] = []
    for path, module in model.get_submodule(backbone).named_modules(prefix=backbone):
        is_inside = any(path.startswith(f"{outer}.") for outer in (*found, *others))
        if isinstance(module, nn.ModuleList) and not is_inside and _has_blocks(module):
            found.append(path)
    if len(found) != 1:
        lists = ", ".join(found) or "none"
        raise unsupported(model.config, f"one list of blocks is needed; it has {lists}")
    return found[0]


def _has_blocks(modules: nn.ModuleList) -> bool:
    blocks = (module for module in modules if not is_linear(module))
    return any(is_linear(child) for block in blocks for child in block.modules())


def _kept_stacks(found: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the paths, within a block, of large weights with more dimensions than a matrix.

    They stay as they are, as does a matrix that is not a linear, such as a router. Matrices of
    experts with code of their own are such weights, too.
    """
    own = {id(part) for _, m in modules_of(found) if has_own_experts(m) for part in m.children()}
    for path, module in modules_of(found):
        for name, parameter in module.named_parameters(recurse=False):
            is_known = isinstance(module, nn.Conv1d) or has_experts(module) or is_linear(module)
            is_stack = sum(size > 1 for size in parameter.shape) > 2 or id(module) in own
            if is_stack and not is_known:
                yield f"{path}.{name}"


def _buffers(model: Any, others: Sequence[str]) -> Mapping[str, Tensor | None]:
    """Return path -> value of the model's buffers.

    Raises ModelError for a buffer that is in no checkpoint and that cannot be created.
    """
    buffers = created_buffers(model)
    for path, value in buffers.items():
        parent, _, name = path.rpartition(".")
        if value is not None or path.startswith(tuple(f"{other}." for other in others)):
            continue
        if name not in persistent_buffers(model.get_submodule(parent)):
            raise unsupported(model.config, f"it is not known how the buffer {path} is created")
    return buffers


def _attention(model: Any, backbone: str, blocks: str) -> tuple[bool, Probe]:
    """Return whether the model needs transformers' attention with a mask, and what a probe found.

    It then gets transformers' attention.
    """
    if not _can_set_attention(model, backbone):
        return True, probe(model, backbone, blocks, has_mask=True) or Probe()
    found = probe(model, backbone, blocks, has_mask=False)
    if found is not None:
        return False, found
    model.set_attn_implementation("eager")
    found = probe(model, backbone, blocks, has_mask=True)
    if found is None:
        # The attention is not the cause. The laws find what is.
        model.set_attn_implementation(attention.NAME)
        return False, Probe()
    return True, found


def _counting_tables(model: Any, backbone: str, found: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the paths of position tables to which no positions can be passed."""
    for path in position_tables(model.get_submodule(backbone), found):
        yield f"{backbone}.{path}"


def _can_set_attention(model: Any, backbone: str) -> bool:
    """Return whether the classes of a model and of its language model use the interface."""
    if text_config_of(model)._attn_implementation != attention.NAME:
        return False
    parts = (model, model.get_submodule(backbone))
    checks = (getattr(part, "_can_set_attn_implementation", lambda: True) for part in parts)
    return all(check() for check in checks)


def _merged_attention(model: Any, backbone: str) -> Literal["sdpa", "eager"]:
    """Return the attention of transformers that computes this model; SDPA if it does."""
    module = sys.modules[type(model.get_submodule(backbone)).__module__]
    eager = getattr(module, "eager_attention_forward", None)
    has_soft_cap = eager is not None and "softcap" in inspect.signature(eager).parameters
    return "sdpa" if model._supports_sdpa and not has_soft_cap else "eager"


def _head_path(model: Any) -> str:
    """Return the path of the head, a linear."""
    head = model.get_output_embeddings()
    path: str | None = next((p for p, module in model.named_modules() if module is head), None)
    if path is None or not isinstance(head, nn.Linear):
        raise unsupported(model.config, "its head is not a linear")
    return path


def _embedding_paths(model: Any, blocks: str, others: Sequence[str]) -> Iterator[str]:
    """Yield the path of the token table, then those of other plain tables outside the blocks."""
    outside = tuple(f"{path}." for path in (blocks, *others))
    tokens = model.get_input_embeddings()
    yield next(path for path, module in model.named_modules() if module is tokens)
    for path, module in model.named_modules():
        is_other = module is not tokens and not path.startswith(outside)
        if isinstance(module, nn.Embedding) and is_other and is_plain_table(module, path):
            parent, _, name = path.rpartition(".")
            # DeBERTa's relative positions are a matrix, which is read and not looked up.
            if name not in read_weights(model.get_submodule(parent)):
                yield path


def _first_position(model: Any, embeddings: Sequence[str]) -> int:
    """Return the position of the first token: the one after padding in a table that has one.

    embeddings: path of the token table, then those of other tables.
    """
    tables = [model.get_submodule(path) for path in embeddings[1:] if "position" in path]
    return max(
        (table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0
    )


def _final_norm(model: Any, backbone: str, blocks: str) -> str | None:
    """Return the path of an RMSNorm of ours next to the list of blocks, if there is one."""
    modules: Iterator[tuple[str, nn.Module]] = model.get_submodule(backbone).named_modules(
        prefix=backbone
    )
    outside = ((path, module) for path, module in modules if not path.startswith(f"{blocks}."))
    return next((path for path, module in outside if is_our_norm(module, path)), None)


def dropout_keys(config: Any) -> Iterator[str]:
    """Yield the keys of the config with a dropout rate, or with noise in the router of experts."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and _DROPOUT.search(key):
            yield key
