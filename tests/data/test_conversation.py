"""Chats of every format become one list of messages."""

import json

from qlora_cli.data.conversation import from_messages, from_sharegpt


def test_tool_calls_of_every_format_are_equal():
    arguments = {"city": "Rome"}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    openai = {"function_call": {"name": "weather", "arguments": json.dumps(arguments)}}
    question = {"role": "user", "content": "?"}
    legacy = from_messages({"messages": [question, {"role": "assistant", **openai}]})
    assert legacy.messages[1] == {"role": "assistant", "tool_calls": [call]}
    value = json.dumps({"name": "weather", "arguments": arguments})
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": value}]
    sharegpt = from_sharegpt({"conversations": turns, "tools": "[]"})
    assert sharegpt.messages[1] == {"role": "assistant", "tool_calls": [call]}
    assert sharegpt.tools is None


def test_content_parts_and_weights():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    chat = [
        {"role": "user", "content": parts, "loss_weight": 0.0},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "assistant", "content": "yes", "weight": 1},
    ]
    conversation = from_messages({"messages": chat})
    assert [message["content"] for message in conversation.messages] == ["ab", "no", "yes"]
    assert conversation.trained == [False, False, True]
