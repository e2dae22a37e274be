"""The language model of a composed model is trained; a merge keeps the other parts bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from qlora_cli.errors import ModelError
from qlora_cli.events import Silent
from qlora_cli.files import cache
from qlora_cli.jobs import merge, train, verify
from tests.helpers.cli_helpers import qlora
from tests.helpers.composed import composed_recipe, make_composed
from tests.helpers.runs import build_base


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests share the proofs of one new cache."""
    folder = tmp_path_factory.getbasetemp() / "composed_cache"
    monkeypatch.setenv(cache.SWITCH, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "dtype"), [("gemma3", torch.bfloat16), ("llava", torch.float16)]
)
def test_a_merge_keeps_the_other_parts(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The merge is in float16, the other parts keep the dtype of the base."""
    base = make_composed(tmp_path / "base", model_type, dtype)
    train.run(composed_recipe(base, tmp_path), recipe_path=None, resume=False, observer=Silent())
    run, out = tmp_path / "run", tmp_path / "merged"
    merge.run(run, out=out, dtype=None, base="dequantized", observer=Silent())
    result = verify.run(out, against=run, observer=Silent())
    assert result.passed, result.faults
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    vision = [name for name in before if "vision_tower" in name or "projector" in name]
    assert len(vision) > 10
    assert {before[name].dtype for name in vision} == {dtype}
    assert all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
        for name in vision
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} >= {"q_proj", "v_proj"}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    assert configs[0] | {"dtype": "float16"} == configs[1]
    assert (out / "preprocessor_config.json").is_file()
    _, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    answer = qlora("generate", out, "--prompt", "ab", "--max-new-tokens", "3", "--raw", "--json")
    assert answer.code == 0, answer.err


@pytest.mark.slow
def test_a_changed_tensor_of_the_vision_tower_is_detected(tmp_path: Path) -> None:
    base = make_composed(tmp_path / "base", "llava")
    train.run(composed_recipe(base, tmp_path), recipe_path=None, resume=False, observer=Silent())
    run, out = tmp_path / "run", tmp_path / "merged"
    merge.run(run, out=out, dtype=None, base="dequantized", observer=Silent())
    file = out / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "projector" in name)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    result = verify.run(out, against=run, observer=Silent())
    assert any(fault.startswith(name) for fault in result.faults), result.faults


def test_the_other_parts_are_not_loaded(tmp_path: Path) -> None:
    base = make_composed(tmp_path / "base", "llava")
    loaded = build_base(composed_recipe(base, tmp_path))
    assert loaded.family.backbone == "model.language_model"
    names = [name for name, _ in loaded.model.named_parameters()]
    assert all(name.startswith(("model.language_model.", "lm_head.")) for name in names)


def test_a_missing_tensor_of_the_language_model_is_reported(tmp_path: Path) -> None:
    base = make_composed(tmp_path / "base", "llava")
    file = base / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "language_model" in name and "q_proj" in name)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing: model\.language_model\.layers\.0"):
        build_base(composed_recipe(base, tmp_path))
