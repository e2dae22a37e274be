"""`--base auto` chooses by the size of the quantization error."""

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
from tests.helpers.observers import NoteRecorder
from tests.helpers.runs import make_base, make_recipe, make_rows, make_run

MULTIPLIER = 1 / 256
"""Factor on the norms' weights; the linears after them are divided by it."""
EVERY = 64
"""One column in 64 is large, so every block of 64 weights contains a large one."""


def starter_base(folder: Path) -> Path:
    """Copy the embedded base, which was trained on real text, into a folder of its own."""
    source = Path(str(resources.files("qlora_cli.starter")))
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.jsonl", "*.py*"))
    return folder


def hide_large_weights(base: Path) -> None:
    """Enlarge a few columns of the linears and reduce the norms before them.

    The function of the model is unchanged, because both factors are powers of two. This makes
    quantization inaccurate, as in Falcon-H1: the scale of a block is set by its largest weight, and
    the other weights are rounded to 0.
    """
    weights = load_file(base / "model.safetensors")
    linears_after = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    for layer in range(layers):
        for norm, linears in linears_after.items():
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
    notes = NoteRecorder()
    result = merge.run(run, out=tmp_path / "out", dtype=None, base="auto", observer=notes)
    print("\n".join(notes.notes))
    assert result.base == "original"
    report = verify.run(tmp_path / "out", against=run, observer=Silent())
    assert report.faults == ()
    assert "trained on a quantized base" in report.explanation[0]


@pytest.mark.slow
def test_large_weights_after_small_norms_are_merged_into_the_dequantized_base(
    tmp_path: Path,
) -> None:
    base = starter_base(tmp_path / "base")
    hide_large_weights(base)
    run = fine_tune(base, tmp_path / "run", steps=40)
    notes = NoteRecorder()
    result = merge.run(run, out=tmp_path / "out", dtype=None, base="auto", observer=notes)
    print("\n".join(notes.notes))
    assert result.base == "dequantized"
    assert verify.run(tmp_path / "out", against=run, observer=Silent()).faults == ()
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())
    table = manifest["judgement"]["table"]  # words: allow
    assert table["original"]["loss"] > table["dequantized"]["loss"]
    merge.run(run, out=tmp_path / "lost", dtype=None, base="original", observer=Silent())
    faults = verify.run(tmp_path / "lost", against=run, observer=Silent()).faults
    lost = (
        "the merge into the original base lost the fine-tuning; merge again with --base dequantized"
    )
    assert lost in faults


def comparison(kl: float, loss: float) -> Comparison:
    return Comparison(0.0, mean_kl=kl, top1_agreement=1.0, loss=loss, signed_loss=loss)


@pytest.mark.parametrize(
    ("original", "lost"),
    [
        (comparison(0.10, 2.5), False),  # close to the trained model; the loss does not matter
        (comparison(0.90, 1.9), False),  # far from it, with a lower loss
        (comparison(0.90, 2.1), True),  # far from it, with a higher loss
        (comparison(float("nan"), 1.0), True),
    ],
)
def test_the_rule_for_losing_the_fine_tuning(original: Comparison, lost: bool) -> None:
    assert loses_fine_tune(original, comparison(0.001, 2.0), frozen=comparison(1.0, 3.0)) is lost


def test_an_adapter_without_effect_is_not_lost() -> None:
    original, frozen = comparison(0.001, 2.0), comparison(0.0, 1.0)
    assert not loses_fine_tune(original, comparison(0.0, 1.0), frozen=frozen)


def test_a_trained_model_that_computes_nan_cannot_be_the_reference(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"))
    run, _ = make_run(tmp_path / "run", recipe, spread=1e30)
    with pytest.raises(QloraError, match="the trained model computes NaN"):
        merge.run(run.path, out=tmp_path / "out", dtype="float32", base="auto", observer=Silent())


@pytest.mark.slow
def test_the_compared_rows_are_reported(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    rows = make_rows(tmp_path / "rows.jsonl")
    gone = {"train": str(tmp_path / "gone.jsonl"), "eval": None}
    cases = (
        ({}, "12 held-out rows of"),
        (
            {"eval": None},
            "there are no held-out rows; the comparison uses the last 12 training rows of",
        ),
        (gone, "the comparison uses random tokens, which are not typical of the task"),
    )
    for number, (data, message) in enumerate(cases):
        run, _ = make_run(tmp_path / f"run{number}", make_recipe(base, rows, data=data))
        notes, out = NoteRecorder(), tmp_path / f"out{number}"
        merge.run(run.path, out=out, dtype=None, base="auto", observer=notes)
        assert any(message in note for note in notes.notes), notes.notes


def test_a_comparison_matches_the_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(7, 4), torch.randint(11, (7,))
    words = {"head.weight": 3 * torch.randn(11, 4)}
    save_file(words, tmp_path / "head.safetensors")
    head = Head(read_header(tmp_path / "head.safetensors")[0]["head.weight"], torch.float32)
    ours = ComparedLogits(hidden, head, targets)
    theirs = ComparedLogits(hidden + 0.1 * torch.randn(7, 4), head, targets)
    p, q = (one.hidden_states @ words["head.weight"].t() for one in (ours, theirs))
    most, (p, q) = float((p - q).abs().max()), (one.double().log_softmax(1) for one in (p, q))
    # With the complete vocabulary at once, and with two entries at a time.
    for elements in (logit_comparison._CHUNK_ELEMENTS, 14):
        monkeypatch.setattr(logit_comparison, "_CHUNK_ELEMENTS", elements)
        signs = torch.tensor([1, 1, -1, 1, -1, -1, 1])
        found = compare(ours, theirs, signs)
        losses = -q[torch.arange(7), targets]
        assert found.signed_loss == pytest.approx(float((losses * signs).mean()), rel=1e-6)
        assert compare(ours, theirs).signed_loss == found.loss
        assert found.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-5)
        assert found.loss == pytest.approx(float(losses.mean()), rel=1e-6)
        assert found.top1_agreement == float((p.argmax(1) == q.argmax(1)).double().mean())
        assert found.max_logit_difference == pytest.approx(most, rel=1e-5)
        assert torch.equal(theirs.top1_tokens(), q.argmax(1))


def test_a_nan_is_reported(tmp_path: Path) -> None:
    save_file({"head.weight": torch.randn(11, 4)}, tmp_path / "head.safetensors")
    head = Head(read_header(tmp_path / "head.safetensors")[0]["head.weight"], torch.float32)
    hidden, targets = torch.randn(7, 4), torch.randint(11, (7,))
    spoiled = hidden.clone()
    spoiled[3] = torch.nan
    found = compare(ComparedLogits(hidden, head, targets), ComparedLogits(spoiled, head, targets))
    assert math.isnan(found.mean_kl)
    assert math.isnan(found.max_logit_difference)
