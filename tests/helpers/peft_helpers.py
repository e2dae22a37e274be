"""PEFT's side of a comparison: its models, its adapters, its answers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.helpers.runs import make_base, make_recipe, make_rows

IDS = torch.tensor([[5, 80, 91, 7, 33, 250, 64, 12]])


def frozen_16_bit(folder: Path, family: str, **adapter: Any) -> tuple[Path, Any]:
    """A base that both sides hold exactly, so that only the adapters can differ."""
    base = make_base(folder / "base", family, tied=family == "gpt2")
    rows = make_rows(folder / "rows.jsonl")
    return base, make_recipe(base, rows, base={"bits": 16}, adapter=adapter)


def theirs(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def their_logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits[0]
    return found


def load_into_peft(base: Path, adapter: Path) -> Any:
    """With every warning an error; PEFT warns of missing keys, strange keys and wrong flags."""
    model = theirs(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel.from_pretrained(model, adapter)


def write_peft_adapter(base: Path, folder: Path, **settings: Any) -> None:
    """PEFT's own adapter with B not zero."""
    torch.manual_seed(11)
    model = get_peft_model(theirs(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
