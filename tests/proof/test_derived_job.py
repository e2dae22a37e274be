"""A whole job on model types whose family is derived: train, merge, verify, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_cli.events import Silent
from qlora_cli.files import cache
from qlora_cli.jobs import merge, train, verify
from qlora_cli.proof.prove import ModelProof
from qlora_cli.runs.layout import RunFolder
from tests.helpers.cli_helpers import qlora
from tests.helpers.runs import make_base, make_recipe, make_rows

pytestmark = pytest.mark.slow


SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has an empty cache."""
    monkeypatch.setenv(cache.SWITCH, str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "model_type",
    ["phi3", "gemma2", "bloom", "gpt_neox", "qwen3_5_text", "qwen3_moe", "gpt_oss"],
)
def test_it_trains_merges_and_generates(model_type: str, tmp_path: Path) -> None:
    settings = SETTINGS.get(model_type, {})
    base = make_base(tmp_path / "base", model_type, spread=0.1, **settings)
    rows = make_rows(tmp_path / "rows.jsonl")
    recipe = make_recipe(base, rows, train={"steps": 2, "grad_accum": 1, "lr": 1e-2})
    recipe = recipe.model_copy(update={"output": str(tmp_path / "run")})
    assert train.run(recipe, recipe_path=None, resume=False, observer=Silent()).steps == 2
    proof = ModelProof.from_dict(RunFolder(tmp_path / "run").read()["proof"])
    assert proof.failed is None
    assert proof.seconds > 0
    out = tmp_path / "merged"
    merge.run(tmp_path / "run", out=out, dtype=None, base="dequantized", observer=Silent())
    result = verify.run(out, against=tmp_path / "run", observer=Silent())
    assert result.passed, result.faults
    answer = qlora("generate", out, "--prompt", "ab", "--max-new-tokens", "3", "--raw", "--json")
    assert answer.code == 0, answer.err


def test_a_refused_type_is_refused_by_every_command(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "hrm_text", spread=0.1)
    rows = make_rows(tmp_path / "rows.jsonl")
    recipe = tmp_path / "job.yaml"
    recipe.write_text(f"model: {{name: {base}}}\ndata: {{train: {rows}}}\noutput: {tmp_path}/run\n")
    for words in (
        ("plan", recipe),
        ("train", recipe),
        ("generate", base, "--prompt", "a"),
        ("eval", base, "--data", rows),
    ):
        outcome = qlora(*words)
        assert outcome.code == 2, words
        assert "model type 'hrm_text' is not supported" in outcome.err
