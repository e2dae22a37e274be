"""The prompts of servers that apply another template or other special tokens.

If a server's answer is not the expected one, the local model answers these prompts. An equal answer
names the cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from qlora_cli.export.serve.local_model import LocalModel

Messages = Sequence[Mapping[str, str]]
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


def chat_ids(model: LocalModel, messages: Messages, **settings: Any) -> list[int]:
    """Return the tokens of a chat under the model's own template.

    settings: arguments of `apply_chat_template` that differ.
    """
    text = model.tokenizer.apply_chat_template(
        list(messages), **{"tokenize": False, "add_generation_prompt": True, **settings}
    )
    return model.encode(text, special=False)


def text_variants(model: LocalModel, ids: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Yield (what the server does, tokens) for other special tokens at the start of a prompt.

    ids: the expected tokens.
    """
    bos = model.tokenizer.bos_token_id
    if bos is None:
        return
    if list(ids[:1]) == [bos]:
        yield "omits the BOS token", list(ids[1:])
        yield "adds the BOS token twice", [bos, *ids]
    else:
        yield "adds a BOS token, which the tokenizer does not", [bos, *ids]


def chat_variants(model: LocalModel, messages: Messages) -> Iterator[tuple[str, list[int]]]:
    """Yield (what the server does, tokens) for other renderings of a chat."""
    own = chat_ids(model, messages)
    yield from text_variants(model, own)
    yield (
        "omits the generation prompt of the template",
        chat_ids(model, messages, add_generation_prompt=False),
    )
    for name, template in _TEMPLATES.items():
        try:
            ids = chat_ids(model, messages, chat_template=template)
        except (TemplateError, ValueError):
            continue
        bos = model.tokenizer.bos_token_id
        for tokens in (ids, [bos, *ids] if bos is not None else ids):
            yield f"applies {name} instead of the model's own", tokens
