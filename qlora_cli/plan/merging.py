"""Plans the memory of merging: a dry run of the largest part of `qlora merge --base auto`.

Merging packs, dequantizes and adds one tensor at a time. Then it compares the trained model with
the merged one. Both run streamed (`models/placement/streamed.py`): each module's tensors are in
memory only while it computes. A few blocks, two at least and one of each kind, therefore represent
any number of blocks; the second one runs while the embedded tokens are still alive. The comparison
uses rows of the recipe's length. How many rows there will be is not known, and attention needs a
little more memory for many short rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_cli.adapters.registry import method_of
from qlora_cli.data.collate import BatchSize, synthetic_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.export.compare.comparison_models import merged_on_meta, trained_on_meta
from qlora_cli.export.compare.eval_rows import MAX_TOKENS
from qlora_cli.export.compare.logit_comparison import COMPARISON_BYTES
from qlora_cli.export.merge.lora_sum import CHUNK_ELEMENTS
from qlora_cli.files.dtype import file_dtype
from qlora_cli.memory.ledger import Phase
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.memory.scopes import host_memory, scope, unallocated
from qlora_cli.models.base_format import BaseFormat, base_format_of
from qlora_cli.models.build import skeleton
from qlora_cli.models.depth import num_blocks
from qlora_cli.models.family import Family
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.placement.streamed import StreamedPlacement
from qlora_cli.models.sites import find_sites, find_stacks
from qlora_cli.nn.attention import kernel_for
from qlora_cli.nn.embedding import upload
from qlora_cli.nn.packed_tensors import pack_weight
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.site import Site
from qlora_cli.plan.config_blocks import num_kinds_prefix, with_blocks
from qlora_cli.plan.meta_source import MetaSource
from qlora_cli.recipe.adapter import PISSA
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.backbone import hidden_states
from qlora_cli.tasks.registry import task_of
from qlora_cli.tasks.task import Task

_META = torch.device("meta")


def dry_run_merge(recipe: Recipe, config: Any, profile: DeviceProfile) -> Phase:
    """Return the planned phase `merge` of a resolved recipe.

    config: transformers' config of the base. profile: the device that merges, in a new process. A
    packed copy of the base does not lower the peak: merging packs each linear in any case.
    """
    task, dtype = task_of(recipe), file_dtype(config)
    base_format, number = base_format_of(recipe, dtype), num_blocks(config)
    # With exceptions, any block may be the one that needs the most.
    is_mixed = bool(base_format.overrides)
    number = number if is_mixed else max(min(2, number), num_kinds_prefix(config))
    shorter = with_blocks(config, number)
    model, family = skeleton(shorter, base_format.compute, task.model_class)
    sites = find_sites(model, family, shorter)
    memory_model = MemoryModel.of(profile)
    counter = memory_model.new_counter()
    tracker = memory_model.new_tracker(counter, "meta")
    residuals = _residuals(recipe, sites)
    with tracker, counter.phase("merge"), torch.no_grad():
        for site in _largest_of_each_format(sites, base_format):
            _merge_one_tensor(site, base_format.of(site), dtype, is_residual=bool(residuals))
        for stack in find_stacks(model, family):
            _merge_stack(stack, stack.path in family.stacks, base_format.of(stack), dtype)
        if base_format.is_quantized:
            models = _compared_models(task, shorter, base_format, sites, profile)
            trained = _TrainedSource(model, family, dtype, residuals)
            for loaded, source in zip(
                models, (trained, _MergedSource(model, family, dtype)), strict=True
            ):
                _run(loaded, source, recipe.data.seq_len)
            with scope("temporary"):
                torch.empty(COMPARISON_BYTES, dtype=torch.uint8, device=_META)
    return counter.phases[0]


def _largest_of_each_format(sites: list[Site], base_format: BaseFormat) -> Iterator[Site]:
    """Yield the linear with the most weights among those of each format."""
    for weight_format in dict.fromkeys(map(base_format.of, sites)):
        own = (site for site in sites if base_format.of(site) == weight_format)
        yield max(own, key=lambda site: site.in_features * site.out_features)


def _residuals(recipe: Recipe, sites: Sequence[Site]) -> frozenset[str]:
    """Return the names of the weights in place of which a residual was packed (`adapter.init`)."""
    if recipe.adapter.init != PISSA:
        return frozenset()
    return frozenset(f"{path}.weight" for path in method_of(recipe.adapter).adapted_roles(sites))


def _merge_one_tensor(
    site: Site, weight_format: WeightFormat, dtype: torch.dtype, is_residual: bool = False
) -> None:
    """Allocate what merging one linear layer allocates.

    dtype: dtype of the base's files. is_residual: it is computed in float32.
    """
    with scope("temporary"):
        with host_memory():
            weight = torch.empty((site.out_features, site.in_features), dtype=dtype, device=_META)
            if is_residual:
                weight = weight.float()
        if weight_format.bits < 16:
            layer = pack_weight(weight_format, upload(weight, _META))
            del weight
            weight = layer.dequantize()
        _add_adapter(weight)


def _merge_stack(
    stack: Site, is_split: bool, weight_format: WeightFormat, dtype: torch.dtype
) -> None:
    """Allocate what merging experts allocates, one expert at a time.

    is_split: each expert is a tensor of its own in the file.
    """
    number = 0 if is_split else stack.num_experts
    shape = (number, stack.out_features, stack.in_features)
    with scope("temporary"), host_memory():
        whole = torch.empty(shape, dtype=dtype, device=_META)
        merged = torch.empty(shape, dtype=torch.float16, device=_META)
    _merge_one_tensor(stack, weight_format, dtype)
    del whole, merged


def _add_adapter(weight: Tensor) -> Tensor:
    """Allocate what adding the adapter allocates: in host memory, a chunk of float64 at a time."""
    with host_memory():
        merged = torch.empty_like(weight, dtype=torch.float16)
        rows = torch.empty(min(CHUNK_ELEMENTS, weight.numel()), dtype=torch.float64, device=_META)
        rows.float()
    return merged


class _TrainedSource(MetaSource):
    """The weights that training packed. residuals: names of those that are computed in float32."""

    def __init__(
        self, model: Any, family: Family, dtype: torch.dtype, residuals: frozenset[str]
    ) -> None:
        super().__init__(model, family, dtype)
        self._residuals = residuals

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return tensor.float() if name in self._residuals else tensor


class _MergedSource(MetaSource):
    def read(self, name: str) -> Tensor:
        return _add_adapter(super().read(name))


def _compared_models(
    task: Task, config: Any, base_format: BaseFormat, sites: list[Site], profile: DeviceProfile
) -> list[LoadedModel]:
    """Return the trained model and the merged one on meta, as merging compares them."""
    compute = base_format.compute
    with unallocated():
        return [
            trained_on_meta(task, config, base_format, sites, kernel_for(profile, compute)),
            merged_on_meta(
                task, config, torch.float32, torch.float16, kernel_for(profile, torch.float32)
            ),
        ]


def _run(loaded: LoadedModel, source: MetaSource, seq_len: int) -> None:
    """Run one streamed forward pass over as many tokens as merging compares."""
    loaded.model.eval()
    StreamedPlacement(_META).place(loaded, source)
    longest = min(seq_len, MAX_TOKENS, loaded.num_positions or seq_len)
    rows = max(1, MAX_TOKENS // longest)
    hidden_states(loaded, synthetic_batch(BatchSize(rows * longest, 1, rows, longest)), _META)
