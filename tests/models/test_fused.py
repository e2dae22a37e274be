"""Fused linears of derived families: each role has the rows that the model's code uses for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from qlora_cli.adapters.lora import LoraLinear
from qlora_cli.errors import ProblemsError
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.models.sites import find_sites
from qlora_cli.nn.site import Site
from qlora_cli.proof.small_model import SmallModel, small_model
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.peft_helpers import load_into_peft
from tests.helpers.runs import build_base, randomize_b

TOKEN = 5


class _Captured(Exception):
    """Ends the forward pass of a model."""


def attention_output(
    small: SmallModel, path: str, change: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Return the output (tokens, width) of a fused linear's owner before its own last linear.

    path: the fused linear. change: changes the output (1, tokens, rows) of it in place.
    """
    owner = small.reference.get_submodule(path.rpartition(".")[0])
    last = [m for name, m in owner.named_children() if name != path.rpartition(".")[2]]
    last = [module for module in last if hasattr(module, "weight")][-1]

    def changed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        if change is not None:
            change(output.view(1, -1, output.shape[-1]))
        return output

    def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Captured(inputs[0])

    hooks = [
        owner.get_submodule(path.rpartition(".")[2]).register_forward_hook(changed),
        last.register_forward_pre_hook(capture),
    ]
    found: list[Tensor] = []
    try:
        with torch.no_grad():
            small.reference(input_ids=small.batch(9).input_ids)
    except _Captured as captured:
        found.append(captured.args[0])
    finally:
        for hook in hooks:
            hook.remove()
    return found[0].reshape(9, -1)


def fused_site(small: SmallModel, role: str) -> Site:
    """Return the first fused linear with this role."""
    loaded = small.loaded
    sites = find_sites(small.reference, loaded.family, small.config)
    return next(site for site in sites if role in site.roles and len(site.roles) > 1)


@pytest.mark.parametrize("model_type", ["phi3", "mpt", "openai-gpt", "gpt_bigcode", "falcon"])
def test_q_k_and_v_act_as_queries_keys_and_values(model_type: str) -> None:
    """The query of a token affects this token only; values act linearly, keys do not."""
    with small_model(AutoConfig.for_model(model_type), CAUSAL) as small:
        site = fused_site(small, "q")
        assert site.roles == ("q", "k", "v")
        once = attention_output(small, site.path)

        def moved(role: str, factor: float) -> Tensor:
            rows = site.rows[role]
            noise = torch.linspace(-1, 1, rows.stop - rows.start)

            def change(output: Tensor) -> None:
                output[0, TOKEN, rows] += factor * noise

            return attention_output(small, site.path, change) - once

        changes = {role: (moved(role, 1.0), moved(role, 2.0)) for role in site.roles}
    for role, (one, two) in changes.items():
        assert one[:TOKEN].abs().max() < 1e-6
        assert one[TOKEN].abs().max() > 1e-4
        assert (one[TOKEN + 1 :].abs().max() > 1e-4) == (role != "q")
        assert torch.allclose(two, 2 * one, atol=1e-5) == (role == "v")


@pytest.mark.parametrize("model_type", ["phi3", "glm4", "granitemoehybrid"])
def test_the_output_is_proportional_to_up(model_type: str) -> None:
    with small_model(AutoConfig.for_model(model_type), CAUSAL) as small:
        site = fused_site(small, "up")
        once = attention_output(small, site.path)

        def doubled(role: str) -> Tensor:
            def change(output: Tensor) -> None:
                output[..., site.rows[role]] *= 2

            return attention_output(small, site.path, change)

        up, gate = doubled("up"), doubled("gate")
    torch.testing.assert_close(up, 2 * once)
    assert not torch.allclose(gate, 2 * once, rtol=1e-2)


def recipe_of(small: SmallModel, *targets: str) -> Recipe:
    recipe = small.recipe()
    adapter = recipe.adapter.model_copy(update={"targets": list(targets)})
    return recipe.model_copy(update={"adapter": adapter})


def test_q_and_v_change_only_their_rows(tmp_path: Path) -> None:
    with small_model(AutoConfig.for_model("phi3"), CAUSAL) as small:
        recipe = recipe_of(small, "q", "v")
        loaded = build_base(recipe)
        randomize_b(loaded)
        save_adapter(loaded, recipe, tmp_path / "adapter")
        merged = load_into_peft(small.folder, tmp_path / "adapter").merge_and_unload()
        original = small.reference.state_dict()
        for site in loaded.sites:
            layer = loaded.model.get_submodule(site.path)
            found = merged.state_dict()[f"{site.path}.weight"] - original[f"{site.path}.weight"]
            if "q" not in site.roles:
                assert not found.any()
                continue
            assert isinstance(layer, LoraLinear)
            torch.testing.assert_close(found, layer.delta(), rtol=1e-4, atol=1e-6)
            assert not found[site.rows["k"]].any()
            assert all(found[site.rows[role]].any() for role in "qv")


@pytest.mark.parametrize(
    ("model_type", "role", "fused"),
    [("gpt_neox", "q", "query_key_value"), ("bloom", "v", "query_key_value")],
)
def test_a_role_inside_alternating_rows_is_refused(model_type: str, role: str, fused: str) -> None:
    with (
        small_model(AutoConfig.for_model(model_type), CAUSAL) as small,
        pytest.raises(ProblemsError, match=rf"{role} is a part of the fused linear {fused}"),
    ):
        build_base(recipe_of(small, role))
