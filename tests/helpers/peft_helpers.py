"""Models, adapters and logits of PEFT, for comparison."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.helpers.families import ties_embeddings
from tests.helpers.runs import make_base, make_recipe, make_rows

IDS = torch.tensor([[5, 80, 91, 7, 33, 250, 64, 12]])


def frozen_16_bit(folder: Path, family: str, **adapter: Any) -> tuple[Path, Any]:
    """Return (base, recipe) with an unquantized base, so that only the adapters can differ."""
    base = make_base(folder / "base", family, tied=ties_embeddings(family))
    rows = make_rows(folder / "rows.jsonl")
    return base, make_recipe(base, rows, base={"bits": 16}, adapter=adapter)


def transformers_model(base: Path) -> Any:
    """Return the base as transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def peft_logits(model: Any) -> Tensor:
    """Return the logits (T, V) that a model of PEFT or transformers computes for `IDS`."""
    with torch.no_grad():
        logits: Tensor = model.eval()(IDS).logits[0]
    return logits


def load_into_peft(base: Path, adapter: Path) -> Any:
    """Load an adapter with PEFT.

    Warnings are errors: PEFT only warns about missing keys, unknown keys and wrong flags.
    """
    model = transformers_model(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel.from_pretrained(model, adapter)


def write_peft_adapter(base: Path, folder: Path, **settings: Any) -> None:
    """Write an adapter with PEFT itself, with random values in B.

    settings: arguments of LoraConfig.
    """
    torch.manual_seed(11)
    model = get_peft_model(transformers_model(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
