"""What merging will need of the device: its largest tensor, packed and unpacked again, imagined.

Merging goes tensor by tensor on the host. The device is asked only where the base is `dequantized`:
a weight is packed there and unpacked, as training did. `--base auto` tries it, so it is planned.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from qlora_cli.export.tensors import packed
from qlora_cli.families.sites import find_sites
from qlora_cli.memory.allocator import CachingAllocator
from qlora_cli.memory.counter import Counter
from qlora_cli.memory.cuda_rules import rules_for
from qlora_cli.memory.ledger import Phase
from qlora_cli.memory.tracker import StorageTracker, host_memory, scope
from qlora_cli.nn.embedding import upload
from qlora_cli.recipe.resolve import DeviceFacts
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.imagine import file_dtype
from qlora_cli.weights.build import format_of, skeleton


def imagine_merge(recipe: Recipe, config: Any, facts: DeviceFacts) -> Phase:
    """The phase `merge` of a resolved recipe: at its worst tensor, in a process of its own."""
    on_card = facts.kind == "cuda"
    held = format_of(recipe, file_dtype(config))
    one_block = deepcopy(config)
    one_block.num_hidden_layers = 1
    model, family = skeleton(one_block, held.compute)
    largest = max(
        find_sites(model, family, one_block), key=lambda site: site.in_features * site.out_features
    )
    meta, shape = torch.device("meta"), (largest.out_features, largest.in_features)
    counter = Counter(CachingAllocator() if on_card else None)
    tracker = StorageTracker(counter, rules_for(facts), "meta", counts_host=not on_card)
    with tracker, counter.phase("merge"), scope("temporary"):
        with host_memory():
            weight = torch.empty(shape, dtype=file_dtype(config), device=meta)
        if held.bits < 16:
            layer = packed(largest, held, upload(weight, meta))
            del weight
            weight = layer.dequantize()
        with host_memory():
            made = torch.empty(shape, dtype=torch.float16, device=meta)
    del weight, made
    return counter.phases[0]
