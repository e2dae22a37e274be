"""Experts with packed weights compute what transformers' own module computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from qlora_cli.adapters.lora import LoraSettings
from qlora_cli.adapters.lora_experts import LoraStack
from qlora_cli.nn.experts import Experts
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.stacked_experts import run_stacked_experts
from qlora_cli.proof.small_config import small_config

CLASSES = {
    "mixtral": MixtralExperts,
    "gpt_oss": GptOssExperts,
    "nemotron_h": NemotronHExperts,
}
"""With a gate, with biases and transposed, and without a gate."""
TOKENS, ACTIVE = 7, 2


def make(model_type: str, bits: int = 16) -> tuple[Any, Experts]:
    """Return (transformers' module, ours) with the same weights."""
    config = small_config(AutoConfig.for_model(model_type))
    config._experts_implementation = "eager"
    theirs = CLASSES[model_type](config)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    empty = CLASSES[model_type](config).to("meta")
    weight_format = WeightFormat(bits, torch.float32, torch.float32)
    ours = Experts(empty, lambda _: weight_format, lambda _: 1)
    for name in ours.stacks:
        ours.pack_stack(name, theirs.get_parameter(name).detach())
    for name in dict(ours.named_parameters(recurse=False)):
        setattr(ours, name, theirs.get_parameter(name))
    return theirs, ours


def draw(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, expert numbers and their weights; the last expert gets no token."""
    generator = torch.Generator().manual_seed(1)
    name = "down_proj"
    width = module.get_parameter(name).shape[-1 if module.is_transposed else 1]
    hidden = torch.randn(TOKENS, width, generator=generator).requires_grad_()
    scores = torch.rand(TOKENS, module.num_experts - 1, generator=generator)
    weights, index = scores.topk(ACTIVE, dim=-1)
    return hidden, index, weights.requires_grad_()


def compare(own: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    grad = torch.randn(own.shape, generator=torch.Generator().manual_seed(2))
    found, expected = (torch.autograd.grad(out, inputs, grad) for out in (own, wanted))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", CLASSES)
def test_output_and_gradients_equal_transformers(model_type: str) -> None:
    theirs, ours = make(model_type)
    hidden, index, weights = draw(theirs)
    compare(ours(hidden, index, weights), theirs(hidden, index, weights), [hidden, weights])


@pytest.mark.parametrize("model_type", CLASSES)
def test_trained_stacks_have_the_gradients_of_transformers(model_type: str) -> None:
    theirs, _ = make(model_type)
    hidden, index, weights = draw(theirs)
    inputs = [hidden, weights, *theirs.parameters()]
    own = run_stacked_experts(theirs, hidden, index, weights)
    compare(own, theirs(hidden, index, weights), inputs)


@pytest.mark.parametrize("model_type", CLASSES)
def test_packed_experts_compute_with_their_dequantized_weights(model_type: str) -> None:
    theirs, ours = make(model_type, bits=4)
    hidden, index, weights = draw(theirs)
    wanted = theirs(hidden, index, weights)
    assert not torch.allclose(ours(hidden, index, weights), wanted, rtol=1e-2, atol=1e-2)
    for name in ours.stacks:
        theirs.get_parameter(name).data.copy_(ours.dequantized_stack(name))
    compare(ours(hidden, index, weights), theirs(hidden, index, weights), [hidden, weights])


def adapted(theirs: Any, ours: Experts, dtype: torch.dtype) -> list[Tensor]:
    """Put LoRA with random values on both projections of `ours`, and W + sBA into `theirs`.

    Returns A and B of the first and of the second projection.
    """
    generator = torch.Generator().manual_seed(3)
    factors: list[Tensor] = []
    for name in ours.stacks:
        stack = LoraStack(ours.stack(name), LoraSettings(2, 3.0, 0.0, dtype, False))
        stack.initialize(torch.device("cpu"), generator)
        lora = stack.lora()
        nn.init.normal_(lora.b, std=0.3, generator=generator)
        setattr(ours, name, stack)
        delta = lora.scaling * lora.b.float() @ lora.a.float()
        weight = theirs.get_parameter(name).detach()
        del theirs._parameters[name]
        setattr(theirs, name, weight + (delta.mT if ours.is_transposed else delta))
        factors += [lora.a, lora.b]
    return factors


@pytest.mark.parametrize("model_type", CLASSES)
def test_lora_has_the_gradients_through_the_sum(model_type: str) -> None:
    theirs, ours = make(model_type)
    hidden, index, weights = draw(theirs)
    plain = ours(hidden, index, weights)
    factors = adapted(theirs, ours, torch.float32)
    out = ours(hidden, index, weights)
    assert not torch.allclose(out, plain, rtol=1e-2, atol=1e-2)
    compare(out, theirs(hidden, index, weights), [hidden, weights, *factors])
    grads = torch.autograd.grad(ours(hidden, index, weights).sum(), factors)
    assert all(not grad[-1].any() for grad in grads), "the last expert gets no token"
    assert all(grad[:-1].any() for grad in grads)


def test_lora_in_16_bit_rounds_only() -> None:
    theirs, ours = make("mixtral")
    hidden, index, weights = draw(theirs)
    factors = adapted(theirs, ours, torch.float16)
    wanted = torch.autograd.grad(theirs(hidden, index, weights).square().sum(), factors)
    for stack in map(ours.stack, ours.stacks):
        for linear in stack:
            linear.weight_format = WeightFormat(16, torch.bfloat16, torch.bfloat16)
    half = hidden.detach().bfloat16().requires_grad_()
    out = ours(half, index, weights)
    found = torch.autograd.grad(out.float().square().sum(), factors)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float16
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.02 * other.abs().max().item())
