"""Create small models of every family with random weights, and finished runs on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer, byte_vocabulary
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from qlora_cli.adapters.adapted_modules import adapted_modules
from qlora_cli.files.locate import read_config
from qlora_cli.files.source import FolderSource
from qlora_cli.memory.device import profile_of
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.family import Family
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from tests.helpers.families import small_config

CPU = torch.device("cpu")
_SPECIAL = ("<pad>", "<s>", "</s>")


def make_base(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float16,
    tied: bool = False,
    shard: str = "5GB",
    spread: float = 0.3,
    **settings: Any,
) -> Path:
    """Write a model with its tokenizer, chat template and generation settings.

    All weights are random, biases and norms too. dtype: of the file. tied: whether embedding and
    head share their weight. shard: size of one file. spread: standard deviation of the weights;
    large enough that the next-token probabilities are far from uniform. settings: of the config.
    """
    config = small_config(
        family,
        vocab_size=len(byte_vocabulary(_SPECIAL)),
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **settings,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight")) else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    generation = {"do_sample": True, "top_k": 7, "eos_token_id": 2, "pad_token_id": 0}
    GenerationConfig(**generation).save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, which works for every family."""
    tokenizer = byte_tokenizer(
        _SPECIAL, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def make_rows(file: Path, num: int = 12, length: int = 12) -> Path:
    """Write rows of `{"text"}`; each has `length` letters, computed by a formula."""
    rows = [
        "".join(chr(97 + (7 * row + 3 * step * step + step) % 26) for step in range(length))
        for row in range(num)
    ]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


def make_recipe(
    model: Path, rows: Path, task: str = "causal", **sections: Mapping[str, Any]
) -> Recipe:
    """Return a resolved recipe. sections: settings that differ, such as `adapter={"rank": 3}`."""
    content = {
        "model": {"name": str(model)},
        "base": {"bits": 4, "compute_dtype": "float32"},
        "adapter": {"rank": 3, "alpha": 6.0, "targets": "all"},
        "data": {"train": str(rows), "eval": str(rows), "seq_len": 32},
        "train": {"activation_checkpointing": True},
        "preference": {},
        "classification": {},
    }
    merged = {key: {**content.get(key, {}), **sections.get(key, {})} for key in content}
    if (method := sections.get("adapter", {}).get("method")) in ("full", "head"):
        merged["adapter"] = {"method": method}
    return Recipe.model_validate({**merged, "task": task})


def build_base(recipe: Recipe, device: torch.device = CPU) -> LoadedModel:
    """Build the model of a recipe as training does."""
    folder = Path(recipe.model.name)
    config = read_config(folder / "config.json")
    source = partial(_source, folder)
    return build(ModelRequest(recipe, config, source, device, profile_of(device)))


def _source(folder: Path, _: Any, family: Family) -> FolderSource:
    return open_source(folder, family)


def randomize_b(loaded: LoadedModel, spread: float = 0.02, seed: int = 3) -> None:
    """Set B of every adapted layer to random values, which a new adapter has as zeros."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted_modules(loaded.model):
        for parameter in layer.lora_b.values():
            assert isinstance(parameter, nn.Parameter)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(spread * noise)


def make_run(
    path: Path, recipe: Recipe, *, spread: float = 0.02, seed: int = 3
) -> tuple[RunFolder, LoadedModel]:
    """Write a finished run whose adapter has random values.

    Returns the run and the model with that adapter.
    """
    loaded = build_base(recipe)
    randomize_b(loaded, spread, seed)
    run = RunFolder(path)
    run.create()
    run.write(
        {
            "status": "done",
            "recipe": recipe.model_dump(mode="json"),
            "base_folder": str(Path(recipe.model.name).resolve()),
        }
    )
    save_adapter(loaded, recipe, run.adapter)
    loaded.model.eval()
    return run, loaded


def logits(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits (T, V) of every position in float32. ids: (1, T)."""
    backbone = loaded.model.get_submodule(loaded.family.backbone)
    with torch.no_grad():
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        weight: Any = loaded.head.weight
        return hidden.float() @ weight.float().t()
