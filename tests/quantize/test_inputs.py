"""The measured inputs of linears are those of transformers' own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_cli.events import Silent
from qlora_cli.quantize.inputs import measure_inputs
from tests.helpers.families import MODEL_TYPES
from tests.helpers.marks import slow_after_first
from tests.helpers.measured_base import ROWS, measured_base


@pytest.mark.parametrize("family", slow_after_first(MODEL_TYPES))
def test_mean_squares_are_those_of_the_16_bit_model(tmp_path: Path, family: str) -> None:
    base = measured_base(tmp_path, family)
    found = measure_inputs(base, Silent())
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    expected = {}
    for site in base.sites:

        def keep(_: object, given: tuple[torch.Tensor], path: str = site.path) -> None:
            expected[path] = given[0].flatten(0, -2).square().mean(dim=0)

        model.get_submodule(site.path).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.tensor(ROWS))
    assert found.keys() == expected.keys() == {site.path for site in base.sites}
    for path, values in found.items():
        torch.testing.assert_close(values, expected[path], rtol=1e-3, atol=1e-5)
