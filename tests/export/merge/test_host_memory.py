"""Merging and verifying need memory for tensors, not for the model: they are made on the spot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from qlora_cli.adapters import peft_config
from qlora_cli.adapters.peft_config import PeftConfig
from qlora_cli.export.merge.folder import plan_shards, write_index
from qlora_cli.files.atomic import write_json
from qlora_cli.files.safetensors_io import Shape, write_tensors
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.units import GIB, MIB

torch.set_num_threads(1)

WIDTH, INNER, LAYERS, WORDS = 2048, 5632, 5, 32000
LARGEST_BYTES = WORDS * WIDTH * 2
SHARD_BYTES = 400_000_000
RUN = """
import resource, sys, torch
from pathlib import Path
from qlora_cli.events import Silent
from qlora_cli.jobs import merge, verify
import transformers.models.llama.modeling_llama, bitsandbytes
torch.set_num_threads(1)
run, out, base, limit = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
# Of memory that is this process's own; files that it maps are the system's to drop.
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if base == "verify":
    result = verify.run(out, against=run, observer=Silent())
    print(result.faults)
    assert result.passed
    assert result.greedy_tokens >= 3
elif base == "whole":
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
else:
    merge.run(run, out=out, dtype=None, base=base, observer=Silent())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def block_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    path = f"model.layers.{layer}"
    attention = {f"{path}.self_attn.{role}_proj.weight": (WIDTH, WIDTH) for role in "qkvo"}
    return attention | {
        f"{path}.mlp.gate_proj.weight": (INNER, WIDTH),
        f"{path}.mlp.up_proj.weight": (INNER, WIDTH),
        f"{path}.mlp.down_proj.weight": (WIDTH, INNER),
        f"{path}.input_layernorm.weight": (WIDTH,),
        f"{path}.post_attention_layernorm.weight": (WIDTH,),
    }


def make_large_base(folder: Path, num_layers: int = LAYERS) -> Path:
    """In bfloat16, in several files, written one tensor at a time."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (WORDS, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(num_layers):
        shapes |= block_shapes(layer)
    shapes["lm_head.weight"] = (WORDS, WIDTH)
    planned = {name: Shape(torch.bfloat16, shape) for name, shape in shapes.items()}
    noise = (0.02 * torch.randn(INNER * WIDTH)).bfloat16()

    def make(name: str) -> Tensor:
        size = torch.Size(shapes[name])
        return noise.repeat(-(-size.numel() // noise.numel()))[: size.numel()].view(size)

    shards = plan_shards(planned, SHARD_BYTES)
    for shard in shards:
        write_tensors(folder / shard.name, shard.shapes, make, {"format": "pt"})
    write_index(folder, shards)
    return folder


def make_large_run(path: Path, base: Path, num_layers: int = LAYERS) -> RunFolder:
    """A run with an adapter on every linear, as PEFT would write it."""
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
    shapes: dict[str, Shape] = {}
    for layer in range(num_layers):
        for name, shape in block_shapes(layer).items():
            if len(shape) == 2:
                path_of = name.removesuffix(".weight")
                out_features, in_features = shape
                shapes[peft_config.key_of(path_of, "A")] = Shape(torch.float32, (16, in_features))
                shapes[peft_config.key_of(path_of, "B")] = Shape(torch.float32, (out_features, 16))
    write_tensors(
        run.adapter / peft_config.WEIGHTS,
        shapes,
        lambda key: 0.01 * torch.randn(shapes[key].shape),
        {"format": "pt"},
    )
    return run


def limited(run: RunFolder, out: Path, what: str, check: bool = True) -> str:
    """One job in a process that the operating system gives 2 x the largest tensor + 1 GiB."""
    began = time.monotonic()
    words = [str(run.path), str(out), what, str(2 * LARGEST_BYTES + GIB)]
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
        peak_bytes = int(done.stdout.splitlines()[-1])
        print(f"{what}: {peak_bytes / MIB:.0f} MiB, {time.monotonic() - began:.1f} s")
        # Python with torch and transformers is in it.
        assert peak_bytes < 2 * LARGEST_BYTES + GIB
    return done.stderr


def make_large(folder: Path, num_layers: int) -> RunFolder:
    return make_large_run(folder / "run", make_large_base(folder / "base", num_layers), num_layers)


@pytest.mark.slow
def test_a_model_of_several_gigabytes_is_merged(tmp_path: Path) -> None:
    run = make_large(tmp_path, num_layers=24)
    limited(run, tmp_path / "out", "original")
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) > 2.5 * GIB
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_larger_than_memory_is_judged_merged_and_verified(tmp_path: Path) -> None:
    """Four models answer, two of them packed on the way; none is ever held."""
    run, out = make_large(tmp_path, num_layers=LAYERS), tmp_path / "out"
    limited(run, out, "auto")
    assert set(json.loads((out / "merge.json").read_text())["judgement"]["table"])
    limited(run, out, "verify")
    # The limit is one: a model held whole does not come under it.
    assert "allocate" in limited(run, out, "whole", check=False)
    shutil.rmtree(tmp_path)
