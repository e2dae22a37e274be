"""The law that PEFT reads an adapter of this package and computes the same logits.

It is checked here and not in the proof of a model type, because the package does not use PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor

from qlora_cli.files.composed import text_config_of
from qlora_cli.models.composed import auto_class
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.proof.laws import difference, logits_of
from qlora_cli.proof.small_model import SmallModel

LIMIT = 1e-5
"""Largest difference relative to the largest logit, in float32."""
_LENGTH = 13


def peft_logits(small: SmallModel) -> float:
    """Compare the logits of PEFT with those of this package's model and adapter.

    PEFT loads the saved adapter on transformers' own model. Returns the largest difference relative
    to the largest logit. Raises what PEFT raises if it cannot read the adapter.
    """
    batch = small.batch(_LENGTH)
    folder = small.folder / "peft"
    save_adapter(small.loaded, small.recipe(), folder)
    base = auto_class(small.config, small.task.model_class).from_pretrained(
        small.folder, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    )
    text_config_of(base).use_cache = False
    with _strict_warnings():
        model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=batch.input_ids).logits[0]
        return difference(found, logits_of(small.loaded, batch))


@contextmanager
def _strict_warnings() -> Iterator[None]:
    """Turn PEFT's warnings about missing and unknown tensors into errors inside the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*(missing|unexpected|not found).*")
        yield
