"""Fixtures and settings for all tests. No test uses the network."""

from __future__ import annotations

import os
from pathlib import Path

# Set before the libraries that read them are imported: no requests to the Hugging Face hub, and no
# tokenizer threads, which do not survive a fork.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from tests.helpers.shared_data import MISSING, ROOT, SHARED, SHARED_DATA

# Two threads on a busy two-core machine can be ten times slower than one.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` if there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that replaces the user's cache during the tests."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["QLORA_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data (see tests/helpers/shared_data.py), or skip the test."""
    if not SHARED_DATA.is_dir():
        pytest.skip(MISSING)
    return SHARED
