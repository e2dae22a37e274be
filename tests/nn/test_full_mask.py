"""A mask of ones knows that it has no padding, and is an ordinary tensor otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_cli.nn.full_mask import FullMask, full_mask


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_test_for_padding_needs_no_value(device: str) -> None:
    mask = full_mask(3, device)
    assert bool(torch.all(mask == 1))
    assert bool((mask == 1).all())
    assert bool(mask.bool().all())


def test_another_comparison_reads_the_values() -> None:
    assert not bool(torch.all(full_mask(3, "cpu") == 0))
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.all(full_mask(3, "meta") == 0))


def test_the_results_of_other_operations_are_ordinary_tensors() -> None:
    mask = full_mask(3, "cpu")
    for result in (mask[:, None], mask * 2, mask.float(), torch.cat([mask, mask])):
        assert type(result) is Tensor
    assert isinstance(mask, FullMask)
    assert torch.equal(mask[0], torch.ones(3, dtype=torch.long))
