"""The prompts of servers that apply another template or other special tokens.

If a server's answers are not the expected ones, the local model reads these prompts. Those that
explain the answers name the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError

from qlora_cli.export.serve.local_model import LocalModel
from qlora_cli.export.serve.prompts import Messages, Prompt, chat_ids

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
_LLAMA2 = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
_PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
_ROLES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
_TEMPLATES = {
    "the ChatML template": _CHATML,
    "the template of Llama 2": _LLAMA2,
    "no template": _PLAIN,
    "role names and colons": _ROLES,
}
_AS_CHAT = "applies the chat template to a text"
_Change = Callable[[Prompt], list[int]]


@dataclass(frozen=True)
class Variant:
    """Another form of all prompts.

    cause: what is wrong. what: what the server does. prompts: the tokens of each prompt. is_fault:
    False if programs are made to do so, as Ollama, which treats a text as a chat.
    """

    cause: Literal["special tokens", "template"]
    what: str
    prompts: list[list[int]]
    is_fault: bool = True


def variants(model: LocalModel, prompts: Sequence[Prompt]) -> Iterator[Variant]:
    """Yield other forms of prompts, which are all texts or all chats. The causes come in turn."""
    first, bos = prompts[0], model.tokenizer.bos_token_id
    if bos is not None:
        for what, change in _bos_changes(bos, list(first.ids[:1]) == [bos]):
            yield Variant("special tokens", what, [change(prompt.ids) for prompt in prompts])
    for what, ids_of in _text_changes(model) if first.messages is None else _chat_changes(model):
        try:
            changed = [ids_of(prompt) for prompt in prompts]
        except (TemplateError, ValueError):
            continue  # The template does not render such messages.
        yield Variant("template", what, changed, is_fault=what != _AS_CHAT)
        if bos is not None and first.messages is not None:
            with_bos = [[bos, *ids] for ids in changed]
            yield Variant("template", f"{what}, after a BOS token", with_bos)


def _bos_changes(bos: int, has_bos: bool) -> Iterator[tuple[str, Callable[[list[int]], list[int]]]]:
    if has_bos:
        yield "omits the BOS token", lambda ids: ids[1:]
        yield "adds the BOS token twice", lambda ids: [bos, *ids]
    else:
        yield "adds a BOS token, which the tokenizer does not", lambda ids: [bos, *ids]


def _text_changes(model: LocalModel) -> Iterator[tuple[str, _Change]]:
    yield "removes spaces at the ends", lambda prompt: _stripped(model, prompt.text, special=True)
    if model.tokenizer.chat_template:
        yield (
            _AS_CHAT,
            lambda prompt: chat_ids(model, [{"role": "user", "content": prompt.text}]),
        )


def _chat_changes(model: LocalModel) -> Iterator[tuple[str, _Change]]:
    def changed(change: Callable[[Messages], Messages]) -> _Change:
        return lambda prompt: chat_ids(model, change(_messages(prompt)))

    yield (
        "omits the generation prompt of the template",
        lambda prompt: chat_ids(model, _messages(prompt), add_generation_prompt=False),
    )
    yield "omits system messages", changed(lambda chat: [m for m in chat if m["role"] != "system"])
    yield "omits all messages but the last", changed(lambda chat: chat[-1:])
    yield (
        "removes spaces at the ends of the prompt",
        lambda prompt: _stripped(model, model.tokenizer.decode(prompt.ids), special=False),
    )
    for name, template in _TEMPLATES.items():
        yield f"applies {name} instead of the model's own", _rendered_by(model, template)


def _rendered_by(model: LocalModel, template: str) -> _Change:
    return lambda prompt: chat_ids(model, _messages(prompt), chat_template=template)


def _messages(prompt: Prompt) -> Messages:
    assert prompt.messages is not None
    return prompt.messages


def _stripped(model: LocalModel, text: str, *, special: bool) -> list[int]:
    return model.encode(text.strip(), special=special)
