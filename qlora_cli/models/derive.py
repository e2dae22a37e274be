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
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import ModelError
from qlora_cli.models.buffers import created_buffers, persistent_buffers
from qlora_cli.models.conversions import parameter_names, stacked_parts
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
    found = list(model.get_submodule(blocks))
    experts = tuple(dict.fromkeys(path for path, module in _modules(found) if has_experts(module)))
    stacks = stacked_parts(
        model,
        {n: p for n, p in model.named_parameters() if p.dim() == 3 and _is_in(n, blocks, experts)},
    )
    _check_tensors(model, found, blocks)
    buffers = created_buffers(model)
    _check_buffers(model, buffers)
    head = _head_path(model)
    embeddings = tuple(_embedding_paths(model, blocks))
    unquantized = tuple(dict.fromkeys(_read_directly(found)))
    can_set_attention = type(model)._can_set_attn_implementation()
    return Family(
        name=config.model_type,
        model_types=(config.model_type,),
        backbone=backbone,
        blocks=blocks,
        head=head,
        embeddings=embeddings,
        embedding_scale=measured_scale(model, embeddings[0], buffers),
        linears=tuple(_linears(found, unquantized)),
        unquantized=unquantized,
        blocks_differ=any(_structure(block) != _structure(found[0]) for block in found),
        mlp=_mlp(model, found),
        norms=tuple(_norms(found)),
        final_norm=_final_norm(model, backbone, blocks),
        dropouts=tuple(dropout_keys(config)),
        ignored=(".rotary_emb.inv_freq",),
        rename=parameter_names(model, stacks),
        experts=experts,
        stacks=stacks,
        logits=measured_transform(model, backbone, head),
        own_attention=not can_set_attention,
        packs=can_set_attention and not any(map(_mixes_tokens, found)),
        merged_attention=_merged_attention(model),
    )


def has_experts(module: nn.Module) -> bool:
    """Return whether a module has stacked experts that `Experts` can replace."""
    is_stack = hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")
    return is_stack and not getattr(module, "has_post_expert_norm", False)


def _is_in(name: str, blocks: str, paths: Sequence[str]) -> bool:
    """Return whether a parameter belongs to a module at one of `paths` of a block."""
    within = name.removeprefix(f"{blocks}.").partition(".")[2].rpartition(".")[0]
    return name.startswith(f"{blocks}.") and within in paths


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


def _structure(block: nn.Module) -> set[tuple[str, str]]:
    """Return (path, class and shapes) of every module with tensors in a block."""
    return {
        (path, f"{type(child).__name__}{[tuple(p.shape) for p in child.parameters(recurse=False)]}")
        for path, child in block.named_modules()
    }


def _check_tensors(model: Any, found: Sequence[nn.Module], blocks: str) -> None:
    """Raise ModelError for weights with more dimensions than a matrix.

    A matrix that is not a linear, such as a router, stays as it is.
    """
    for path, module in _modules(found):
        for name, parameter in module.named_parameters(recurse=False):
            is_known = isinstance(module, nn.Conv1d) or has_experts(module)
            if parameter.dim() > 2 and not is_known:
                raise unsupported(
                    model.config,
                    f"{blocks}.*.{path}.{name} of {type(module).__name__} has "
                    f"{parameter.dim()} dimensions and is not a linear",
                )


def _check_buffers(model: Any, buffers: Mapping[str, Tensor | None]) -> None:
    """Raise ModelError for a buffer that is in no checkpoint and that cannot be created."""
    for path, value in buffers.items():
        parent, _, name = path.rpartition(".")
        if value is None and name not in persistent_buffers(model.get_submodule(parent)):
            raise unsupported(model.config, f"it is not known how the buffer {path} is created")


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


@cache
def _source(module_class: Any) -> str:
    return inspect.getsource(module_class)


def _modules(blocks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path in its block, module) of all blocks: those of the first block first."""
    for block in blocks:
        yield from block.named_modules()


def _linears(blocks: Sequence[nn.Module], unquantized: Sequence[str]) -> Iterator[LinearSpec]:
    linears = {path: module for path, module in _modules(blocks) if is_linear(module)}
    for path, module in linears.items():
        if path not in unquantized:
            yield LinearSpec(path, (_role(path),), transposed=isinstance(module, Conv1D))


def _read_directly(blocks: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the paths of linears whose weights the code of their parent reads.

    A packed weight or an adapter would be ignored there, so such linears stay as they are.
    """
    for path, module in _modules(blocks):
        names = [name for name, child in module.named_children() if is_linear(child)]
        if names and type(module).__module__.startswith("transformers."):
            code = _source(type(module))
            prefix = f"{path}." if path else ""
            yield from (prefix + name for name in names if f"self.{name}.weight" in code)


def _norms(blocks: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the paths at which every block that has them has a norm of ours."""
    is_ours: dict[str, bool] = {}
    for path, module in _modules(blocks):
        is_ours[path] = is_ours.get(path, True) and _is_our_norm(module, path)
    yield from (path for path, ours in is_ours.items() if ours)


def _role(path: str) -> str:
    """Return the role of the linear at `path` within a block."""
    parent, _, name = path.rpartition(".")
    if name in _OUTPUTS:
        return "o" if "att" in parent.lower() else "down"
    return ROLES.get(name, name)


def _mlp(model: Any, blocks: Sequence[nn.Module]) -> MlpSpec | None:
    """Return the MLP that `Mlp` can replace, or None: then transformers' own one stays."""
    for path, module in _modules(blocks):
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
