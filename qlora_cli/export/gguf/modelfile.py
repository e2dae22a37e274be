"""Write a Modelfile for Ollama next to a GGUF file: template, system message and stop strings.

It also switches off the penalty to repeated tokens that Ollama applies by default.

Ollama does not run the model's Jinja template; it has Go templates. The texts that the Jinja
template writes around each message are found by rendering marked messages. The Go template is
written only if these texts also give what the Jinja template gives for other chats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.files.atomic import atomic_file, report_write_errors

MODELFILE = "Modelfile"
_FROM = "FROM ./"
_ROLES = ("system", "user", "assistant")
_MARKS = {role: f"MARK{number}CONTENT" for number, role in enumerate(_ROLES)}
_RESERVED = ("{{", "}}", '"""')
"""Texts with a meaning of their own in a Modelfile."""


@dataclass(frozen=True)
class GoTemplate:
    """The texts around a message by role, and those that begin an answer.

    around: role -> (text before, text after). prompt: begins an answer. system: the system message
    that the Jinja template inserts if a chat has none; None if it inserts none.
    """

    around: dict[str, tuple[str, str]]
    prompt: str
    system: str | None

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return a chat with the beginning of an answer, as Ollama renders it."""
        has_system = messages[0]["role"] == "system"
        default = [] if has_system or self.system is None else [_message("system", self.system)]
        parts = [
            self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1]
            for m in [*default, *messages]
        ]
        return "".join(parts) + self.prompt

    def text(self) -> str:
        """Return the Go template."""
        branches = "".join(
            f'{{{{ {"if" if role == "system" else "else if"} eq .Role "{role}" }}}}'
            f"{before}{{{{ .Content }}}}{after}"
            for role, (before, after) in self.around.items()
        )
        return f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def write_modelfile(folder: Path, file: Path) -> str | None:
    """Write `Modelfile` into a merged folder and return a note on it.

    A Modelfile of another GGUF file is replaced if it is as it was written. One that was changed
    since is kept. The note is None if the right one is there already.

    file: the GGUF file in the folder that it names.

    Raises QloraError if it cannot be written.
    """
    target = folder / MODELFILE
    tokenizer = load_tokenizer(str(folder))
    has_template = bool(getattr(tokenizer, "chat_template", None))
    template = go_template(tokenizer) if has_template else None
    content = _content(file.name, template, tokenizer)
    if target.exists():
        present = target.read_text(encoding="utf-8", errors="replace")
        if present == content:
            return None
        named = present.partition("\n")[0].removeprefix(_FROM)
        if present != _content(named, template, tokenizer):
            return f"{MODELFILE} was changed, so it is kept; it may not name {file.name}"
    with report_write_errors(MODELFILE, target), atomic_file(target) as partial:
        partial.write_text(content, encoding="utf-8")
    how = "" if template else " without a template, because the chat template has no Go equivalent"
    if not has_template:
        how = " without a template, because the model has none"
    return f"{MODELFILE} for Ollama written{how}: ollama create NAME -f {target}"


def go_template(tokenizer: Any) -> GoTemplate | None:
    """Return the Go template that is equal to a tokenizer's chat template; None if none is."""
    try:
        template = _find(tokenizer)
        chats = (
            [_message("user", "a b"), _message("assistant", "c"), _message("user", "d\ne")],
            [_message("system", "s"), _message("user", "x")],
            [_message("user", "y")],
        )
        is_equal = all(_jinja(tokenizer, chat) == template.render(chat) for chat in chats)
    except (TemplateError, ValueError):
        return None
    texts = (*sum(template.around.values(), ()), template.prompt, template.system or "")
    is_safe = not any(word in text for word in _RESERVED for text in texts)
    return template if is_equal and is_safe else None


def _find(tokenizer: Any) -> GoTemplate:
    """Return the texts around marked messages. Raises ValueError if a mark is missing."""
    system, user, assistant = (_message(role, _MARKS[role]) for role in _ROLES)
    chat = [system, user, assistant]
    # The text of a message is what it adds to the chat before it.
    one, two, three = (_jinja(tokenizer, chat[:count], prompt=False) for count in (1, 2, 3))
    if not (two.startswith(one) and three.startswith(two)):
        raise ValueError("a message changes the text before it")
    added = {"system": one, "user": two[len(one) :], "assistant": three[len(two) :]}
    around = {role: _split(text, _MARKS[role]) for role, text in added.items()}
    prompt = _jinja(tokenizer, chat[:2]).removeprefix(two)
    alone = _jinja(tokenizer, [user], prompt=False).removesuffix(added["user"])
    before, after = around["system"]
    default = None
    if alone:
        if not (alone.startswith(before) and alone.endswith(after)):
            raise ValueError("the chat begins with a text that is no system message")
        default = alone[len(before) : len(alone) - len(after)]
    return GoTemplate(around, prompt, default)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _split(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError("the template changes the content of a message")
    return before, after


def _jinja(tokenizer: Any, chat: Sequence[dict[str, str]], *, prompt: bool = True) -> str:
    """Return a chat without the BOS token, which llama.cpp adds itself."""
    text = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=prompt)
    return str(text).removeprefix(tokenizer.bos_token or "") if _adds_bos(tokenizer) else str(text)


def _adds_bos(tokenizer: Any) -> bool:
    return list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _content(file_name: str, template: GoTemplate | None, tokenizer: Any) -> str:
    lines = [_FROM + file_name]
    stops = [tokenizer.eos_token]
    if template is not None:
        lines.append(f'TEMPLATE """{template.text()}"""')
        if template.system is not None:
            lines.append(f'SYSTEM """{template.system}"""')
        stops.append(template.around["assistant"][1].strip())
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if _is_stop(stop)]
    return "\n".join([*lines, "PARAMETER repeat_penalty 1"]) + "\n"


def _is_stop(text: str | None) -> bool:
    return bool(text) and '"' not in str(text) and "\n" not in str(text)
