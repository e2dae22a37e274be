"""Ranks and alphas of single roles: PEFT's patterns, round trip and merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.adapters.peft_config import read_peft_config
from qlora_cli.errors import ProblemsError
from qlora_cli.events import Silent
from qlora_cli.jobs import merge, verify
from qlora_cli.models.attach import load_adapter
from qlora_cli.runs.open import open_run
from qlora_cli.runs.run import Run
from tests.helpers.moe import make_moe
from tests.helpers.peft_helpers import IDS, frozen_16_bit, load_into_peft, peft_logits
from tests.helpers.runs import CPU, build_base, logits, make_base, make_recipe, make_rows, make_run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
OWN = {"ranks": {"q": 2, "down": 7}, "alphas": {"q": 1.5, "up": 9.0}}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", OWN),
        ("llama", {**OWN, "rslora": True}),
        (
            "gpt2",
            {"ranks": {"q": 2, "k": 2, "v": 2, "up": 5}, "alphas": {"up": 3.0}, "rslora": True},
        ),
    ],
)
def test_peft_computes_the_same_logits(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base, recipe = frozen_16_bit(tmp_path, family, targets="all", **settings)
    run, loaded = make_run(tmp_path / "run", recipe)
    ours = logits(loaded, IDS)
    peft = load_into_peft(base, run.adapter)
    torch.testing.assert_close(peft_logits(peft), ours, rtol=1e-4, atol=1e-3)
    opened = open_run(Run(run.path), CPU, Silent())
    assert torch.equal(logits(opened, IDS), ours)
    fresh = build_base(recipe)
    load_adapter(fresh, run.adapter)
    for (path, layer), (_, expected) in zip(
        adapted_layers(fresh.model), adapted_layers(loaded.model), strict=True
    ):
        assert layer.settings == expected.settings, path
        assert torch.equal(layer.delta(), expected.delta()), path


def test_the_patterns_of_peft_name_the_roles(tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, "llama", targets="all", **OWN)
    run, _ = make_run(tmp_path / "run", recipe)
    config = read_peft_config(run.adapter)
    assert (config.r, config.lora_alpha) == (3, 6.0)
    assert config.rank_pattern == {"q_proj": 2, "down_proj": 7, "up_proj": 3}
    assert config.alpha_pattern == {"q_proj": 1.5, "down_proj": 6.0, "up_proj": 9.0}


@pytest.mark.parametrize("kind", ["original", "dequantized"])
def test_the_merge_is_verified(kind: str, tmp_path: Path) -> None:
    base, rows = make_base(tmp_path / "base", "llama"), make_rows(tmp_path / "rows.jsonl")
    run, _ = make_run(tmp_path / "run", make_recipe(base, rows, adapter=OWN))
    out = tmp_path / "merged"
    merge.run(run.path, out=out, dtype=None, base=kind, observer=Silent())
    result = verify.run(out, against=run.path, observer=Silent())
    assert result.passed, result.faults


@pytest.mark.slow
def test_experts_can_have_a_rank_of_their_own(tmp_path: Path) -> None:
    base, rows = make_moe(tmp_path / "base", "qwen3_moe"), make_rows(tmp_path / "rows.jsonl")
    adapter = {"targets": ["q", "experts"], "ranks": {"experts": 1}, "alphas": {"experts": 4.0}}
    recipe = make_recipe(base, rows, base={"bits": 16}, adapter=adapter)
    run, loaded = make_run(tmp_path / "run", recipe)
    model = load_into_peft(base, run.adapter)
    torch.testing.assert_close(peft_logits(model), logits(loaded, IDS), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "llama",
            {"ranks": {"qq": 2}},
            "adapter.ranks: 'qq' is not an adapted role (adapted roles: q, k, v, o",
        ),
        (
            "llama",
            {"targets": ["q"], "alphas": {"v": 2.0}},
            "'v' is not an adapted role (adapted roles: q)",
        ),
        ("gpt2", {"ranks": {"q": 2}}, "q, k, v are rows of one linear (transformer.h.0.attn"),
    ],
)
def test_ranks_that_do_not_fit_the_targets_are_refused(
    family: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base, rows = make_base(tmp_path / "base", family), make_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ProblemsError) as caught:
        build_base(make_recipe(base, rows, adapter=settings))
    assert message in str(caught.value)
