"""The scale and the soft cap of a model's logits are measured from its own forward method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora_cli.errors import ModelError
from qlora_cli.models.build import skeleton
from qlora_cli.models.head import head_input, measured_head
from qlora_cli.nn.logits import LogitTransform
from qlora_cli.proof.small_config import small_config


def transform_of(model_type: str, **settings: Any) -> LogitTransform:
    config = small_config(AutoConfig.for_model(model_type, **settings))
    return skeleton(config, torch.float32)[1].logits


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("olmo2", {}, LogitTransform()),
        ("granite", {"logits_scaling": 8.0}, LogitTransform(0.125)),
        ("cohere", {"logit_scale": 0.0625}, LogitTransform(0.0625)),
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitTransform(1.0, 2.0)),
        ("gemma2", {"final_logit_softcapping": None}, LogitTransform()),
    ],
)
def test_the_transformation_of_a_class(
    model_type: str, settings: dict[str, Any], expected: LogitTransform
) -> None:
    """Soft caps of a small config are 2."""
    assert transform_of(model_type, **settings) == expected


class _Model(LlamaForCausalLM):
    """A model whose logits are `change` of the head's output."""

    def __init__(self, change: Any) -> None:
        with torch.device("meta"):
            sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
            super().__init__(LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes))
        self.change = change

    def forward(self, **arguments: Any) -> CausalLMOutputWithPast:
        hidden = self.model(**arguments)[0]
        return CausalLMOutputWithPast(logits=self.change(self.lm_head(hidden)))


def test_scale_and_cap_together() -> None:
    model = _Model(lambda z: 5 * torch.tanh(0.5 * z / 5))
    assert measured_head(model, "model", "lm_head").transform == LogitTransform(0.5, 5.0)
    assert isinstance(model.model, nn.Module), "the model itself is not changed"


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z + 1,
        lambda z: z.clamp(max=3),
        lambda z: z.log_softmax(dim=-1),
        lambda z: z.relu(),
        lambda z: 0 * z,
    ],
)
def test_another_function_is_refused(change: Any) -> None:
    with pytest.raises(ModelError, match="times a scale, with a soft cap"):
        measured_head(_Model(change), "model", "lm_head")


def test_an_error_of_the_class_is_reported() -> None:
    def fail(_: Tensor) -> Tensor:
        raise ValueError("no logits today")

    with pytest.raises(ModelError, match="cannot be examined: no logits today"):
        measured_head(_Model(fail), "model", "lm_head")


@pytest.mark.parametrize(("model_type", "has_code"), [("bert", True), ("gpt_neox", False)])
def test_code_before_the_head(model_type: str, has_code: bool) -> None:
    config = small_config(AutoConfig.for_model(model_type, is_decoder=True))
    model, family = skeleton(config, torch.float32)
    assert family.has_head_input == has_code
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(5, config.hidden_size)
    found = head_input(model, family.backbone, family.head, hidden)
    expected = model.cls.predictions.transform(hidden) if has_code else hidden
    assert torch.equal(found, expected)
