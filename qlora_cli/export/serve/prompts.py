"""The prompts that are sent to a server: the held-out rows of the run, as texts and as chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_cli.data.conversation import Conversation
from qlora_cli.data.encode import Example
from qlora_cli.data.formats import content_of
from qlora_cli.data.mixture import read_data, read_held_out
from qlora_cli.data.row_store import Row, Rows
from qlora_cli.data.stream import groups_of
from qlora_cli.data.system_prompt import add_system
from qlora_cli.errors import InputError
from qlora_cli.export.compare.eval_rows import MAX_ROWS
from qlora_cli.export.serve.local_model import LocalModel
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.recipe.schema import Data, DataFormat

Messages = Sequence[Mapping[str, str]]
MAX_PROMPTS = 8
_MAX_CHARACTERS = 400
"""Length of a chat that is made of a row without messages."""


@dataclass(frozen=True)
class Prompt:
    """A prompt. ids: the tokens that the model should read. messages: of a chat; None for a text.

    text: what is sent if it is no chat.
    """

    ids: list[int]
    text: str = ""
    messages: Messages | None = None


def chat_ids(model: LocalModel, messages: Messages, **settings: Any) -> list[int]:
    """Return the tokens of a chat under the model's own template.

    settings: arguments of `apply_chat_template` that differ.
    """
    text = model.tokenizer.apply_chat_template(
        list(messages), **{"tokenize": False, "add_generation_prompt": True, **settings}
    )
    return model.encode(text, special=False)


def text_prompts(model: LocalModel, rows: Sequence[Example]) -> list[Prompt]:
    """Return the prompts of the first rows as texts, without a BOS token at the begin.

    A prompt is what is before the first trained token, or the first half of the row.
    """
    prompts = []
    for row in rows[:MAX_PROMPTS]:
        first = next((i for i, label in enumerate(row.labels) if label != IGNORE_INDEX), 0)
        ids = list(row.ids[: first if first > 1 else max(1, len(row.ids) // 2)])
        if ids[0] == model.tokenizer.bos_token_id and len(ids) > 1:
            ids = ids[1:]
        text = str(
            model.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        prompts.append(Prompt(model.encode(text, special=True), text))
    return prompts


def chat_prompts(model: LocalModel, rows: Sequence[Example], data: Data) -> list[Prompt]:
    """Return the prompts of the first rows as chats; none if the model has no chat template.

    A row of messages is sent up to its last trained answer, with its system prompt. Any other row
    is one user message. Rows with tools are left out.

    data: the recipe's section.
    """
    if not model.tokenizer.chat_template:
        return []
    chats = _conversations(model, {row.origin for row in rows}, data)
    prompts = []
    for row in rows:
        messages = _messages(chats[row.origin]) if row.origin in chats else _as_chat(model, row)
        if messages:
            prompts.append(Prompt(chat_ids(model, messages), messages=messages))
    return prompts[:MAX_PROMPTS]


def _messages(chat: Conversation) -> Messages:
    """Return the messages before the last trained answer; none if the row cannot be sent."""
    last = max(number for number, is_trained in enumerate(chat.trained) if is_trained)
    before = chat.messages[:last]
    is_plain = not chat.tools and all(
        "content" in message and "tool_calls" not in message and message["role"] != "tool"
        for message in before
    )
    return [{k: m[k] for k in ("role", "content")} for m in before] if is_plain else []


def _as_chat(model: LocalModel, row: Example) -> Messages:
    (prompt,) = text_prompts(model, [row])
    words = model.decode(model.encode(prompt.text, special=False)).strip()
    return [{"role": "user", "content": words[:_MAX_CHARACTERS]}]


def _conversations(model: LocalModel, origins: set[str], data: Data) -> dict[str, Conversation]:
    """Return the rows with these origins that are chats, by origin."""
    for read in (_held_out, _last_trained):
        try:
            rows = read(data)
            groups = groups_of(rows, data)
        except InputError:
            continue  # `eval_rows` could not use these rows either.
        chosen = [(kind, row) for kind, group in groups for row in group if row.origin in origins]
        if chosen:
            found = {row.origin: _content(model, kind, row, data) for kind, row in chosen}
            return {key: chat for key, chat in found.items() if isinstance(chat, Conversation)}
    return {}


def _content(model: LocalModel, row_format: DataFormat, row: Row, data: Data) -> object:
    rows = [row]
    if data.system:
        rows = add_system(rows, row_format, model.tokenizer, data.system)
    return content_of(rows[0], row_format, has_chat_template=True)


def _held_out(data: Data) -> Rows:
    return read_held_out(data)[:MAX_ROWS] if data.eval is not None else _last_trained(data)


def _last_trained(data: Data) -> Rows:
    return read_data(data).train[-MAX_ROWS:]
