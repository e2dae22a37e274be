"""Derived families: for the types of hand-written families they are the same description."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_cli.models.derive import derive_family, dropout_keys
from qlora_cli.models.registry import known_family
from tests.helpers.families import MODEL_TYPES, small_config


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_equals_the_hand_written_family(model_type: str) -> None:
    config = small_config(model_type)
    for key in dropout_keys(config):
        setattr(config, key, 0.0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    derived, written = derive_family(model), known_family(config)
    assert written is not None
    for field in ("backbone", "blocks", "head", "embeddings", "mlp", "final_norm"):
        assert getattr(derived, field) == getattr(written, field), field
    assert set(derived.norms) == set(written.norms)
    assert set(derived.dropouts) >= set(written.dropouts) & set(config.to_dict())
    paths = {linear.path: linear for linear in derived.linears}
    assert paths.keys() == {linear.path for linear in written.linears}
    for linear in written.linears:
        assert paths[linear.path].transposed == linear.transposed
        if len(linear.roles) == 1:
            assert paths[linear.path].roles == linear.roles
