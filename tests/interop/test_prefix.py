"""Prefix-tuning (`adapter.prefix`): PEFT reads what this package writes, and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_cli.models.model import LoadedModel
from qlora_cli.models.prefix import MODEL_TYPES, block_prefixes
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.runs.layout import RunFolder
from tests.helpers.peft_helpers import IDS, frozen_16_bit, load_into_peft, peft_logits
from tests.helpers.runs import logits, make_run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LENGTH = 5


def prefix_run(folder: Path, recipe: Any) -> tuple[RunFolder, LoadedModel]:
    """Write a run whose adapter and prefix have large random values."""
    run, loaded = make_run(folder, recipe, spread=0.05)
    torch.manual_seed(3)
    with torch.no_grad():
        for prefix in block_prefixes(loaded.model):
            prefix.key.normal_(std=2)
            prefix.value.normal_(std=2)
    save_adapter(loaded, recipe, run.adapter)
    return run, loaded


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_peft_computes_the_same_logits(family: str, tmp_path: Path) -> None:
    base, recipe = frozen_16_bit(tmp_path, family, prefix=LENGTH)
    run, loaded = prefix_run(tmp_path / "run", recipe)
    merged = load_into_peft(base, run.adapter).merge_and_unload()
    peft = PeftModel.from_pretrained(merged, run.adapter / "prefix")
    ours, theirs = logits(loaded, IDS), peft_logits(peft)
    without = peft_logits(peft.get_base_model())
    assert (ours - without).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
