"""What a row of each format must hold, and every kind of chat as one list of messages."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

from qlora_cli.recipe.schema import DataFormat

REQUIRED: dict[DataFormat, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "tokens": ("input_ids",),
}
PRECEDENCE: tuple[DataFormat, ...] = (
    "messages",
    "sharegpt",
    "tokens",
    "completion",
    "alpaca",
    "text",  # last: published Alpaca rows carry their rendered prompt as `text`, too
)
_NAMES_ELSEWHERE = {
    "question": "prompt",
    "input": "prompt",
    "query": "prompt",
    "answer": "completion",
    "response": "completion",
    "content": "text",
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
_CALLS = ("function_call", "tool_call")
_WEIGHTS = ("weight", "loss_weight")


class RowFault(Exception):
    """What is wrong with one row; who reads the rows makes one DataError of all of them."""

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True)
class Conversation:
    """A chat in the form that chat templates take.

    messages: role and content, a text (absent where a turn only calls tools), and whatever else
    the template may read. tools: what the model may call. trained: for each message, whether its
    text is learnt; only assistants' turns are.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    trained: list[bool]


def check_fields(fields: dict[str, Any], format: DataFormat) -> None:
    """Raises RowFault where the row's fields or their types are not those of the format."""
    for key in REQUIRED[format]:
        if fields.get(key) is None:
            raise RowFault(_lacks(key, fields), _rename(key, fields))
    if format in ("messages", "sharegpt"):
        conversation(fields, format)
    elif format == "tokens":
        _check_ids(fields)
    else:
        optional = ("input", "system") if format == "alpaca" else ()
        for key in (*REQUIRED[format], *optional):
            if not isinstance(fields.get(key, ""), str | None):
                raise RowFault(f"{key!r} must be a text")
        if format == "text" and not fields["text"]:
            raise RowFault("'text' is empty")
        if format == "alpaca" and fields.get("history"):
            raise RowFault("'history' is not supported", "write the chat as messages rows")


def conversation(fields: dict[str, Any], format: DataFormat) -> Conversation:
    """An alpaca, sharegpt or messages row as a conversation. Raises RowFault."""
    if format == "alpaca":
        messages = _from_alpaca(fields)
    elif format == "sharegpt":
        messages = [_from_sharegpt(turn) for turn in _turns(fields, "conversations")]
        if fields.get("system"):
            messages.insert(0, {"role": "system", "content": _text(fields["system"])})
    else:
        messages = [_from_openai(turn) for turn in _turns(fields, "messages")]
    trained = [_is_trained(message) for message in messages]
    if not any(trained):
        raise RowFault("no assistant's message to train on")
    plain = [{k: v for k, v in message.items() if k not in _WEIGHTS} for message in messages]
    return Conversation(plain, _tools(fields), trained)


def _lacks(key: str, fields: dict[str, Any]) -> str:
    if key in fields:
        return f"the field {key!r} is null"
    return f"no field {key!r}; the row has {', '.join(map(repr, fields)) or 'none'}"


def _rename(key: str, fields: dict[str, Any]) -> str | None:
    near = difflib.get_close_matches(key, fields, n=1) or [
        name for name in fields if _NAMES_ELSEWHERE.get(name) == key
    ]
    return f"rename {near[0]!r} to {key!r}" if near and key not in fields else None


def _check_ids(fields: dict[str, Any]) -> None:
    ids, labels = fields["input_ids"], fields.get("labels")
    for name, values in (("input_ids", ids), ("labels", labels)):
        if values is not None and not (
            isinstance(values, list) and all(type(value) is int for value in values)
        ):
            raise RowFault(f"{name!r} must be a list of whole numbers")
    if labels is not None and len(labels) != len(ids):
        raise RowFault(f"{len(labels)} labels for {len(ids)} input_ids")
    if 0 in (fields.get("attention_mask") or ()):
        raise RowFault("'attention_mask' hides tokens", "leave padding out of the rows")


def _from_alpaca(fields: dict[str, Any]) -> list[dict[str, Any]]:
    asked = "\n\n".join(filter(None, (fields["instruction"], fields.get("input"))))
    system = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
    answer = {"role": "assistant", "content": fields["output"]}
    return [*system, {"role": "user", "content": asked}, answer]


def _turns(fields: dict[str, Any], key: str) -> list[dict[str, Any]]:
    turns = fields[key]
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"{key!r} must be a list of messages, and not empty")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowFault(f"message {number} is no object with fields")
        wanted = ("from", "value") if key == "conversations" else ("role",)
        for name in wanted:
            if turn.get(name) is None:
                raise RowFault(f"message {number}: {_lacks(name, turn)}", _rename(name, turn))
    return turns


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    role = _SHAREGPT_ROLES.get(str(turn["from"]).lower())
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        raise RowFault(f"unknown speaker {turn['from']!r}", f"there are {known}")
    weights = {key: turn[key] for key in _WEIGHTS if key in turn}
    if turn["from"] in _CALLS:
        calls = _parsed(turn["value"], "a function call")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": role, "tool_calls": [_call(call) for call in calls], **weights}
    return {"role": role, "content": _text(turn["value"]), **weights}


def _from_openai(turn: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in turn.items() if value is not None}
    if message.pop("function_call", None) is not None:
        message["tool_calls"] = [_call(turn["function_call"])]
    elif "tool_calls" in message:
        if not isinstance(message["tool_calls"], list):
            raise RowFault("'tool_calls' must be a list")
        message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
        if not message["tool_calls"]:
            del message["tool_calls"]
    if not isinstance(message["role"], str):
        raise RowFault("'role' must be a text")
    if message["role"] == "function":
        message["role"] = "tool"
    if "content" in message:
        message["content"] = _text(message["content"])
    elif "tool_calls" not in message:
        raise RowFault(f"a message of {message['role']!r} has no content")
    return message


def _call(call: Any) -> dict[str, Any]:
    """A tool call with arguments as an object, which is what transformers' templates expect."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFault("a tool call needs a function's name and arguments")
    arguments = _parsed(function.get("arguments") or {}, "a tool call's arguments")
    if not isinstance(arguments, dict):
        raise RowFault("a tool call's arguments must be an object")
    named = {"name": function["name"], "arguments": arguments}
    kept = {key: value for key, value in call.items() if key == "id" and value is not None}
    return {"type": "function", **kept, "function": named}


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowFault(f"{what}: broken JSON: {error}") from error


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowFault("'content' must be a text or a list of text parts")
    parts = []
    for part in content:
        text = part.get("text", part.get("value")) if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise RowFault(f"a content part of type {kind!r}", "only text can be trained on")
        parts.append(text)
    return "".join(parts)


def _is_trained(message: dict[str, Any]) -> bool:
    weights = [message[key] for key in _WEIGHTS if key in message]
    if any(weight not in (0, 1) for weight in weights):
        raise RowFault(f"a weight of {weights[0]!r}", "a message's weight is 0 or 1")
    spoken = message["role"] == "assistant"
    if not spoken and any(weights):
        raise RowFault(f"a message of {message['role']!r} has weight 1", "only assistants learn")
    return spoken and all(weights)


def _tools(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    legacy = [{"type": "function", "function": tool} for tool in fields.get("functions") or ()]
    tools = _parsed(fields.get("tools") or legacy, "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault("'tools' must be a list of objects")
    return tools or None
