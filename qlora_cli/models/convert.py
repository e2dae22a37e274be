"""Module replacement: turns a transformers model on `meta` into one with this package's layers.

Nothing is loaded here. The result has an empty parameter for every tensor of the checkpoint, and
`models/placement/` fills them. A dry run converts the model in the same way. `models/coverage.py`
checks each module before it is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.models.base_format import BaseFormat
from qlora_cli.models.coverage import check_embedding, check_linear, check_mlp, check_norm
from qlora_cli.models.family import AttentionSpec, Family
from qlora_cli.models.tables import norm_of_table
from qlora_cli.nn.embedding import FrozenEmbedding, HostEmbedding
from qlora_cli.nn.experts import Experts
from qlora_cli.nn.host_head import HostHead
from qlora_cli.nn.mlp import ACTIVATIONS, Mlp, Projections
from qlora_cli.nn.norm import RmsNorm
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.nn.shared_input import share_input
from qlora_cli.nn.site import Site


def replace_linears(
    model: nn.Module,
    sites: Sequence[Site],
    base_format: BaseFormat,
    wrap: Callable[[QuantLinear, Site], nn.Module] | None = None,
) -> None:
    """Replace the module of every site by a packed linear without a weight.

    wrap: returns the module to put in place, such as the packed linear with an adapter. Raises
    ModelError if a module is not a plain linear.
    """
    for site in sites:
        check_linear(model.get_submodule(site.path), site.path)
        sizes = (site.in_features, site.out_features, site.bias)
        packed = QuantLinear(*sizes, base_format.of(site))
        replace_module(model, site.path, wrap(packed, site) if wrap is not None else packed)


def replace_embeddings(model: nn.Module, family: Family, weight_format: WeightFormat) -> None:
    """Replace the embedding tables of a family by frozen ones in 16-bit storage.

    Raises ModelError if a module is not a plain embedding. A token table with a factor was measured
    when its family was derived.
    """
    for path in family.embeddings:
        old: Any = model.get_submodule(path)
        scale = family.embedding_scale if path == family.token_embedding else 1.0
        norm = norm_of_table(old) if path == family.token_embedding else None
        if scale == 1.0 and norm is None:
            check_embedding(old, path)
        weight = old.weight.detach().to(weight_format.storage)
        table = FrozenEmbedding(weight, weight_format.compute, scale)
        if norm is not None:
            table.set_norm(norm, old.get_submodule(norm))
        replace_module(model, path, table)


def replace_experts(
    model: nn.Module, family: Family, stacks: Sequence[Site], base_format: BaseFormat
) -> None:
    """Replace modules with stacked experts by ones with packed weights.

    stacks: every stacked parameter of these modules.
    """
    formats = {site.path: base_format.of(site) for site in stacks}
    for path in dict.fromkeys(path.rpartition(".")[0] for path in formats):
        old: Any = model.get_submodule(path)

        def format_of(name: str, path: str = path) -> WeightFormat:
            return formats[f"{path}.{name}"]

        def num_parts(name: str, path: str = path, num_experts: int = old.num_experts) -> int:
            return max(1, len(family.stacks.get(f"{path}.{name}", ())) // num_experts)

        replace_module(model, path, Experts(old, format_of, num_parts))


def replace_head(model: nn.Module, path: str, weight_format: WeightFormat) -> None:
    """Replace the head by a frozen linear in 16-bit storage.

    Raises ModelError if the head is not a plain linear.
    """
    old: Any = model.get_submodule(path)
    check_linear(old, path)
    bias = old.bias is not None
    plain = weight_format.plain()
    head = QuantLinear(old.in_features, old.out_features, bias, plain, category="head")
    replace_module(model, path, head)


def move_embedding_to_host(model: nn.Module, path: str, device: torch.device) -> None:
    """Store a replaced embedding table in host memory; looked-up rows move to `device`."""
    table = model.get_submodule(path)
    assert isinstance(table, FrozenEmbedding)
    replace_module(model, path, HostEmbedding(table, device))


def move_head_to_host(model: nn.Module, path: str, device: torch.device) -> None:
    """Store the weight of a replaced head in host memory; its pieces are copied to `device`."""
    head = model.get_submodule(path)
    assert isinstance(head, QuantLinear)
    replace_module(model, path, HostHead(head, device))


def replace_norms(model: nn.Module, paths: Sequence[str]) -> None:
    """Replace RMSNorms by ones that save no float32 copy of their input.

    Raises ModelError if a module computes something else than RMSNorm.
    """
    for path in paths:
        old: Any = model.get_submodule(path)
        check_norm(old, path)
        replace_module(model, path, RmsNorm(old.weight, old.variance_epsilon))


def replace_mlps(
    model: nn.Module, paths: Sequence[str], projections: Projections, activation: str
) -> None:
    """Replace MLPs by ones that recompute intermediate tensors in the backward pass.

    Call it after `replace_linears`. A model whose activation is not in ACTIVATIONS keeps its MLPs.
    Raises ModelError if an MLP computes something else.
    """
    if activation not in ACTIVATIONS:
        return
    for path in paths:
        old = model.get_submodule(path)
        check_mlp(old, path, projections, ACTIVATIONS[activation])
        replace_module(model, path, Mlp(old, projections, ACTIVATIONS[activation]))


def share_attention_inputs(blocks: Iterable[nn.Module], attention: AttentionSpec) -> None:
    """Let the projections of each block's attention compute their outputs together."""
    for block in blocks:
        share_input(block.get_submodule(attention.path), attention.projections)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` in the place of the module at `path`, without any check."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def linear_paths(module: nn.Module) -> list[str]:
    """Return the paths of all linears of transformers that were not replaced."""
    return [path for path, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)]
