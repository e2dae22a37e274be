"""How close a quantized base with its first adapter is to the original weights (`adapter.init`).

    python tools/benchmarks/init_error.py MODEL --rank 16 --bits 4

Builds the model once for each `adapter.init` with adapters on all linears, as training does, and
prints |W - (Q + s B A)| / |W| over all linears together, in the Frobenius norm. W is the original
weight, Q the packed one, and B A the adapter before the first step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.files.locate import read_config
from qlora_cli.memory.device import profile_of
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.model import LoadedModel
from qlora_cli.recipe.schema import Recipe

CPU = torch.device("cpu")
INITS = ("default", "pissa", "loftq")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args(arguments)
    for init in INITS:
        loaded = load(options.model, init, options.rank, options.bits)
        print(f"{init:8} {relative_error(loaded, options.model):.6f}", flush=True)


def load(model: Path, init: str, rank: int, bits: int) -> LoadedModel:
    """Build a model with an adapter on every linear."""
    adapter = {"init": init, "rank": rank, "alpha": float(rank), "targets": "all"}
    base = {"bits": bits, "compute_dtype": "float32", "cache": False}
    content = {"model": {"name": str(model)}, "base": base, "adapter": adapter}
    train = {"activation_checkpointing": True}
    recipe = Recipe.model_validate({**content, "data": {"train": ""}, "train": train})
    config = read_config(model / "config.json")
    given = (recipe, config, lambda _, family: open_source(model, family), CPU, profile_of(CPU))
    return build(ModelRequest(*given))


@torch.no_grad()
def relative_error(loaded: LoadedModel, model: Path) -> float:
    """Return |W - (Q + s B A)| / |W| over all adapted linears."""
    source = open_source(model, loaded.family)
    sites = {site.path: site for site in loaded.sites}
    errors = weights = 0.0
    for path, layer in adapted_layers(loaded.model):
        weight = sites[path].from_file(source.read(f"{path}.weight")).double()
        held = layer.base.dequantize().double() + layer.delta().double()
        errors += float((weight - held).square().sum())
        weights += float(weight.square().sum())
    return float((errors / weights) ** 0.5)


if __name__ == "__main__":
    main()
