"""Check that a rendered chat contains what its messages contain."""

from __future__ import annotations

import json

from qlora_cli.data.conversation import Message
from qlora_cli.data.row_errors import RowError

_THINKING = ("reasoning_content", "reasoning", "thinking")


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def check_nothing_left_out(text: str, messages: list[Message]) -> None:
    """Raise RowError unless the text contains every user and system message."""
    rendered = _without_spaces(text)
    for number, message in enumerate(messages, 1):
        # Tool results are often rendered as JSON; assistant messages are checked by their spans.
        if message["role"] in ("tool", "assistant"):
            continue
        if _without_spaces(message.get("content", "")) not in rendered:
            raise RowError(
                f"the chat template leaves out or rewrites message {number} ({message['role']})",
                "move its text into the first user message",
            )


def check_contains(span: str, message: Message, turn: int) -> None:
    """Raise RowError unless the span contains the message's text, thinking and tool calls."""
    texts = [message.get(key) for key in ("content", *_THINKING)]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    expected = [text for text in texts if isinstance(text, str)] + [call["name"] for call in calls]
    rendered = _without_spaces(span)
    if any(_without_spaces(text) not in rendered for text in expected):
        raise rewritten(turn)
    for call in calls:
        as_python = repr(call["arguments"])
        if as_python in span and as_python != json.dumps(call["arguments"], ensure_ascii=False):
            raise RowError(
                f"the chat template does not write the arguments of message {turn + 1} as JSON"
            )


def rewritten(turn: int) -> RowError:
    """Return the error of a row whose message number `turn` cannot be found."""
    return RowError(
        f"the chat template rewrites or leaves out message {turn + 1} (assistant)",
        "end the row with that message, or remove what the template drops (thinking, tool calls)",
    )
