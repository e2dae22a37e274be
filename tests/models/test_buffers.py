"""Buffers that no checkpoint contains get the values that transformers gives them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_cli.errors import ModelError
from qlora_cli.models.buffers import created_buffers
from qlora_cli.models.build import skeleton
from qlora_cli.proof.small_config import small_config


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "falcon_h1", "gpt_bigcode", "phi3"])
def test_buffers_equal_transformers(model_type: str) -> None:
    config = small_config(AutoConfig.for_model(model_type))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    expected = dict(AutoModelForCausalLM.from_config(config, dtype=torch.float32).named_buffers())
    found = created_buffers(empty)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value is not None, name
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_a_buffer_that_nothing_sets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(AutoConfig.for_model("olmo2"))
    original = AutoModelForCausalLM.from_config

    def with_another_buffer(*args: object, **settings: object) -> nn.Module:
        model = original(*args, **settings)
        table = torch.empty(3, device="meta")
        model.model.layers[1].register_buffer("secret", table, persistent=False)
        return model  # type: ignore[no-any-return]

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", with_another_buffer)
    with pytest.raises(ModelError, match=r"buffer model\.layers\.1\.secret is created"):
        skeleton(config, torch.float32)
