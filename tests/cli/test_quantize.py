"""`qlora quantize` measures the base of a recipe and writes a recipe with the mix."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.recipe.load import load_recipe
from tests.helpers.cli_helpers import qlora
from tests.helpers.runs import make_base, make_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe on a small random base."""
    base = make_base(tmp_path / "base", "llama", spread=0.15)
    rows = make_rows(tmp_path / "rows.jsonl", num=20)
    file = tmp_path / "small.yaml"
    file.write_text(
        f"model: {{name: {base}}}\nadapter: {{rank: 3, targets: all}}\n"
        f"data: {{train: {rows}, eval: 0.5, seq_len: 32}}\ntrain: {{steps: 2}}\n"
    )
    return file


def test_the_mix_is_written_as_a_recipe_that_trains(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixed.yaml"
    outcome = qlora("quantize", small, "--out", out, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    plain, *_, chosen = result["steps"]
    assert plain["overrides"] == {}
    assert chosen["kl"] < plain["kl"]
    assert chosen["bytes"] <= result["budget_bytes"] == int(1.1 * plain["bytes"])
    recipe, before = load_recipe(out), load_recipe(small)
    assert dict(recipe.base.overrides) == chosen["overrides"] != {}
    assert recipe.adapter == before.adapter
    assert (recipe.data, recipe.train, recipe.model) == (before.data, before.train, before.model)
    assert f"next: qlora train {out}" in outcome.err
    run = tmp_path / "run"
    assert qlora("train", out, f"output={run}").code == 0
    planned = qlora("plan", out, "--json").json["ledger"]["phases"]
    phase = next(p for p in planned if p["name"] == "checkpoint")["at_peak"]
    of_base = sum(phase.get(k, 0) for k in ("base", "quant_constants", "embeddings", "head"))
    assert of_base == pytest.approx(chosen["bytes"], rel=0.01)


def test_an_existing_recipe_is_replaced_only_with_force(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixed.yaml"
    out.write_text("mine")
    outcome = qlora("quantize", small, "--out", out)
    assert outcome.code == 2
    assert "already exists" in outcome.err
    assert out.read_text() == "mine"
    assert qlora("quantize", small, "--out", out, "--force").code == 0
    assert load_recipe(out).base.overrides
    outcome = qlora("quantize", small, "--force")
    assert outcome.code == 2
    assert "--force is for --out" in outcome.err


def test_the_table_names_the_linears_and_the_bases(small: Path) -> None:
    outcome = qlora("quantize", small, "--budget", "1GiB")
    assert outcome.code == 0
    assert "model.layers.0.mlp.down_proj" in outcome.out
    assert "recovered" in outcome.out
    assert f"next: qlora train {small} base.bits=auto base.budget={2**30}" in outcome.err


def test_a_wanted_kl_is_reached_or_the_exit_code_is_1(small: Path) -> None:
    kl = qlora("quantize", small, "--json").json["steps"][0]["kl"]
    outcome = qlora("quantize", small, "--target-kl", str(kl / 2), "--json")
    assert outcome.code == 0
    assert outcome.json["reached"] is True
    assert outcome.json["steps"][-1]["kl"] <= kl / 2


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (("--budget", "1KiB"), 3, "in 4 bit"),
        (("--budget", "much"), 2, "is not a size"),
        (("--budget", "1GiB", "--target-kl", "0.1"), 2, "one of --budget and --target-kl"),
        (("adapter.method=full", "base.bits=16"), 2, "full fine-tuning does not quantize"),
        (("data.train=missing.jsonl", "data.eval="), 2, "no rows to measure"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(
    small: Path, options: tuple[str, ...], code: int, text: str
) -> None:
    outcome = qlora("quantize", small, *options)
    assert outcome.code == code, outcome.err
    assert text in outcome.err
