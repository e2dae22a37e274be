"""A model opened for generation computes what transformers computes, with and without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_cli.errors import InputError, ModelError, UsageError
from qlora_cli.events import Silent
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.merge.write import write_merged
from qlora_cli.files.atomic import atomic_folder
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.open import open_any, open_model, open_run
from qlora_cli.runs.resume import write_parameters
from qlora_cli.runs.run import Run
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import CPU, build_base, logits, make_base, make_recipe, make_rows, make_run

IDS = torch.tensor([[5, 80, 91, 7, 33, 250, 64, 12]])
PRETRAINED = ("stories260K", "gpt_nano_sort", "books-gpt2")


def transformers_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generate_greedily(model: Any, ids: Tensor, num: int) -> list[int]:
    """Return `ids` and a greedy continuation of `num` tokens."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )
    return [int(token) for token in output[0]]


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_the_logits_of_transformers(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family, dtype=dtype)
    loaded, reference = open_model(base, CPU, Silent()), transformers_model(base)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded, IDS), reference(IDS).logits[0])
    assert generate_greedily(loaded.model, IDS, 20) == generate_greedily(reference, IDS, 20)
    assert loaded.model.generation_config.top_k == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretrained_model_generates_the_same_text(name: str, shared: Path) -> None:
    folder = shared / "data" / "models" / name
    loaded, reference = open_model(folder, CPU, Silent()), transformers_model(folder)
    ids = torch.tensor([[1, 2, 0, 1, 2, 1]])
    num = 5 if name == "gpt_nano_sort" else 60
    assert generate_greedily(loaded.model, ids, num) == generate_greedily(reference, ids, num)


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_an_opened_run_computes_the_logits_of_the_trained_model(
    family: str, bits: int, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family)
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"), base={"bits": bits})
    run, trained = make_run(tmp_path / "run", recipe)
    opened = open_run(Run(run.path), CPU, Silent())
    assert torch.equal(logits(opened, IDS), logits(trained, IDS))
    if bits != 8:  # int8 scales each row of activations by its largest value
        text = generate_greedily(opened.model, IDS, 12)
        complete = opened.model(torch.tensor([text[:-1]]), use_cache=False).logits[0]
        assert text[IDS.shape[1] :] == complete.argmax(1)[IDS.shape[1] - 1 :].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_run_generates_the_text_of_the_run(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    run, _ = make_run(tmp_path / "run", make_recipe(base, make_rows(tmp_path / "rows.jsonl")))
    tensors = open_merged_tensors(Run(run.path), "dequantized", torch.float32, CPU)
    write_merged(tensors, base, tmp_path / "out", {}, Silent())
    opened = open_run(Run(run.path), CPU, Silent())
    assert generate_greedily(transformers_model(tmp_path / "out"), IDS, 20) == generate_greedily(
        opened.model, IDS, 20
    )


def test_a_full_fine_tuning_opens_its_own_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", tied=True)
    recipe = make_recipe(
        base,
        make_rows(tmp_path / "rows.jsonl"),
        base={"bits": 16},
        adapter={"method": "full"},
    )
    trained = build_base(recipe)
    with torch.no_grad():
        for parameter in trained.trainable().values():
            parameter += 0.01
    run = RunFolder(tmp_path / "run")
    run.create()
    run.write({"recipe": recipe.model_dump(mode="json"), "base_folder": str(base)})
    with atomic_folder(run.weights) as folder:
        write_parameters(trained.trainable(), folder / "model.safetensors")
    trained.model.eval()
    assert torch.equal(logits(open_run(Run(run.path), CPU, Silent()), IDS), logits(trained, IDS))


def test_a_run_and_a_model_folder_are_distinguished(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    run, _ = make_run(tmp_path / "run", make_recipe(base, make_rows(tmp_path / "rows.jsonl")))
    assert open_any(str(run.path), CPU, Silent()).loaded.adapted
    opened = open_any(str(base), CPU, Silent())
    assert not opened.loaded.adapted
    assert opened.folder == base
    with pytest.raises(InputError, match="no folder"):
        open_any(str(tmp_path / "nothing"), CPU, Silent())


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"base": {"bits": 16}},
        {"base": {"bits": 8, "outlier_threshold": 0.0}},
        {"base": {"bits": 16}, "adapter": {"method": "full"}},
        {"adapter": {"rslora": True, "targets": ["q"], "alpha": 3.5}},
    ],
    ids=str,
)
def test_a_recipe_is_read_back_from_run_json(sections: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "base", tmp_path / "rows.jsonl", **sections)
    run = RunFolder(tmp_path / "run")
    run.create()
    run.write({"recipe": recipe.model_dump(mode="json")})
    assert Run(run.path).recipe == recipe


def test_a_run_without_its_adapter_or_base_is_a_clear_error(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    run, _ = make_run(tmp_path / "run", make_recipe(base, make_rows(tmp_path / "rows.jsonl")))
    run.adapter.rename(tmp_path / "elsewhere")
    run.write(run.read() | {"status": "interrupted"})
    with pytest.raises(UsageError, match="no trained weights yet; its status is interrupted"):
        open_run(Run(run.path), CPU, Silent())
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="the base that the run was trained on is not at"):
        open_run(Run(run.path), CPU, Silent())
