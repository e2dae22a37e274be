"""Write a model of a known shape with random weights, and rows for it, for benchmarks of speed.

The shapes are those of `plan_cases.py`: 1B is Llama 3.2 and 8B Llama 3.1. The tokenizer has one
token per byte, and the rows are random words, so losses mean only that all tools compute the same.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from qlora_cli.export.merge.folder import plan_shards, write_index
from qlora_cli.files.safetensors_io import TensorSpec, write_tensors
from qlora_cli.models.build import skeleton

sys.path.append(str(Path(__file__).resolve().parents[1] / "validation"))

from byte_tokenizer import byte_tokenizer
from plan_cases import Case

SHAPES = ("tiny", "1B", "8B")
_SHARD_BYTES = 2_000_000_000
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_random_model(folder: Path, shape: str) -> Path:
    """Write config, tokenizer and weights in bfloat16 as several files, one tensor at a time."""
    config = Case("llama", shape).config()
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    _make_tokenizer().save_pretrained(folder)
    model, _ = skeleton(config, torch.bfloat16)
    # A tied head is the table of the tokens, which comes first.
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    largest = max(torch.Size(size).numel() for size in shapes.values())
    noise = torch.empty(largest, dtype=torch.bfloat16)
    noise.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))

    def make(name: str) -> torch.Tensor:
        size = torch.Size(shapes[name])
        return torch.ones(size).bfloat16() if len(size) == 1 else noise[: size.numel()].view(size)

    planned = {name: TensorSpec(torch.bfloat16, size) for name, size in shapes.items()}
    shards = plan_shards(planned, _SHARD_BYTES)
    for shard in shards:
        write_tensors(folder / shard.name, shard.shapes, make, {"format": "pt"})
    write_index(folder, shards)
    return folder


def _make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(
        special, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = _CHATML
    return tokenizer


def make_random_rows(file: Path, number: int) -> Path:
    """Write rows of an instruction and an output of 20 to 400 random words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioulmnrst", k=draw.randint(2, 9))) for _ in range(2000)]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(20, 400)))

    rows = [{"instruction": text(), "input": "", "output": text()} for _ in range(number)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
