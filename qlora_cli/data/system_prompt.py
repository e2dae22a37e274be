"""Apply `data.system`: one system prompt for all rows that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_cli.data.align import marker
from qlora_cli.data.conversation import PAIR, ROLES
from qlora_cli.data.formats import FORMATS
from qlora_cli.data.render import TemplateFailed, render_chat
from qlora_cli.data.row_store import Row
from qlora_cli.errors import InputError
from qlora_cli.recipe.schema import DataFormat

Fields = dict[str, Any]


def add_system(rows: list[Row], format: DataFormat, tokenizer: Any, system: str) -> list[Row]:
    """Return the rows with a system prompt. A row that has one keeps it.

    If the chat template does not write system prompts, the first user message begins with it.
    Raises InputError if rows of this format are not written by a chat template.
    """
    is_text = format == "preference" and any(isinstance(r.fields.get(PAIR[0]), str) for r in rows)
    if is_text or not FORMATS[format].uses_chat_template(tokenizer):
        raise InputError(
            f"{format} rows without a chat template have no system prompt",
            where="data.system",
            hint="remove data.system, or write messages rows; data.template gives a base a chat "
            "template",
        )
    change = _WITH_SYSTEM[format] if writes_system(tokenizer) else _FOLDED[format]
    return [Row(row.origin, change(row.fields, system)) for row in rows]


def writes_system(tokenizer: Any) -> bool:
    """Return whether the tokenizer's chat template writes the text of a system message."""
    roles = ("system", "user", "assistant")
    chat = [{"role": role, "content": marker(index)} for index, role in enumerate(roles)]
    try:
        return marker(0) in render_chat(tokenizer, chat)
    except TemplateFailed:
        return False


def _messages(fields: Fields, system: str) -> Fields:
    return _with_turn(fields, "messages", "role", "content", system)


def _sharegpt(fields: Fields, system: str) -> Fields:
    if fields.get("system"):
        return fields
    return _with_turn(fields, "conversations", "from", "value", system)


def _alpaca(fields: Fields, system: str) -> Fields:
    return fields if fields.get("system") else {**fields, "system": system}


def _preference(change: Callable[[Fields, str], Fields]) -> Callable[[Fields, str], Fields]:
    """Return the change of a preference row by that of a `messages` row.

    The chat begins with the prompt's messages if there are any, else with those of both answers.
    """

    def change_pair(fields: Fields, system: str) -> Fields:
        if (
            isinstance(fields.get("prompt"), str)
            and _role(fields.get(PAIR[0]), 0, "role") != "user"
        ):
            fields = {**fields, "prompt": [{"role": "user", "content": fields["prompt"]}]}
        keys = ("prompt",) if isinstance(fields.get("prompt"), list) else PAIR
        changed = {key: change({"messages": fields.get(key)}, system)["messages"] for key in keys}
        return {**fields, **changed}

    return change_pair


def _with_turn(fields: Fields, key: str, role: str, text: str, system: str) -> Fields:
    turns = fields.get(key)
    if _role(turns, 0, role) in (None, "system"):
        return fields  # Malformed rows are reported when they are parsed.
    assert isinstance(turns, list)
    return {**fields, key: [{role: "system", text: system}, *turns]}


def _folded(key: str, role: str, text: str) -> Callable[[Fields, str], Fields]:
    def change(fields: Fields, system: str) -> Fields:
        turns = fields.get(key)
        if _role(turns, 0, role) != "user" or fields.get("system"):
            return fields
        assert isinstance(turns, list)
        first = {**turns[0], text: f"{system}\n\n{turns[0].get(text)}"}
        return {**fields, key: [first, *turns[1:]]}

    return change


def _folded_alpaca(fields: Fields, system: str) -> Fields:
    if fields.get("system") or not isinstance(fields.get("instruction"), str):
        return fields
    return {**fields, "instruction": f"{system}\n\n{fields['instruction']}"}


def _role(turns: Any, index: int, key: str) -> str | None:
    """Return the role of a turn, None if the turns are malformed."""
    if not isinstance(turns, list) or len(turns) <= index or not isinstance(turns[index], dict):
        return None
    return ROLES.get(str(turns[index].get(key)).lower())


_WITH_SYSTEM: dict[str, Callable[[Fields, str], Fields]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "preference": _preference(_messages),
}
_FOLDED: dict[str, Callable[[Fields, str], Fields]] = {
    "messages": _folded("messages", "role", "content"),
    "sharegpt": _folded("conversations", "from", "value"),
    "alpaca": _folded_alpaca,
    "preference": _preference(_folded("messages", "role", "content")),
}
