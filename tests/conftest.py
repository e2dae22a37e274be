"""What every test may use. Nothing here asks the network."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything is imported that reads them: no hub, and no threads that a fork would lose.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Two threads on a busy two-core machine can be ten times slower than one.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no card."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA card here"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's shared folder: $QLORA_SHARED, or `shared` beside the checkout."""
    folder = Path(os.environ.get("QLORA_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data in {folder}; set QLORA_SHARED")
    return folder
