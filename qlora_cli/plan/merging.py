"""What merging will need of the device, imagined: the worst of what `--base auto` does there.

One tensor at a time is packed, unpacked and added to; and the models that are judged answer
streamed (`stream.py`), each module with its tensors in memory while it computes and no longer. So
two blocks stand for all: behind the first one the embedded tokens live on. The row that is judged
on is as long as the recipe allows; how many rows there will be is not known, and attention takes a
little more for many short ones.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from qlora_cli.data.collate import BatchSize, synthetic_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.export.compare.comparison_models import merged_on_meta, trained_on_meta
from qlora_cli.export.compare.eval_rows import MAX_TOKENS
from qlora_cli.export.compare.logit_comparison import COMPARISON_BYTES
from qlora_cli.export.merge.lora_sum import CHUNK_ELEMENTS
from qlora_cli.export.merge.merged_tensors import pack_linear
from qlora_cli.files.dtype import file_dtype
from qlora_cli.memory.ledger import Phase
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.memory.scopes import host_memory, scope, unallocated
from qlora_cli.models.build import skeleton, weight_format_of
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.placement.streamed import stream
from qlora_cli.models.sites import find_sites
from qlora_cli.nn.attention import kernel_for
from qlora_cli.nn.embedding import upload
from qlora_cli.nn.quant import WeightFormat
from qlora_cli.nn.site import Site
from qlora_cli.plan.meta_source import MetaSource
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.backbone import hidden_states

_META = torch.device("meta")
_BLOCKS = 2


def dry_run_merge(recipe: Recipe, config: Any, facts: DeviceProfile) -> Phase:
    """The phase `merge` of a resolved recipe, in a process of its own."""
    weight_format, dtype = weight_format_of(recipe, file_dtype(config)), file_dtype(config)
    shorter = deepcopy(config)
    shorter.num_hidden_layers = min(_BLOCKS, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        shorter.layer_types = config.layer_types[:_BLOCKS]
    model, family = skeleton(deepcopy(shorter), weight_format.compute)
    sites = find_sites(model, family, shorter)
    memory_model = MemoryModel.of(facts)
    counter = memory_model.new_counter()
    tracker = memory_model.new_tracker(counter, "meta")
    with tracker, counter.phase("merge"), torch.no_grad():
        _one_tensor(max(sites, key=lambda s: s.in_features * s.out_features), weight_format, dtype)
        if weight_format.bits < 16:
            models = _judged(shorter, weight_format, sites, facts)
            for loaded, kind in zip(models, (MetaSource, _Merged), strict=True):
                _answer(loaded, kind(model, family, dtype), recipe.data.seq_len)
            with scope("temporary"):
                torch.empty(COMPARISON_BYTES, dtype=torch.uint8, device=_META)
    return counter.phases[0]


def _one_tensor(site: Site, weight_format: WeightFormat, dtype: torch.dtype) -> None:
    with scope("temporary"):
        with host_memory():
            weight = torch.empty((site.out_features, site.in_features), dtype=dtype, device=_META)
        if weight_format.bits < 16:
            layer = pack_linear(site, weight_format, upload(weight, _META))
            del weight
            weight = layer.dequantize()
        _add_up(weight)


def _add_up(weight: Tensor) -> Tensor:
    """As `MergedTensors` makes a tensor, which is on the host: some rows in float64 at a time."""
    with host_memory():
        made = torch.empty_like(weight, dtype=torch.float16)
        rows = torch.empty(min(CHUNK_ELEMENTS, weight.numel()), dtype=torch.float64, device=_META)
        rows.float()
    return made


class _Merged(MetaSource):
    def read(self, name: str) -> Tensor:
        return _add_up(super().read(name))


def _judged(
    config: Any, weight_format: WeightFormat, sites: list[Site], facts: DeviceProfile
) -> list[LoadedModel]:
    """The trained model and a merged one, as they are when they answer."""
    kernels = (kernel_for(facts, compute) for compute in (weight_format.compute, torch.float32))
    with unallocated():
        return [
            trained_on_meta(deepcopy(config), weight_format, sites, next(kernels)),
            merged_on_meta(deepcopy(config), torch.float32, torch.float16, next(kernels)),
        ]


def _answer(loaded: LoadedModel, source: MetaSource, seq_len: int) -> None:
    loaded.model.eval()
    stream(loaded, source, _META)
    longest = min(seq_len, MAX_TOKENS, loaded.config.max_position_embeddings)
    rows = max(1, MAX_TOKENS // longest)
    hidden_states(loaded, synthetic_batch(BatchSize(rows * longest, 1, rows, longest)), _META)
