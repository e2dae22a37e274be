"""`qlora verify --server` passes a correct server and names the cause of each seeded fault."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.cli_helpers import Outcome, qlora
from tests.helpers.openai_server import ServedModel, serve
from tests.helpers.runs import make_recipe, make_rows, make_run
from tests.helpers.vocabularies import byte_level_of, make_model_with_tokenizer

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
OTHER_TEMPLATE = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return base, run and merge of a random model, whose answers depend on every token."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = byte_level_of("gpt-2")
    tokenizer.chat_template = TEMPLATE
    base = make_model_with_tokenizer(folder / "base", "llama", tokenizer, spread=0.3)
    rows = make_rows(folder / "rows.jsonl", num=3)
    run, _ = make_run(folder / "run", make_recipe(base, rows), spread=0.2)
    outcome = qlora("merge", run.path, "--out", folder / "merged", "--base", "dequantized")
    assert outcome.code == 0, outcome.err
    return base, run.path, folder / "merged"


def check(world: tuple[Path, Path, Path], served: ServedModel, *words: str) -> Outcome:
    with serve(served) as url:
        return qlora("verify", world[2], "--against", world[1], "--server", url, "--json", *words)


def faults(outcome: Outcome) -> str:
    assert outcome.code == 4, outcome.out + outcome.err
    assert outcome.json["passed"] is False
    return "\n".join(outcome.json["faults"])


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_correct_server_passes(world: tuple[Path, Path, Path], is_complete: bool) -> None:
    served = ServedModel(
        world[2],
        has_usage=is_complete,
        has_logprobs=is_complete,
        has_reason=is_complete,
        is_strict=not is_complete,
    )
    outcome = check(world, served)
    assert outcome.code == 0, outcome.out + outcome.err
    result = outcome.json
    assert (result["model"], result["texts"], result["same_texts"]) == ("tuned", 3, 3)
    assert (result["chats"], result["same_chats"]) == (3, 3)
    assert result["faults"] == []
    assert result["mean_gap"] == 0
    if is_complete:
        assert result["mean_logprob_difference"] < 1e-4
    else:
        assert result["mean_logprob_difference"] is None


@pytest.mark.parametrize("has_usage", [True, False])
def test_another_template_is_named(world: tuple[Path, Path, Path], has_usage: bool) -> None:
    served = ServedModel(world[2], template=OTHER_TEMPLATE, has_usage=has_usage)
    text = faults(check(world, served))
    assert "template: the server applies the template of Llama 2" in text
    assert "weights" not in text


@pytest.mark.parametrize("has_usage", [True, False])
def test_a_missing_bos_token_is_named(world: tuple[Path, Path, Path], has_usage: bool) -> None:
    served = ServedModel(world[2], adds_bos=False, has_usage=has_usage)
    text = faults(check(world, served))
    assert "special tokens: the server omits the BOS token (3 of 3 texts)" in text
    assert "weights" not in text


def test_the_base_in_place_of_the_merge_is_named(world: tuple[Path, Path, Path]) -> None:
    text = faults(check(world, ServedModel(world[0])))
    assert "weights: the base without the adapter explains the server's answers" in text


def test_other_weights_are_named(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from shutil import copytree

    folder = Path(copytree(world[2], tmp_path / "other"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = faults(check(world, ServedModel(folder)))
    assert "weights: the answers differ by" in text


def test_rounded_weights_pass(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from shutil import copytree

    import torch

    folder = Path(copytree(world[2], tmp_path / "rounded"))
    tensors = load_file(folder / "model.safetensors")
    rounded = {name: tensor.to(torch.bfloat16).half() for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    outcome = check(world, ServedModel(folder))
    assert outcome.code == 0, outcome.out


def test_a_wrong_name_and_a_missing_server_are_errors(world: tuple[Path, Path, Path]) -> None:
    outcome = check(world, ServedModel(world[2]), "--name", "no")
    assert outcome.code == 2
    assert "it has tuned" in outcome.err
    words = ("verify", world[2], "--against", world[1])
    outcome = qlora(*words, "--server", "http://127.0.0.1:9")
    assert outcome.code == 1
    assert "cannot be reached" in outcome.err
    outcome = qlora(*words, "--server", "localhost")
    assert outcome.code == 2
    assert "is not an address" in outcome.err
    assert qlora(*words, "--name", "x").code == 2
