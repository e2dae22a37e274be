"""Code that replaces transformers' value-dependent code computes the same, also on meta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_cli.nn.plannable import replace_value_dependent
from qlora_cli.proof.small_config import small_config
from tests.helpers.type_settings import PROVED_SETTINGS

_WIDTH, _TOKENS = 64, 13


def module_of(model_type: str, class_name: str) -> Any:
    """Return the first module of a class in a small random model, with larger weights."""
    config = small_config(AutoConfig.for_model(model_type, **PROVED_SETTINGS.get(model_type, {})))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found: Any = next(m for m in model.modules() if type(m).__name__ == class_name)
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.2)
    return found


def both(module: Any, *arguments: Any) -> tuple[Any, Any]:
    """Return the outputs of transformers' own code and of its replacement."""
    own = module(*arguments)
    replace_value_dependent(module)
    assert "forward" in vars(module)
    return own, module(*arguments)


def routed(num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, expert numbers and weights; some experts get no token."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(_TOKENS, _WIDTH, generator=generator)
    index = torch.stack(
        [torch.randperm(num_experts, generator=generator)[:2] for _ in range(_TOKENS)]
    )
    return hidden, index, torch.rand(_TOKENS, 2, generator=generator)


@pytest.mark.parametrize(
    ("model_type", "class_name", "num_experts"),
    [("dbrx", "DbrxExperts", 3), ("longcat_flash", "LongcatFlashExperts", 6)],
)
def test_experts(model_type: str, class_name: str, num_experts: int) -> None:
    hidden, index, weights = routed(num_experts)
    if model_type == "dbrx":
        hidden = hidden[None]
    own, replaced = both(module_of(model_type, class_name), hidden, index, weights)
    assert own.shape == replaced.shape
    assert torch.allclose(own, replaced, rtol=1e-5, atol=1e-6)


def test_the_router_of_jetmoe() -> None:
    own, replaced = both(module_of("jetmoe", "JetMoeTopKGating"), routed(4)[0])
    # Rows of one expert may have another order.
    assert own[3] == replaced[3]
    order = [torch.argsort(result[0]) for result in (own, replaced)]
    for number in (1, 2):
        assert torch.equal(own[number][order[0]], replaced[number][order[1]])
    assert torch.equal(own[4], replaced[4])


@pytest.mark.parametrize("length", [1, 2, 9, _TOKENS])
def test_the_keys_that_qwen4_chooses(length: int) -> None:
    indexer = module_of("qwen4_exp_text", "Qwen4ExpTextQSAIndexer")
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randn(1, length, _WIDTH, generator=generator)
    angles = torch.rand(1, length, 4, generator=generator)
    positions = (torch.cos(angles), torch.sin(angles))
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    own, replaced = both(indexer, hidden, positions, causal, None)
    assert torch.equal(own & causal, replaced & causal)
    if length == _TOKENS:
        assert not torch.equal(own & causal, causal), "no key was left out"
