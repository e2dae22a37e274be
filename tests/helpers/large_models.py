"""Models larger than the memory of a test, and runs on them, written one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from large_base import LargeModel

from qlora_cli.adapters import peft_config, peft_names
from qlora_cli.adapters.peft_config import PeftConfig
from qlora_cli.files.atomic import write_json
from qlora_cli.files.safetensors_io import TensorSpec, write_tensors
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder

SHARD_BYTES = 10**8


def make_large_base(folder: Path, model: LargeModel) -> Path:
    """Write a Llama model in bfloat16 as several files."""
    model.write(folder, SHARD_BYTES)
    return folder


def make_large_run(path: Path, base: Path, model: LargeModel) -> RunFolder:
    """Write a run on a model with an adapter on every linear, in PEFT's format."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(base)},
            "base": {"compute_dtype": "bfloat16"},
            "adapter": {"targets": "all"},
            "data": {"train": "rows.jsonl"},
        }
    )
    run = RunFolder(path)
    run.create()
    run.write({"recipe": recipe.model_dump(mode="json"), "base_folder": str(base)})
    run.adapter.mkdir()
    roles = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = PeftConfig(r=16, lora_alpha=32.0, target_modules=roles)
    write_json(run.adapter / peft_config.CONFIG, config.model_dump(mode="json"))
    shapes: dict[str, TensorSpec] = {}
    for layer in range(model.num_layers):
        for name, shape in model.block_shapes(layer).items():
            if len(shape) == 2:
                path_of = name.removesuffix(".weight")
                out_features, in_features = shape
                for letter, size in (("A", (16, in_features)), ("B", (out_features, 16))):
                    key = peft_names.tensor_name(path_of, letter)
                    shapes[key] = TensorSpec(torch.float32, size)
    write_tensors(
        run.adapter / peft_config.WEIGHTS,
        shapes,
        lambda key: 0.01 * torch.randn(shapes[key].shape),
        {"format": "pt"},
    )
    return run
