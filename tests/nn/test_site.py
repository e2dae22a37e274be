"""The orientation of a weight in a file and in memory."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.nn.site import Site


@pytest.mark.parametrize("transposed", [False, True])
def test_to_file_is_the_inverse_of_from_file(transposed: bool) -> None:
    site = Site("h.0.c_fc", ("up",), {"up": slice(0, 3)}, 5, 3, True, transposed)
    assert site.file_shape == ((5, 3) if transposed else (3, 5))
    in_file = torch.arange(15).view(site.file_shape)
    weight = site.from_file(in_file)
    assert weight.shape == (3, 5)
    assert weight.data_ptr() == in_file.data_ptr(), "a view: nothing is copied"
    assert torch.equal(site.to_file(weight), in_file)
    assert site.to_file(weight).is_contiguous()
