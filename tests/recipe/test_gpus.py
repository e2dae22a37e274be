"""`--vram` accepts sizes and names of GPUs."""

from __future__ import annotations

import pytest

from qlora_cli.recipe.gpus import CONTEXT_BYTES, GPUS, planned_gpu, size_that_fits
from qlora_cli.units import GIB


@pytest.mark.parametrize("text", ["12", "12GB", "12 GiB", "12G", "12.0", str(12 * GIB)])
def test_a_size(text: str) -> None:
    profile = planned_gpu(text)
    assert profile.capacity_bytes == 12 * GIB
    assert profile.usable_bytes == 12 * GIB - CONTEXT_BYTES
    assert profile.is_planned


@pytest.mark.parametrize("text", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "4090 24GB"])
def test_a_name(text: str) -> None:
    profile = planned_gpu(text)
    assert (profile.name, profile.capacity_bytes) == ("RTX 4090", 24 * GIB)
    assert profile.capability == (8, 9)


def test_a_model_with_two_sizes() -> None:
    assert planned_gpu("A100").capacity_bytes == 40 * GIB
    assert planned_gpu("A100 80GB").capacity_bytes == 80 * GIB
    assert planned_gpu("Tesla V100-32GB").capacity_bytes == 32 * GIB


def test_every_gpu_is_found_by_its_own_name() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert planned_gpu(gpu.name) == gpu.profile()


@pytest.mark.parametrize("text", ["0", "huge", "RTX 4091", "-1", "", "12 parsecs"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"24GiB"):
        planned_gpu(text)


def test_the_size_that_fits_includes_the_context() -> None:
    assert size_that_fits(6 * GIB) == "8 GiB (such as RTX 4060)"
    assert str(size_that_fits(8 * GIB)).startswith("12 GiB")
    assert size_that_fits(1000 * GIB) is None
