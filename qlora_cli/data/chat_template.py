"""Which characters of a chat the model has to learn: the assistants' turns, exactly.

A chat template is a program, and it may do anything: trim, move the system text, leave thinking
out, write its own last words. So nothing is assumed of it; each mask is proved on the row itself,
by one of three ways, and a row where none holds is refused.

1. The template marks its turns with `{% generation %}`.
2. The chat is written twice, the second time with a mark in place of each assistant's text. What
   stands between the marks is the template's own; the first writing must then be those pieces and
   the texts, in turn, to the last character. This holds for templates that write differently at a
   chat's end, where comparing prefixes fails.
3. The chat up to a turn, with the prompt for an answer, is a prefix of the whole, and so is the
   chat with the turn: the turn is what lies between. This covers tool calls and thinking, which
   the template writes in its own words; they must be found in it again.

A turn begins where the prompt for an answer (`add_generation_prompt`) ends, because from there
on the model writes, and ends with the template's end of a turn (`<|im_end|>`, `</s>`), which the
model must learn in order to stop; white space behind that is not learnt.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_cli.data.align import Span, align, common_start, mark, split
from qlora_cli.data.conversation import Conversation
from qlora_cli.data.row_errors import RowError

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKER = re.compile(r"\s*(<[^<>\s]+>|\[/?\w+\])")
# Foreign code: a template fails by its own word or by what it does to absent or other values.
_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_THINKING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class RenderedChat:
    """A chat as its template wrote it. spans: [start, stop) of what is trained, in characters."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class TemplateDelimiters:
    """What a template writes around an assistant's text.

    prompt: what add_generation_prompt appends. leads: what may stand between the prompt and the
    text, longest first. closing: the end of a turn; empty where there is none.
    """

    prompt: str
    leads: tuple[str, ...]
    closing: str


class ChatTemplate:
    """A tokenizer's own chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._habits: dict[bool, TemplateDelimiters] = {}

    def render(self, conversation: Conversation) -> RenderedChat:
        """The whole chat and its trained spans. Raises RowError where no mask can be proved."""
        try:
            return self._render(conversation, conversation.messages)
        except RowError as fault:
            # transformers' convention is arguments as an object; some templates join texts.
            as_text = [_with_text_arguments(message) for message in conversation.messages]
            if as_text == conversation.messages:
                raise
            try:
                return self._render(conversation, as_text)
            except RowError:
                raise fault from None

    def _render(self, conversation: Conversation, messages: list[Message]) -> RenderedChat:
        tools = conversation.tools
        text = self._text(messages, tools)
        _check_nothing_left_out(text, messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = self._marked(text, messages, tools, turns) or self._proved(
            text, messages, tools, turns
        )
        trained = (spans[i] for i in turns if conversation.trained[i])
        return RenderedChat(text, tuple(trained))

    def _text(self, messages: list[Message], tools: Tools, prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt
                )
            )
        except _TEMPLATE_FAULTS as error:
            raise RowError(f"the chat template refuses it: {error}") from error

    def _marked(
        self, text: str, messages: list[Message], tools: Tools, turns: list[int]
    ) -> dict[int, Span] | None:
        """Way 1; None where the template marks nothing, or not each turn once."""
        source = self.tokenizer.get_chat_template(tools=tools)
        if not _GENERATION.search(source):
            return None
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=cast(Any, tools),
            chat_template=source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        marked = rendered[1][0]
        if len(marked) != len(turns):
            return None
        closing = self._learn_habits(tools).closing
        spans = {}
        for turn, (start, stop) in zip(turns, marked, strict=True):
            _check_contains(text[start:stop], messages[turn], turn)
            closed = bool(closing) and text[start:stop].rstrip().endswith(closing.strip())
            spans[turn] = (start, stop if closed else self._close(text, stop, closing))
        return spans

    def _proved(
        self, text: str, messages: list[Message], tools: Tools, turns: list[int]
    ) -> dict[int, Span]:
        """Ways 2 and 3: as many turns as possible by marks, the others by prefixes."""
        plain = [turn for turn in turns if set(messages[turn]) <= {"role", "content", "name"}]
        # Templates that treat thinking apart do so in the last turn.
        for by_marks in (plain, plain[:-1], []):
            found = self._by_marks(text, messages, tools, by_marks)
            if found is not None:
                break
        assert found is not None
        rest = (turn for turn in turns if turn not in found)
        return found | {turn: self._by_prefix(text, messages, tools, turn) for turn in rest}

    def _by_marks(
        self, text: str, messages: list[Message], tools: Tools, turns: list[int]
    ) -> dict[int, Span] | None:
        if not turns:
            return {}
        marks = {turn: mark(turn) for turn in turns}
        marked = [
            {**message, "content": marks[i]} if i in marks else message
            for i, message in enumerate(messages)
        ]
        try:
            pieces = split(self._text(marked, tools), list(marks.values()))
        except RowError:
            return None
        contents = [messages[turn]["content"] for turn in turns]
        found = align(text, pieces, contents) if pieces else None
        if found is None:
            return None
        habits = self._learn_habits(tools)
        return {
            turn: (_begin(text, start, habits), self._close(text, stop, habits.closing))
            for turn, (start, stop) in zip(turns, found, strict=True)
        }

    def _by_prefix(self, text: str, messages: list[Message], tools: Tools, turn: int) -> Span:
        if turn == 0:
            raise _rewritten(turn)
        before = self._text(messages[:turn], tools, prompt=True)
        after = self._text(messages[: turn + 1], tools)
        if not (text.startswith(before) and text.startswith(after)) or len(after) <= len(before):
            raise _rewritten(turn)
        stop = len(after.rstrip())
        _check_contains(text[len(before) : stop], messages[turn], turn)
        return len(before), stop

    def _close(self, text: str, stop: int, closing: str) -> int:
        if closing and text.startswith(closing, stop):
            return stop + len(closing)
        eos = self.tokenizer.eos_token
        behind = re.compile(r"\s*" + re.escape(eos)).match(text, stop) if eos else None
        return behind.end() if behind else stop

    def _learn_habits(self, tools: Tools) -> TemplateDelimiters:
        """Found on two small chats; tools may choose another template."""
        known = self._habits.get(tools is not None)
        if known is None:
            known = self._habits[tools is not None] = self._probe(tools)
        return known

    def _probe(self, tools: Tools) -> TemplateDelimiters:
        chat = [
            {"role": role, "content": mark(i)} for i, role in enumerate(("user", "assistant") * 2)
        ]
        asked, prompted = self._text(chat[:1], tools), self._text(chat[:1], tools, prompt=True)
        prompt = prompted[len(common_start(asked, prompted)) :]
        once = split(self._text(chat[:2], tools), [mark(0), mark(1)])
        twice = split(self._text(chat, tools), [mark(i) for i in range(4)])
        if once is None or twice is None:
            raise RowError("the chat template does not write a plain chat of user and assistant")
        headers = (once[1], twice[1], twice[3])
        leads = {header.rpartition(prompt)[2] for header in headers if prompt and prompt in header}
        closing = _closing(once[2], twice[2], self.tokenizer.eos_token)
        return TemplateDelimiters(prompt, tuple(sorted(leads, key=len, reverse=True)), closing)


def _begin(text: str, start: int, habits: TemplateDelimiters) -> int:
    for lead in habits.leads:
        if text.endswith(habits.prompt + lead, 0, start):
            return start - len(lead)
    return start


def _closing(at_end: str, before_user: str, eos: str | None) -> str:
    """What ends a turn, from what stands behind it at a chat's end and before the next user.

    A template that writes more at the end of a chat (an eos, the next prompt) shares with the
    other case the closing and perhaps the beginning of a header; then the eos decides, or else
    the first `<...>` or `[...]`.
    """
    common = common_start(at_end, before_user)
    if common == at_end:
        return at_end.rstrip()
    if eos and eos in common:
        return common[: common.index(eos) + len(eos)]
    marker = _MARKER.match(common)
    return marker[0] if marker else ""


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _check_nothing_left_out(text: str, messages: list[Message]) -> None:
    written = _squeezed(text)
    for number, message in enumerate(messages, 1):
        if message["role"] in ("tool", "assistant"):  # tools' answers are often written as JSON
            continue
        if _squeezed(message.get("content", "")) not in written:
            raise RowError(
                f"the chat template leaves out or rewrites message {number} ({message['role']})",
                "put its text into the first user's message",
            )


def _check_contains(span: str, message: Message, turn: int) -> None:
    """Raises RowError unless everything that the assistant said or called stands in its turn."""
    said = [message.get(key) for key in ("content", *_THINKING)]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    wanted = [text for text in said if isinstance(text, str)] + [call["name"] for call in calls]
    written = _squeezed(span)
    if any(_squeezed(text) not in written for text in wanted):
        raise _rewritten(turn)
    for call in calls:
        as_python = repr(call["arguments"])
        if as_python in span and as_python != json.dumps(call["arguments"], ensure_ascii=False):
            raise RowError(f"the chat template writes message {turn + 1}'s arguments not as JSON")


def _rewritten(turn: int) -> RowError:
    return RowError(
        f"the chat template rewrites or leaves out what the assistant said in message {turn + 1}",
        "end the row with that turn, or leave out what the template drops (thinking, tool calls)",
    )


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}
