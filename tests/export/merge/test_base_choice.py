"""`--base auto` in both worlds: quantization is a small error, and quantization is a large one."""

from __future__ import annotations

import json
import math
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import QloraError
from qlora_cli.events import Silent
from qlora_cli.export.compare import logit_comparison
from qlora_cli.export.compare.logit_comparison import ComparedLogits, Comparison, Head, compare
from qlora_cli.export.merge.base_choice import loses_fine_tune
from qlora_cli.files.safetensors_io import read_header
from qlora_cli.jobs import merge, train, verify
from qlora_cli.recipe.schema import Recipe
from tests.helpers.runs import make_base, make_recipe, make_rows, make_run

MULTIPLIER = 1 / 256
"""Of the norms' weights in the world of large weights; what stands behind is that much larger."""
EVERY = 64
"""One column in so many is large, so that each block of 64 weights shares its scale with one."""


class Notes(Silent):
    """Keeps what a job tells."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def starter_base(folder: Path) -> Path:
    """The embedded base, which was trained on real text, as a folder of its own."""
    source = Path(str(resources.files("qlora_cli.starter")))
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.jsonl", "*.py*"))
    return folder


def hide_large_weights(base: Path) -> None:
    """The same function with a few columns made large and the norms before them made small.

    Exact in arithmetic, because both factors are powers of two. It is what makes quantization a
    disaster in Falcon-H1: a block's scale follows its largest weight, and the others vanish.
    """
    weights = load_file(base / "model.safetensors")
    behind = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    for layer in range(layers):
        for norm, linears in behind.items():
            weights[f"model.layers.{layer}.{norm}.weight"][::EVERY] *= MULTIPLIER
            for linear in linears:
                weights[f"model.layers.{layer}.{linear}.weight"][:, ::EVERY] /= MULTIPLIER
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def fine_tune(base: Path, run: Path, steps: int) -> Path:
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(base)},
            "base": {"bits": 4},
            "adapter": {"rank": 8, "alpha": 16.0, "targets": "all"},
            "data": {"train": "starter:train", "eval": "starter:held_out", "seq_len": 256},
            "train": {"steps": steps, "grad_accum": 2, "micro_batch": 1, "lr": 3e-3},
            "output": str(run),
        }
    )
    train.run(recipe, recipe_path=None, resume=False, observer=Silent())
    return run


@pytest.mark.slow
def test_an_ordinary_model_is_merged_into_its_original_base(tmp_path: Path) -> None:
    run = fine_tune(starter_base(tmp_path / "base"), tmp_path / "run", steps=25)
    notes = Notes()
    result = merge.run(run, out=tmp_path / "out", dtype=None, base="auto", observer=notes)
    print("\n".join(notes.told))
    assert result.base == "original"
    told = Notes()
    assert verify.run(tmp_path / "out", against=run, observer=told).faults == ()
    assert any("trained on a quantized base" in note for note in told.told)


@pytest.mark.slow
def test_large_weights_behind_small_multipliers_keep_the_base_they_were_trained_on(
    tmp_path: Path,
) -> None:
    base = starter_base(tmp_path / "base")
    hide_large_weights(base)
    run = fine_tune(base, tmp_path / "run", steps=40)
    notes = Notes()
    result = merge.run(run, out=tmp_path / "out", dtype=None, base="auto", observer=notes)
    print("\n".join(notes.told))
    assert result.base == "dequantized"
    assert verify.run(tmp_path / "out", against=run, observer=Silent()).faults == ()
    table = json.loads((tmp_path / "out" / "merge.json").read_text())["judgement"]["table"]
    assert table["original"]["loss"] > table["dequantized"]["loss"]
    merge.run(run, out=tmp_path / "lost", dtype=None, base="original", observer=Silent())
    faults = verify.run(tmp_path / "lost", against=run, observer=Silent()).faults
    lost = (
        "the merge into the original base lost the fine-tuning; merge again with --base dequantized"
    )
    assert lost in faults


def told(kl: float, loss: float) -> Comparison:
    return Comparison(max_logit_difference=0.0, mean_kl=kl, top1_agreement=1.0, loss=loss)


@pytest.mark.parametrize(
    ("original", "lost"),
    [
        (told(0.10, 2.5), False),  # near the trained model, whatever its loss
        (told(0.90, 1.9), False),  # far from it, but better
        (told(0.90, 2.1), True),  # far from it and worse
        (told(float("nan"), 1.0), True),
    ],
)
def test_the_rule(original: Comparison, lost: bool) -> None:
    assert loses_fine_tune(original, told(0.001, 2.0), frozen=told(1.0, 3.0)) is lost


def test_a_trained_model_that_answers_nan_cannot_be_a_judge(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"))
    run, _ = make_run(tmp_path / "run", recipe, spread=1e30)
    with pytest.raises(QloraError, match="the trained model computes NaN"):
        merge.run(run.path, out=tmp_path / "out", dtype="float32", base="auto", observer=Silent())


def test_what_it_was_judged_on_is_told(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    rows = make_rows(tmp_path / "rows.jsonl")
    gone = {"train": str(tmp_path / "gone.jsonl"), "eval": None}
    cases = (
        ({}, "12 held-out rows of"),
        ({"eval": None}, "there are no held-out rows; judged on the last 12 training rows of"),
        (gone, "judged on random tokens, which say little about the task"),
    )
    for number, (data, words) in enumerate(cases):
        run, _ = make_run(tmp_path / f"run{number}", make_recipe(base, rows, data=data))
        notes, out = Notes(), tmp_path / f"out{number}"
        merge.run(run.path, out=out, dtype=None, base="auto", observer=notes)
        assert any(words in note for note in notes.told), notes.told


def test_figures_of_a_comparison_are_those_of_the_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(7, 4), torch.randint(11, (7,))
    words = {"head.weight": 3 * torch.randn(11, 4)}
    save_file(words, tmp_path / "head.safetensors")
    head = Head(read_header(tmp_path / "head.safetensors")[0]["head.weight"], torch.float32)
    ours = ComparedLogits(hidden, head, targets)
    theirs = ComparedLogits(hidden + 0.1 * torch.randn(7, 4), head, targets)
    p, q = (one.hidden_states @ words["head.weight"].t() for one in (ours, theirs))
    most, (p, q) = float((p - q).abs().max()), (one.double().log_softmax(1) for one in (p, q))
    # In one piece, and two words at a time.
    for elements in (logit_comparison._CHUNK_ELEMENTS, 14):
        monkeypatch.setattr(logit_comparison, "_CHUNK_ELEMENTS", elements)
        found = compare(ours, theirs)
        assert found.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-5)
        assert found.loss == pytest.approx(float(-q[torch.arange(7), targets].mean()), rel=1e-6)
        assert found.top1_agreement == float((p.argmax(1) == q.argmax(1)).double().mean())
        assert found.max_logit_difference == pytest.approx(most, rel=1e-5)
        assert torch.equal(theirs.top1_tokens(), q.argmax(1))


def test_a_nan_is_not_passed_over(tmp_path: Path) -> None:
    save_file({"head.weight": torch.randn(11, 4)}, tmp_path / "head.safetensors")
    head = Head(read_header(tmp_path / "head.safetensors")[0]["head.weight"], torch.float32)
    hidden, targets = torch.randn(7, 4), torch.randint(11, (7,))
    spoiled = hidden.clone()
    spoiled[3] = torch.nan
    found = compare(ComparedLogits(hidden, head, targets), ComparedLogits(spoiled, head, targets))
    assert math.isnan(found.mean_kl)
    assert math.isnan(found.max_logit_difference)
