"""Checks of the messages of one chat: their roles and order, empty ones, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from qlora_cli.data.conversation import Conversation, Message

_ROLES = {"system", "developer", "user", "assistant", "tool"}
LEAST_COPIED = 40
"""Characters from which on an answer that its prompt contains is a copy."""
_TURNS = ("<|im_start|>", "[INST]", "<start_of_turn>", "<|start_header_id|>", "<|user|>")
_PLAIN_TURNS = (("### Instruction:", "### Response:"), ("\n\nHuman:", "\n\nAssistant:"))
"""Texts that occur together in a prompt that was rendered without special tokens."""


def chat_faults(chat: Conversation, template: str) -> Iterator[str]:
    """Yield the code of each fault; a code may occur several times.

    template: text of the chat template, which may define roles of its own.
    """
    messages = chat.messages
    roles = [message["role"] for message in messages]
    if any(role not in _ROLES and str(role) not in template for role in roles):
        yield "unknown-role"
    yield from _order_faults(messages, roles)
    yield from _tool_faults(chat)
    for message, trained in zip(messages, chat.trained, strict=True):
        text = message.get("content", "")
        if message["role"] == "user" and not text.strip():
            yield "empty-prompt"
        # A message with calls or thinking has more than these two fields.
        if trained and not text.strip() and message.keys() <= {"role", "content"}:
            yield "empty-answer"
        if trained and text.strip() and text != text.rstrip():
            yield "answer-space"
        if _is_rendered(text):
            yield "rendered-chat"
    yield from _copies(chat)


def _order_faults(messages: list[Message], roles: list[str]) -> Iterator[str]:
    spoken = [role for role in roles if role not in ("system", "developer")]
    if spoken[:1] == ["assistant"]:
        yield "assistant-first"
    for (first, second), message in zip(pairwise(roles), messages, strict=False):
        if first == second and first in ("user", "assistant") and "tool_calls" not in message:
            yield "role-order"
    if roles[-1] != "assistant":
        yield "ends-with-user"
    beginning = len(roles) - len(spoken)
    if {*roles[beginning:]} & {"system", "developer"}:
        yield "system-inside"


def _tool_faults(chat: Conversation) -> Iterator[str]:
    declared = {_name(tool) for tool in chat.tools or ()}
    called = False
    for message in chat.messages:
        calls = message.get("tool_calls", ())
        called = called or bool(calls)
        if message["role"] == "tool" and not called:
            yield "tool-without-call"
        if chat.tools and any(call["function"]["name"] not in declared for call in calls):
            yield "undeclared-function"


def _name(tool: dict[str, Any]) -> Any:
    """Return the name in a definition of a tool, in OpenAI's form or without its envelope."""
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else tool.get("name")


def _copies(chat: Conversation) -> Iterator[str]:
    for (before, message), trained in zip(pairwise(chat.messages), chat.trained[1:], strict=True):
        answer = message.get("content", "").strip()
        if trained and len(answer) >= LEAST_COPIED and answer in before.get("content", ""):
            yield "answer-in-prompt"


def _is_rendered(text: str) -> bool:
    if any(turn in text for turn in _TURNS):
        return True
    return any(all(part in f"\n\n{text}" for part in parts) for parts in _PLAIN_TURNS)
