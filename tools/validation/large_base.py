"""A Llama model of any size with random values, written one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from qlora_cli.export.merge.folder import plan_shards, write_index
from qlora_cli.files.safetensors_io import TensorSpec, write_tensors


@dataclass(frozen=True)
class LargeModel:
    """The sizes of a Llama model in bfloat16."""

    num_layers: int
    width: int = 2048
    inner: int = 5632
    vocab_size: int = 32000

    @property
    def table_weights(self) -> int:
        """Return the number of weights of the embedding and the head."""
        return 2 * self.vocab_size * self.width

    @property
    def block_weights(self) -> int:
        """Return the number of weights of the linears of all blocks."""
        return self.num_layers * self.width * (4 * self.width + 3 * self.inner)

    def block_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of each tensor of a block."""
        path, square = f"model.layers.{layer}", (self.width, self.width)
        attention = {f"{path}.self_attn.{role}_proj.weight": square for role in "qkvo"}
        return attention | {
            f"{path}.mlp.gate_proj.weight": (self.inner, self.width),
            f"{path}.mlp.up_proj.weight": (self.inner, self.width),
            f"{path}.mlp.down_proj.weight": (self.width, self.inner),
            f"{path}.input_layernorm.weight": (self.width,),
            f"{path}.post_attention_layernorm.weight": (self.width,),
        }

    def write(self, folder: Path, shard_bytes: int) -> None:
        """Write the model as files of at most `shard_bytes` bytes. Norms have the weight one."""
        folder.mkdir(parents=True)
        LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.num_layers,
            num_attention_heads=16,
            dtype=torch.bfloat16,
        ).save_pretrained(folder)
        table = (self.vocab_size, self.width)
        shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (self.width,)}
        for layer in range(self.num_layers):
            shapes |= self.block_shapes(layer)
        shapes["lm_head.weight"] = table
        specs = {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}
        noise = (0.02 * torch.randn(self.inner * self.width)).bfloat16()

        def make(name: str) -> Tensor:
            size = torch.Size(shapes[name])
            if len(size) == 1:
                return torch.ones(size, dtype=torch.bfloat16)
            return noise.repeat(-(-size.numel() // noise.numel()))[: size.numel()].view(size)

        shards = plan_shards(specs, shard_bytes)
        for shard in shards:
            write_tensors(folder / shard.name, shard.shapes, make, {"format": "pt"})
        write_index(folder, shards)
