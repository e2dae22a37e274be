"""The planned phase `merge` equals the memory that the compared models really need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.data.encode import Example
from qlora_cli.device import DeviceProfile
from qlora_cli.export.compare.comparison_models import merged_model, trained_model
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.options import MERGE_BASES
from qlora_cli.files.locate import read_config
from qlora_cli.memory.ledger import Phase
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.plan import merging
from qlora_cli.runs.run import Run
from qlora_cli.units import GIB
from tests.helpers.runs import CPU, make_base, make_recipe, make_rows, make_run

TOKENS = 64
PROFILE = DeviceProfile("cpu", "a CPU", 24 * GIB)
LARGE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "head_dim": 64}
LARGE_GPT2 = {"n_embd": 256, "n_head": 4}


@pytest.mark.slow
@pytest.mark.parametrize("has_copy", [False, True])
@pytest.mark.parametrize(
    ("family", "bits", "overrides"),
    [
        *((family, bits, {}) for family in ("llama", "qwen3", "gpt2") for bits in (4, 8)),
        ("llama", 4, {"down": 8, "*.1.*": 16}),
    ],
    ids=str,
)
def test_the_plan_equals_the_measured_memory(
    family: str,
    bits: int,
    has_copy: bool,
    overrides: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"bits": bits, "cache": has_copy, "overrides": overrides}
    _check_plan(family, tmp_path, monkeypatch, {"base": settings})


@pytest.mark.slow
def test_the_plan_of_residuals_equals_the_measured_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"base": {"bits": 8}, "adapter": {"init": "pissa"}}
    _check_plan("llama", tmp_path, monkeypatch, sections)


def _check_plan(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    """Compare the plan of a merge with the memory that it needs. sections: of the recipe."""
    sizes = LARGE_GPT2 if family == "gpt2" else LARGE
    base = make_base(tmp_path / "base", family, **sizes)
    recipe = make_recipe(
        base,
        make_rows(tmp_path / "rows.jsonl"),
        data={"seq_len": TOKENS},
        **sections,
    )
    run, _ = make_run(tmp_path / "run", recipe)
    tensors = open_merged_tensors(Run(run.path), "original", torch.float16, CPU)
    if sections["base"].get("cache"):
        trained_model(tensors, base, may_be_resident=True)
        tensors = open_merged_tensors(Run(run.path), "original", torch.float16, CPU)
    ids = [3 + 7 * place % 250 for place in range(TOKENS)]
    rows = [Example(ids, ids, "")]
    memory_model = MemoryModel.of(PROFILE)
    counter = memory_model.new_counter()
    with memory_model.new_tracker(counter, "cpu"), counter.phase("merge"):
        trained_model(tensors, base, may_be_resident=False).compared_logits(rows)
        for kind in MERGE_BASES:
            merged_model(replace(tensors, base=kind), base).compared_logits(rows)

    monkeypatch.setattr(merging, "MAX_TOKENS", TOKENS)
    monkeypatch.setattr(merging, "COMPARISON_BYTES", 0)
    config = read_config(Run(run.path).base_folder / "config.json")
    plan: Phase = merging.dry_run_merge(Run(run.path).recipe, config, PROFILE)
    # In so small a model, constants of a few hundred KiB are several percent.
    assert plan.peak_bytes == pytest.approx(counter.phases[0].peak_bytes, rel=0.1)
