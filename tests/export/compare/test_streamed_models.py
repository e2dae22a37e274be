"""A streamed model computes the same logits as the same model in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_cli.data.encode import Example
from qlora_cli.events import Silent
from qlora_cli.export.compare import comparison_models, greedy_agreement
from qlora_cli.export.compare.comparison_models import folder_model, trained_model
from qlora_cli.export.compare.greedy_agreement import (
    NUM_TOKENS,
    count_agreeing_tokens,
    greedy_continuation,
)
from qlora_cli.export.compare.logit_comparison import compare
from qlora_cli.export.merge.merged_tensors import MergedTensors
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.merge.write import write_merged
from qlora_cli.export.verify.file_checks import loading_faults
from qlora_cli.export.verify.verification import verify
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import CPU, logits, make_base, make_recipe, make_rows, make_run

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
ROWS = [
    Example(ids, [-100, *ids[1:]], "row")
    for ids in (list(range(5, 25)), list(range(40, 9, -3)), [7, 9, 7])
]


def make_run_and_merge(
    folder: Path, family: str, bits: int = 4
) -> tuple[RunFolder, MergedTensors, Path]:
    base = make_base(folder / "base", family, max_position_embeddings=128)
    recipe = make_recipe(base, make_rows(folder / "rows.jsonl"), base={"bits": bits})
    run, _ = make_run(folder / "run", recipe, spread=0.1)
    return run, open_merged_tensors(Run(run.path), "dequantized", torch.float16, CPU), base


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every model streamed, as on a machine with little memory."""
    monkeypatch.setattr(comparison_models, "fits", lambda *_: False)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_streamed_and_resident_models_are_the_same(
    family: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tensors, base = make_run_and_merge(tmp_path, family, bits)
    resident = trained_model(tensors, base, may_be_resident=True)
    monkeypatch.setattr(comparison_models, "fits", lambda *_: False)
    streamed = trained_model(tensors, base, may_be_resident=True)
    assert (resident.is_resident, streamed.is_resident) == (True, False)
    assert torch.equal(
        resident.compared_logits(ROWS).hidden_states, streamed.compared_logits(ROWS).hidden_states
    )
    # After a pass no weight stays in memory, and a second pass gives the same result.
    assert all(parameter.is_meta for parameter in streamed.loaded.model.parameters())
    assert (
        compare(resident.compared_logits(ROWS), streamed.compared_logits(ROWS)).max_logit_difference
        == 0
    )


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_folder_computes_the_logits_of_transformers_for_each_row(
    family: str, tmp_path: Path
) -> None:
    """All rows are in one sequence and do not attend to each other."""
    _, _, base = make_run_and_merge(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = torch.cat(
        [
            part
            for _, part in folder_model(CAUSAL, base, torch.float16, CPU)
            .compared_logits(ROWS)
            .logits()
        ],
        1,
    )
    with torch.no_grad():
        expected = [model(torch.tensor([row.ids])).logits[0, :-1] for row in ROWS]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_greedy_tokens_are_the_same_with_a_cache_and_with_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tensors, base = make_run_and_merge(tmp_path, "llama")
    recipe = Run(run.path).recipe
    generated = greedy_continuation(trained_model(tensors, base, may_be_resident=True), ROWS)
    # The definition: one forward pass over the complete sequence for each token.
    ids, (_, loaded) = ROWS[0].ids[:10], make_run(tmp_path / "again", recipe, spread=0.1)
    for _ in range(NUM_TOKENS):
        ids.append(int(logits(loaded, torch.tensor([ids]))[-1].argmax()))
    assert generated.ids == ids
    monkeypatch.setattr(comparison_models, "fits", lambda *_: False)
    drafted = greedy_continuation(trained_model(tensors, base, may_be_resident=True), ROWS)
    num = drafted.num_targets
    assert num >= greedy_agreement._PASSES
    assert drafted.ids == generated.ids[: len(drafted.ids)]


def test_agreement_is_counted_up_to_the_first_difference(tmp_path: Path) -> None:
    _, tensors, base = make_run_and_merge(tmp_path, "llama")
    model = trained_model(tensors, base, may_be_resident=True)
    continuation = greedy_continuation(model, ROWS)
    found = count_agreeing_tokens(model.compared_logits([continuation]))
    assert (found.num_agreeing, found.num_tokens) == (NUM_TOKENS, NUM_TOKENS)
    at = len(continuation.ids) - NUM_TOKENS + 20
    continuation.ids[at] = continuation.labels[at] = (continuation.ids[at] + 1) % 200
    assert count_agreeing_tokens(model.compared_logits([continuation])).num_agreeing == 20


@pytest.mark.slow
@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_verify_passes_and_fails_with_streamed_models(family: str, tmp_path: Path) -> None:
    run, tensors, base = make_run_and_merge(tmp_path, family)
    write_merged(tensors, base, tmp_path / "out", {}, Silent())
    verdict = verify(tmp_path / "out", Run(run.path), CPU, Silent())
    assert verdict.faults == ()
    assert verdict.comparison is not None
    assert verdict.comparison.mean_kl < 1e-4
    assert verdict.greedy is not None
    assert verdict.greedy.num_tokens >= greedy_agreement._PASSES
    other = open_merged_tensors(Run(run.path), "dequantized", torch.float16, CPU, weight=1.5)
    write_merged(other, base, tmp_path / "wrong", {}, Silent())
    manifest = tmp_path / "wrong" / "merge.json"
    content = json.loads(manifest.read_text())
    content["settings"]["adapters"][0]["weight"] = 1.0
    manifest.write_text(json.dumps(content))
    verdict = verify(tmp_path / "wrong", Run(run.path), CPU, Silent())
    assert any("differs from base + scaling B A" in fault for fault in verdict.faults)
    assert verdict.comparison is not None
    assert verdict.comparison.mean_kl > 1e-2


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_loading_with_transformers_checks_every_tensor(
    family: str, tied: bool, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family, tied=tied)
    assert list(loading_faults(base, CAUSAL.model_class)) == []
    file = base / "model.safetensors"
    tensors = load_file(file)
    name = next(
        name for name in tensors if name.endswith(("ln_1.weight", "input_layernorm.weight"))
    )
    for spoiled, message in (
        ({f"{name}.more": tensors[name]}, f"unexpected keys: {name}.more"),
        ({}, f"missing keys: {name}"),
        ({name: torch.ones(3)}, "transformers cannot load the folder"),
    ):
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file({**rest, **spoiled}, file, metadata={"format": "pt"})
        assert any(message in fault for fault in loading_faults(base, CAUSAL.model_class)), message
