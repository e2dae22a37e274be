"""`qlora verify --server` passes a correct server and names the cause of each seeded fault."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.export.serve.answer_path import Penalty
from qlora_cli.files.locate import STARTER_FOLDER
from tests.helpers.cli_helpers import Outcome, qlora
from tests.helpers.openai_server import ServedModel, serve
from tests.helpers.runs import make_recipe, make_run

pytestmark = pytest.mark.slow

LLAMA2 = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return base, run and merge of the embedded base, a trained model with a chat template."""
    folder = tmp_path_factory.mktemp("served")
    lines = (STARTER_FOLDER / "held_out.jsonl").read_text().splitlines()[:3]
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n")
    recipe = make_recipe(STARTER_FOLDER, rows, data={"seq_len": 128})
    run, _ = make_run(folder / "run", recipe, spread=0.02)
    outcome = qlora("merge", run.path, "--out", folder / "merged", "--base", "original")
    assert outcome.code == 0, outcome.err
    return STARTER_FOLDER, run.path, folder / "merged"


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
    served = ServedModel(world[2], template=LLAMA2, has_usage=has_usage)
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
    folder = Path(copytree(world[2], tmp_path / "other"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = faults(check(world, ServedModel(folder)))
    assert "weights: the answers differ by" in text
    assert "another file" in text


def test_rounded_weights_pass(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder = Path(copytree(world[2], tmp_path / "rounded"))
    tensors = load_file(folder / "model.safetensors")
    rounded = {name: tensor.to(torch.bfloat16).half() for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    outcome = check(world, ServedModel(folder))
    assert outcome.code == 0, outcome.out


def test_a_penalty_is_named(world: tuple[Path, Path, Path]) -> None:
    """Some servers apply one at temperature 0. Their log-probabilities do not show it."""
    text = faults(check(world, ServedModel(world[2], penalty=Penalty(1.1, 64))))
    assert "sampling: the server applies a repetition penalty of 1.1 (3 of 3 texts)" in text
    assert "weights" not in text


def test_an_unknown_penalty_is_no_quantization(world: tuple[Path, Path, Path]) -> None:
    text = faults(check(world, ServedModel(world[2], penalty=Penalty(3.0, 8))))
    assert "sampling: " in text
    assert "weights" not in text


def test_a_server_that_treats_texts_as_chats_passes(world: tuple[Path, Path, Path]) -> None:
    outcome = check(world, ServedModel(world[2], texts_as_chats=True))
    assert outcome.code == 0, outcome.out + outcome.err
    assert "applies the chat template to a text" in " ".join(outcome.json["explanation"])
    assert outcome.json["same_chats"] == 3


def test_chats_are_the_rows_messages(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """With the system prompt of the recipe and all turns before the last trained answer."""
    turns = [("user", "the"), ("assistant", "fox"), ("user", "quick"), ("assistant", "dogs")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    data = {"system": "then", "seq_len": 128}
    run, _ = make_run(tmp_path / "run", make_recipe(world[0], rows, data=data), spread=0.02)
    outcome = qlora("merge", run.path, "--out", tmp_path / "merged", "--base", "original")
    assert outcome.code == 0, outcome.err
    changed = (world[0], run.path, tmp_path / "merged")
    served = ServedModel(tmp_path / "merged")
    outcome = check(changed, served)
    assert outcome.code == 0, outcome.out + outcome.err
    (chat,) = (request["messages"] for request in served.requests if "messages" in request)
    assert chat == [{"role": "system", "content": "then"}, *messages[:3]]
    text = faults(check(changed, ServedModel(tmp_path / "merged", drops_system=True)))
    assert "template: the server omits system messages (1 of 1 chats)" in text


def test_stronger_rounding_than_expected_is_named(
    world: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = Path(copytree(world[2], tmp_path / "rounded"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "layers" in name:
            step = tensor.abs().amax(1, keepdim=True) / 15
            tensors[name] = ((tensor / step).round() * step).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert check(world, ServedModel(folder)).code == 0
    text = faults(check(world, ServedModel(folder), "--bits", "8"))
    assert "quantization: the answers differ" in text
    outcome = check(world, ServedModel(folder, has_logprobs=False), "--bits", "8")
    assert outcome.code == 2
    assert "reports no log-probabilities" in outcome.err


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
