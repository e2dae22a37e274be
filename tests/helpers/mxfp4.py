"""Writes the experts of a small gpt-oss checkpoint in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUP = 32


def encode(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Return (blocks, scales) of a stack (E, in, out): the nearest numbers of MXFP4."""
    groups = stack.float().transpose(1, 2).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(dim=-1, keepdim=True).clamp_min(2.0**-100)
    exponents = torch.floor(torch.log2(largest)) - 2
    scaled = groups / torch.exp2(exponents)
    codes = (scaled.abs()[..., None] - FP4).abs().argmin(dim=-1)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks.contiguous(), (exponents.squeeze(-1) + 127).to(torch.uint8)


def quantize_experts(folder: Path) -> dict[str, Tensor]:
    """Replace the stacks of a checkpoint by MXFP4. Returns its tensors before."""
    file = folder / "model.safetensors"
    before = load_file(file)
    tensors: dict[str, Tensor] = {}
    for name, tensor in before.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = encode(tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    config = folder / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"quantization_config": {"quant_method": "mxfp4"}}))
    return before
