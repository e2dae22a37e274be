"""What bench_train.py compares with: PEFT on bitsandbytes' own layers, as PEFT documents it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_cli.data.collate import largest_batch
from qlora_cli.models import convert


def peft_step(config: Any, rank: int, device: torch.device, seq_len: int) -> Callable[[], float]:
    """One step of AdamW on one full sequence: forward, backward, clip, update; gives the loss."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(
        quantized(config, device), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    settings = LoraConfig(
        r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", bias="none"
    )
    model = get_peft_model(model, settings).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = largest_batch(seq_len, 1, config.vocab_size).input_ids.to(device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def quantized(config: Any, device: torch.device) -> Any:
    """transformers' model with NF4 linears, made a tensor at a time from random weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    generator = torch.Generator(device).manual_seed(0)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            convert.replace_module(model, path, packed(module, generator))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = ones_or_noise(parameter, generator)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            convert.replace_module(model, path, type(module)(config).to(device))
    model.tie_weights()
    model.is_loaded_in_4bit = True
    return model


def packed(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
    """bitsandbytes' own layer, quantized on the device."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = ones_or_noise(linear.weight, generator)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(generator.device)
    return layer


def ones_or_noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Norms are one; matrices are small and random."""
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16, device=generator.device)
    noise = torch.empty(like.shape, dtype=torch.bfloat16, device=generator.device)
    return noise.normal_(0.0, 0.02, generator=generator)
