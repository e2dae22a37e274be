"""Fixtures for a real GPU, and for a fake one that only counts allocated memory."""

from __future__ import annotations

import pytest
import torch
from gpu_facts import is_fake_gpu

GPU = torch.device("cuda", 0)


@pytest.fixture
def counting_gpu() -> torch.device:
    """Return a GPU, or a fake GPU, with torch's real caching allocator.

    Kernels of the fake GPU compute nothing.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    return GPU


@pytest.fixture
def gpu(counting_gpu: torch.device) -> torch.device:
    """Return a real GPU."""
    if is_fake_gpu():
        pytest.skip("a fake GPU, whose kernels compute nothing")
    return counting_gpu


@pytest.fixture(scope="session")
def session_gpu() -> torch.device:
    """Return a real GPU, for fixtures with a wider scope than one test."""
    if not torch.cuda.is_available() or is_fake_gpu():
        pytest.skip("no real CUDA GPU on this machine")
    return GPU
