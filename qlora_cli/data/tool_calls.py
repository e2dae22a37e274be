"""Check that a chat template writes tool calls, in one of the forms that are in use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from qlora_cli.data.align import marker
from qlora_cli.data.conversation import Conversation, Message
from qlora_cli.data.row_errors import RowError

PROBED_FUNCTION = {
    "name": marker(0),
    "description": "",
    "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
}
"""A function that a template is probed with; its name and argument are markers."""


class ToolsNotWritten(RowError):
    """The row contains tool calls or definitions, which the chat template does not write."""


def uses_tools(conversation: Conversation) -> bool:
    """Return whether a conversation defines or calls tools, or contains the result of a tool."""
    return conversation.tools is not None or any(
        "tool_calls" in message or message["role"] == "tool" for message in conversation.messages
    )


def tool_chats() -> Iterator[list[Message]]:
    """Yield chats with a call of a tool and its result, with the arguments as object and text."""
    for arguments in ({"x": marker(1)}, json.dumps({"x": marker(1)}, ensure_ascii=False)):
        call = {"name": marker(0), "arguments": arguments}
        # Mistral's templates accept only ids of nine letters and digits.
        calls = [{"type": "function", "id": "abcdefghi", "function": call}]
        yield [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "name": marker(0), "tool_call_id": "abcdefghi", "content": "result"},
            {"role": "assistant", "content": "answer"},
        ]


def check_tools(text: str, tools: list[dict[str, Any]] | None) -> None:
    """Raise ToolsNotWritten if the text lacks the name of a tool that is defined."""
    for tool in tools or ():
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in text:
            raise ToolsNotWritten(f"the chat template leaves out the tool {name!r}")


def with_string_arguments(message: Message) -> Message:
    """Return the message with the arguments of its tool calls as JSON strings."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}
