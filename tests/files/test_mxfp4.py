"""MXFP4 stacks are read as transformers decodes them; damaged ones are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_cli.errors import ModelError
from qlora_cli.files.source import FolderSource
from tests.helpers.mxfp4 import encode

NAME = "experts.down_proj"


def write(folder: Path, tensors: dict[str, Tensor]) -> FolderSource:
    save_file(tensors, folder / "model.safetensors")
    return FolderSource(folder, lambda name: name)


def test_a_stack_is_read_as_transformers_decodes_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 8, 2), dtype=torch.uint8, generator=generator)
    source = write(tmp_path, {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales})
    assert source.names() == [NAME]
    assert source.shape(NAME) == (3, 64, 8)
    assert source.entry(NAME).dtype == torch.bfloat16
    assert torch.equal(source.read(NAME), convert_moe_packed_tensors(blocks, scales))


def test_numbers_of_mxfp4_are_read_back_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 64, 8, generator=generator)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    blocks, scales = encode(first)
    rounded = write(tmp_path / "first", {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}).read(
        NAME
    )
    assert 0.01 < (rounded - first).norm() / first.norm() < 0.2
    blocks, scales = encode(rounded)
    again = write(tmp_path / "second", {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}).read(
        NAME
    )
    assert torch.equal(again, rounded)


@pytest.mark.parametrize(
    "change",
    [lambda t: t.pop(f"{NAME}_scales"), lambda t: t.update({f"{NAME}_scales": t["other"].clone()})],
    ids=["missing", "wrong shape"],
)
def test_blocks_without_their_scales_are_named(
    change: Callable[[dict[str, Tensor]], object], tmp_path: Path
) -> None:
    blocks, scales = encode(torch.randn(2, 64, 8))
    tensors = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales, "other": scales[:1].clone()}
    change(tensors)
    with pytest.raises(ModelError, match=rf"{NAME}_blocks .* needs {NAME}_scales"):
        write(tmp_path, tensors)
