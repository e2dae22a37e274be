"""Small models of vision and text with random weights, and a recipe for them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qlora_cli.files.composed import language_config, whole_config
from qlora_cli.proof.small_config import small_config
from qlora_cli.recipe.schema import Recipe
from tests.helpers.runs import make_recipe, make_rows, make_tokenizer


def make_composed(folder: Path, model_type: str, dtype: torch.dtype = torch.float16) -> Path:
    """Write a small composed model with a tokenizer and return its folder."""
    tokenizer = make_tokenizer()
    config = small_config(language_config(AutoConfig.for_model(model_type)))
    config.vocab_size = len(tokenizer)
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(whole_config(config), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(centre + 0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return folder


def composed_recipe(model: Path, folder: Path) -> Recipe:
    """Return a recipe with adapters on attention. The run is `folder`/run."""
    rows = make_rows(folder / "rows.jsonl")
    train = {"steps": 3, "grad_accum": 1, "lr": 1e-2}
    recipe = make_recipe(model, rows, adapter={"targets": ["q", "v"]}, train=train)
    return recipe.model_copy(update={"output": str(folder / "run")})
