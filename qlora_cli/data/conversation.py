"""Chats of every format as one list of messages, which is what chat templates take.

To accept another role name, add it to `ROLES`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.data.row_errors import RowError, check_strings, missing_field

Message = dict[str, Any]
Fields = dict[str, Any]

ROLES = {
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
"""Name in the `from` field of a sharegpt row -> role in a chat template."""
PAIR = ("chosen", "rejected")
"""The fields of a preference row with its two answers."""
_CALLS = ("function_call", "tool_call")
_WEIGHTS = ("weight", "loss_weight")


@dataclass(frozen=True)
class Conversation:
    """A chat in the form that chat templates take.

    messages: one dict per message with `role` and `content` (a string; absent if the message only
    calls tools), and any other field that the template may read.
    tools: definitions of the tools that the model may call; None if there are none.
    trained: for each message, whether its text is trained. Only messages of the assistant are.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    trained: list[bool]


def from_alpaca(fields: Fields) -> Conversation:
    """Return an alpaca row as a conversation of one user and one assistant message."""
    question = "\n\n".join(filter(None, (fields["instruction"], fields.get("input"))))
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": fields["output"]},
    ]
    return _conversation(messages, fields)


def from_sharegpt(fields: Fields) -> Conversation:
    """Return a sharegpt row (`conversations` of `from` and `value`) as a conversation.

    Raises RowError if the row is malformed or has no assistant message to train on.
    """
    turns = _turns(fields, "conversations", ("from", "value"))
    return _conversation([_sharegpt_message(turn) for turn in turns], fields)


def from_messages(fields: Fields) -> Conversation:
    """Return a messages row (`messages` of `role` and `content`) as a conversation.

    Raises RowError if the row is malformed or has no assistant message to train on.
    """
    turns = _turns(fields, "messages", ("role",))
    messages = [_openai_message(turn) for turn in turns]
    return _conversation(messages, {**fields, "system": None})


def from_pair(fields: Fields) -> tuple[Conversation, Conversation]:
    """Return the two chats of a preference row (`chosen` and `rejected`, lists of messages).

    The messages that both begin with are the prompt and are not trained; the last message never
    belongs to them. `prompt` is a list of messages before both, or the text of a user message,
    which the lists may contain, too. Raises RowError if the row is malformed or an answer has no
    assistant message.
    """
    lists = [_turns(fields, key, ("role",)) for key in PAIR]
    prompt = _prompt_messages(fields, lists)
    chats = [from_messages({**fields, "messages": [*prompt, *turns]}) for turns in lists]
    chosen, rejected = (chat.messages for chat in chats)
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    answers = []
    for name, chat in zip(PAIR, chats, strict=True):
        trained = [index >= shared and is_used for index, is_used in enumerate(chat.trained)]
        if not any(trained):
            raise RowError(f"{name!r} has no assistant message after the prompt")
        answers.append(replace(chat, trained=trained))
    return answers[0], answers[1]


def _prompt_messages(fields: Fields, lists: list[list[Message]]) -> list[Message]:
    """Return the messages of `prompt` that the lists of `chosen` and `rejected` do not contain."""
    prompt = fields.get("prompt")
    if prompt is None:
        return []
    if not isinstance(prompt, str):
        return _turns(fields, "prompt", ("role",))
    if all(turns[0]["role"] == "assistant" for turns in lists):
        return [{"role": "user", "content": prompt}]
    if not all(any(turn.get("content") == prompt for turn in turns) for turns in lists):
        raise RowError(
            "'prompt' is not a message of 'chosen' and 'rejected', which have their own prompt",
            "remove the field 'prompt', or the prompt's messages from both lists",
        )
    return []


def _conversation(messages: list[Message], fields: Fields) -> Conversation:
    """Add the row's system message and tools, and split the weights from the messages."""
    if fields.get("system"):
        messages = [{"role": "system", "content": _text(fields["system"])}, *messages]
    trained = [_is_trained(message) for message in messages]
    if not any(trained):
        raise RowError("no assistant message to train on")
    plain = [{k: v for k, v in message.items() if k not in _WEIGHTS} for message in messages]
    return Conversation(plain, _tools(fields), trained)


def _turns(fields: Fields, key: str, required: tuple[str, ...]) -> list[Message]:
    turns = fields[key]
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # JSON text in a CSV file
        turns = parsed_json(turns, repr(key))
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{key!r} must be a non-empty list of messages")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError(f"message {number} is not an object with fields")
        for name in required:
            if turn.get(name) is None:
                error = missing_field(name, turn)
                raise RowError(f"message {number}: {error}", error.hint)
    return turns


def _sharegpt_message(turn: Message) -> Message:
    role = ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise RowError(f"unknown role {turn['from']!r}", f"known roles: {', '.join(ROLES)}")
    weights = {key: turn[key] for key in _WEIGHTS if key in turn}
    if turn["from"] in _CALLS:
        calls = parsed_json(turn["value"], "a function call")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": role, "tool_calls": [_tool_call(call) for call in calls], **weights}
    return {"role": role, "content": _text(turn["value"]), **weights}


def _openai_message(turn: Message) -> Message:
    message = {key: value for key, value in turn.items() if value is not None}
    if message.pop("function_call", None) is not None:
        message["tool_calls"] = [_tool_call(turn["function_call"])]
    elif "tool_calls" in message:
        if not isinstance(message["tool_calls"], list):
            raise RowError("'tool_calls' must be a list")
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        if not message["tool_calls"]:
            del message["tool_calls"]
    check_strings(message, "role")
    if message["role"] == "function":
        message["role"] = "tool"
    if "content" in message:
        message["content"] = _text(message["content"])
    elif "tool_calls" not in message:
        raise RowError(f"a message of role {message['role']!r} has no content")
    return message


def _tool_call(call: Any) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as transformers' templates expect."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("a tool call needs a function's name and arguments")
    arguments = parsed_json(function.get("arguments") or {}, "a tool call's arguments")
    if not isinstance(arguments, dict):
        raise RowError("a tool call's arguments must be an object")
    named = {"name": function["name"], "arguments": arguments}
    call_id = {key: value for key, value in call.items() if key == "id" and value is not None}
    return {"type": "function", **call_id, "function": named}


def parsed_json(value: Any, what: str) -> Any:
    """Return the value, decoded from JSON if it is a string; None for an empty string."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"{what}: broken JSON: {error}", _python_hint(value)) from error
    except (ValueError, RecursionError) as error:  # Too many digits.
        raise RowError(f"{what}: JSON that cannot be decoded") from error


def _python_hint(text: str) -> str | None:
    """Return a hint if the text looks like Python's repr of a list, as pandas writes it."""
    is_repr = text.lstrip()[:2] in ("['", "[{", "{'") and "'" in text
    return "write it with json.dumps, not with str()" if is_repr else None


def _text(content: Any) -> str:
    """Return a message's content as one string; a list of text parts is joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("'content' must be a string or a list of text parts")
    parts = []
    for part in content:
        text = part.get("text", part.get("value")) if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise RowError(f"a content part of type {kind!r}", "only text can be trained on")
        parts.append(text)
    return "".join(parts)


def _is_trained(message: Message) -> bool:
    weights = [message[key] for key in _WEIGHTS if key in message]
    if any(weight not in (0, 1) for weight in weights):
        raise RowError(f"a weight of {weights[0]!r}", "a message's weight is 0 or 1")
    is_assistant = message["role"] == "assistant"
    if not is_assistant and any(weights):
        raise RowError(
            f"a message of role {message['role']!r} has weight 1",
            "only messages of the assistant are trained",
        )
    return is_assistant and all(weights)


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    """Return the row's tool definitions, from `tools` or OpenAI's older `functions`."""
    legacy = [{"type": "function", "function": tool} for tool in fields.get("functions") or ()]
    tools = parsed_json(fields.get("tools") or legacy, "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("'tools' must be a list of objects")
    return tools or None
