"""A model's folder in transformers, with which a server is compared."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging

from qlora_cli.export.serve.local_model import LocalModel
from qlora_cli.files.locate import STARTER_FOLDER


def test_loading_shows_no_progress_bar_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    was_enabled = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        LocalModel(STARTER_FOLDER, torch.device("cpu"))
        assert logging.is_progress_bar_enabled(), "other users of transformers keep their bars"
    finally:
        if not was_enabled:
            logging.disable_progress_bar()
    assert capsys.readouterr().err == ""
