"""`--adapter` and `--use`: several adapters on one base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import qlora_cli.starter
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow

PROMPT = ("--prompt", "name: Copper Swan", "--max-new-tokens", "8")
STARTER = Path(qlora_cli.starter.__file__).parent


@pytest.fixture(scope="module")
def loud(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run's adapter in PEFT's format with B times 300, so that its effect is large."""
    folder = tmp_path_factory.mktemp("loud") / "adapter"
    shutil.copytree(run / "adapter", folder)
    file = folder / "adapter_model.safetensors"
    tensors = {
        name: 300 * tensor if ".lora_B." in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    return folder


def text_of(*arguments: str | Path) -> str:
    outcome = qlora("generate", *arguments, *PROMPT, "--json")
    assert outcome.code == 0, outcome.err
    return str(outcome.json["text"])


def test_every_adapter_generates_in_turn(run: Path, loud: Path) -> None:
    arguments = ("--adapter", f"loud={loud}", "--adapter", f"again={run}", *PROMPT)
    outcome = qlora("generate", run, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    assert list(result["answers"]) == ["run", "loud", "again"]
    assert result["text"] == result["answers"]["run"] == text_of(run)
    assert result["answers"]["again"] == result["answers"]["run"] != result["answers"]["loud"]
    printed = qlora("generate", run, *arguments).out
    assert "loud:\n" in printed
    assert result["answers"]["loud"].strip() in printed


def test_use_selects_the_adapters(run: Path, loud: Path) -> None:
    arguments = ("--adapter", f"loud={loud}", *PROMPT)
    outcome = qlora("generate", run, *arguments, "--use", "loud", "--use", "base", "--json")
    assert outcome.code == 0, outcome.err
    assert list(outcome.json["answers"]) == ["loud", "base"]
    assert outcome.json["text"] == outcome.json["answers"]["loud"]
    assert "note" not in outcome.err


def test_each_adapter_samples_with_the_same_seed(run: Path) -> None:
    arguments = ("--adapter", f"again={run}", "--temperature", "1.5", *PROMPT)
    answers = qlora("generate", run, *arguments, "--json").json["answers"]
    assert answers["again"] == answers["run"]


def test_without_an_adapter_the_model_is_the_base() -> None:
    result = qlora("generate", "starter", *PROMPT, "--json").json
    assert result["answers"] == {"base": result["text"]}
    assert qlora("generate", "starter", *PROMPT, "--use", "base", "--json").json == result


def test_merged_adapters_generate_the_same_text(loud: Path, run: Path) -> None:
    """The adapter is large enough that rounding to 16 bit does not change the greedy tokens."""
    arguments = ("--adapter", f"loud={loud}", "--adapter", f"run2={run}", "--use", "loud")
    arguments += ("--use", "run2", "--use", "base", *PROMPT)
    plain = qlora("generate", "starter", *arguments, "--json")
    merged = qlora("generate", "starter", *arguments, "--merged", "--json")
    assert plain.code == merged.code == 0, plain.err + merged.err
    assert merged.json == plain.json


def test_an_adapter_on_another_base_than_its_own_is_noted(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(STARTER, tmp_path / "copy")
    outcome = qlora("generate", copy, "--adapter", f"far={run}", *PROMPT)
    assert outcome.code == 0, outcome.err
    assert f"is used here on {copy}" in " ".join(outcome.err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter", "loud"), "'loud' is not NAME=DIR"),
        (("--adapter", "=x"), "'=x' is not NAME=DIR"),
        (("--adapter", "a=x", "--adapter", "a=y"), "'a' is given twice"),
        (("--adapter", "a=nowhere"), "no adapter_config.json in nowhere"),
        (("--adapter", "base={loud}"), "the name 'base' is taken"),
        (("--adapter", "run={loud}"), "the name 'run' is taken"),
        (("--use", "loud"), "there is no adapter 'loud'"),
        (("--merged",), "cannot be added to the weights of a 4-bit base"),
    ],
    ids=str,
)
def test_invalid_adapter_options_are_refused(
    arguments: tuple[str, ...], message: str, run: Path, loud: Path
) -> None:
    filled = [word.format(loud=loud) for word in arguments]
    outcome = qlora("generate", run, *filled, *PROMPT)
    assert outcome.code == 2
    assert message in outcome.err


def test_merged_without_an_adapter_is_refused() -> None:
    outcome = qlora("generate", "starter", "--merged", *PROMPT)
    assert outcome.code == 2
    assert "there is no adapter to merge" in outcome.err


def test_chat_switches_the_adapter_on_a_use_line(run: Path, loud: Path) -> None:
    lines = "Hello\n/use loud\nHello\n/use lout\n/use\n/use base\nHello\n\n"
    outcome = qlora("chat", run, "--adapter", f"loud={loud}", "--use", "run", stdin=lines)
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) >= 3
    assert "loud answers" in outcome.err
    assert "did you mean loud?" in outcome.err
    assert "there is no adapter ''" in outcome.err
    assert outcome.err.rstrip().splitlines()[-2].endswith("base answers")


def test_the_base_does_not_see_the_answers_of_an_adapter(run: Path, loud: Path) -> None:
    chat = ("chat", run, "--adapter", f"loud={loud}", "--use")
    outcome = qlora(*chat, "loud", stdin="Hello\nHello\n/use base\nHello\n\n")
    assert outcome.code == 0, outcome.err
    assert "the conversation starts over; base answers" in outcome.err
    alone = qlora(*chat, "base", stdin="Hello\n\n")
    assert outcome.out.endswith(alone.out)
    assert alone.out.strip()


def test_chat_with_merged_adapters_gives_the_same_answers(run: Path, loud: Path) -> None:
    arguments = ("--adapter", f"loud={loud}", "--adapter", f"run2={run}")
    lines = "Hello\n/use run2\nHello\n/use base\nHello\n\n"
    merged = qlora("chat", "starter", *arguments, "--merged", stdin=lines)
    assert merged.code == 0, merged.err
    assert merged.out == qlora("chat", "starter", *arguments, stdin=lines).out
