"""The Modelfile for Ollama has a Go template that is equal to the chat template, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_cli.events import Silent
from tests.helpers.observers import NoteRecorder
from tests.helpers.vocabularies import byte_level_of, make_model_with_tokenizer

pytest.importorskip("gguf")
from qlora_cli.export.gguf.modelfile import go_template
from qlora_cli.export.gguf.write import export_gguf
from qlora_cli.export.options import GgufType

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_level_of("gpt-2")
    tokenizer.chat_template = template
    return tokenizer


def test_chatml_with_a_default_system_message(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", tokenizer_with(CHATML))
    export_gguf(folder, "f16", Silent())
    assert (folder / "Modelfile").read_text() == (
        "FROM ./model-F16.gguf\n"
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'SYSTEM """Be kind."""\n'
        'PARAMETER stop "</s>"\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER repeat_penalty 1\n"
    )


def test_the_file_that_was_exported_last_is_named(tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", tokenizer_with(CHATML))
    modelfile = folder / "Modelfile"
    kinds: tuple[GgufType, ...] = ("f16", "q8_0", "f16")
    for kind in kinds:
        export_gguf(folder, kind, Silent())
        assert modelfile.read_text().startswith(f"FROM ./model-{kind.upper()}.gguf\n")


@pytest.mark.parametrize("content", ["mine", "FROM ./model-F16.gguf\nPARAMETER num_ctx 4096\n"])
def test_a_changed_modelfile_is_kept(content: str, tmp_path: Path) -> None:
    folder = make_model_with_tokenizer(tmp_path / "model", "llama", tokenizer_with(CHATML))
    (folder / "Modelfile").write_text(content)
    notes = NoteRecorder()
    export_gguf(folder, "q8_0", notes)
    assert (folder / "Modelfile").read_text() == content
    assert any("Modelfile was changed, so it is kept" in note for note in notes.notes)


def test_a_bos_token_in_the_template_is_left_to_llama_cpp() -> None:
    template = go_template(tokenizer_with("{{ bos_token }}" + CHATML))
    assert template is not None
    assert template.around["system"][0] == "<|im_start|>system\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{% raw %}{{{% endraw %}{{ m['content'] }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_without_an_equal_go_template_is_left_out(template: str) -> None:
    assert go_template(tokenizer_with(template)) is None
