"""Two kinds of card: one that computes, and a stand-in that only counts what is allocated."""

from __future__ import annotations

import pytest
import torch
from gpu_facts import is_fake_gpu

CARD = torch.device("cuda", 0)


@pytest.fixture
def counting_card() -> torch.device:
    """A card with torch's real caching allocator; whether its kernels do anything is open."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card here")
    return CARD


@pytest.fixture
def card(counting_card: torch.device) -> torch.device:
    """A card whose numbers are numbers."""
    if is_fake_gpu():
        pytest.skip("a stand-in for a card, whose kernels compute nothing")
    return counting_card


@pytest.fixture(scope="session")
def checked_card() -> torch.device:
    """The same for what is made once and shared."""
    if not torch.cuda.is_available() or is_fake_gpu():
        pytest.skip("no CUDA card that computes here")
    return CARD
