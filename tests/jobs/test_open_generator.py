"""Prompts for each adapter are formatted as in its own training."""

from __future__ import annotations

from pathlib import Path

from qlora_cli.events import Silent
from qlora_cli.jobs.generate import Prompter, open_prompter
from qlora_cli.jobs.text_generator import Sampling
from qlora_cli.models.save_adapter import save_adapter
from tests.helpers.observers import NoteRecorder
from tests.helpers.runs import build_base, make_base, make_recipe, make_rows

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


def text_of(prompter: Prompter, name: str) -> str:
    """Return the text that the model reads for the prompt `a`."""
    chosen = prompter.formats[name]
    return str(chosen.tokenizer.decode(chosen.ids("a")))


def test_an_adapter_with_a_template_gets_prompts_in_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"))
    adapters = {name: tmp_path / name for name in ("own", "unknown")}
    save_adapter(build_base(recipe), recipe, adapters["own"], TEMPLATE)
    save_adapter(build_base(recipe), recipe, adapters["unknown"])
    notes = NoteRecorder()
    prompter = open_prompter(str(base), Sampling(1), notes, adapters={"own": adapters["own"]})
    assert text_of(prompter, "own") == "<a>"
    assert any("the adapter's chat template" in note for note in notes.notes)
    only = {"unknown": adapters["unknown"]}
    plain = open_prompter(str(base), Sampling(1), Silent(), adapters=only)
    assert text_of(plain, "unknown") == "a "


def test_each_adapter_gets_prompts_in_its_own_template(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"))
    adapters = {name: tmp_path / name for name in ("one", "two")}
    save_adapter(build_base(recipe), recipe, adapters["one"], TEMPLATE)
    save_adapter(build_base(recipe), recipe, adapters["two"], TEMPLATE.replace("<", "["))
    prompter = open_prompter(str(base), Sampling(1), Silent(), adapters=adapters)
    assert [text_of(prompter, name) for name in adapters] == ["<a>", "[a>"]
