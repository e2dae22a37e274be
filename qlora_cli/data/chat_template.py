"""Find the characters of a rendered chat that are trained: exactly the assistant's turns.

A chat template is a program. It may trim texts, move the system message, leave out thinking, or
write texts of its own. Nothing is assumed about it: the spans are verified on each row by one of
three methods, and a row for which none works is refused.

1. Generation tags. The template marks its turns with `{% generation %}`.
2. Markers. The chat is rendered a second time with a marker in place of each assistant text. The
   text between the markers is the template's own. The first rendering must consist of these pieces
   and the assistant's texts in turn, to the last character. This also works for templates that
   render the end of a chat differently, for which comparing prefixes fails.
3. Prefixes. The chat up to a turn, rendered with the generation prompt, must be a prefix of the
   complete chat, and so must the chat including the turn: the turn is the difference. This covers
   tool calls and thinking, which the template renders in its own format; their parts must occur in
   the turn.

A turn begins after the generation prompt (`add_generation_prompt`), because the model writes from
there on. It ends with the template's end of turn (`<|im_end|>`, `</s>`), which the model must learn
in order to stop. White space after that is not trained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from transformers.utils.chat_template_utils import render_jinja_template

from qlora_cli.data.align import Span, align, common_prefix, exact_spans, marker, split
from qlora_cli.data.conversation import Conversation, Message
from qlora_cli.data.delimiters import TemplateDelimiters, closing_of
from qlora_cli.data.render import TemplateFailed, limited, render_chat
from qlora_cli.data.rendered_checks import check_contains, check_nothing_left_out, rewritten
from qlora_cli.data.row_errors import RowError
from qlora_cli.data.tool_calls import (
    PROBED_FUNCTION,
    ToolsNotWritten,
    check_tools,
    tool_chats,
    uses_tools,
    with_string_arguments,
)

Tools = list[dict[str, Any]] | None

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class RenderedChat:
    """A chat as one text. spans: [start, stop) of the trained characters, in ascending order."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """The chat template of a tokenizer. tokenizer: a fast one with a chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._delimiters: dict[bool, TemplateDelimiters] = {}
        self._skeletons: dict[tuple[str, ...], list[str] | None] = {}
        self._has_tags = bool(_GENERATION_TAG.search(str(tokenizer.chat_template)))
        self._writes_tools: bool | None = None

    def render(self, conversation: Conversation) -> RenderedChat:
        """Return the complete chat and its trained spans.

        Raises RowError if the template fails or no method finds the assistant's turns, and
        ToolsNotWritten if the template does not write tool calls or definitions at all.
        """
        try:
            return self._render_strings_or_objects(conversation)
        except RowError as error:
            if uses_tools(conversation) and not self._writes_tool_calls():
                raise ToolsNotWritten(str(error)) from error
            raise

    def _render_strings_or_objects(self, conversation: Conversation) -> RenderedChat:
        try:
            return self._render(conversation, conversation.messages)
        except RowError as error:
            # transformers passes tool arguments as an object, but some templates expect a string.
            with_strings = [with_string_arguments(m) for m in conversation.messages]
            if with_strings == conversation.messages:
                raise
            try:
                return self._render(conversation, with_strings)
            except RowError:
                raise error from None

    def _writes_tool_calls(self) -> bool:
        """Return whether the template writes a tool call, in one of the forms that are in use."""
        if self._writes_tools is None:
            self._writes_tools = any(self._is_written(chat) for chat in tool_chats())
        return self._writes_tools

    def _is_written(self, chat: list[Message]) -> bool:
        try:
            text = self._text(chat, [{"type": "function", "function": PROBED_FUNCTION}])
        except RowError:
            return False
        return marker(0) in text and marker(1) in text

    def turn_end(self) -> str:
        """Return the text that ends an assistant turn; empty if the template has none."""
        try:
            return self._find_delimiters(None).closing
        except RowError:
            return ""

    def _render(self, conversation: Conversation, messages: list[Message]) -> RenderedChat:
        tools = conversation.tools
        text = self._text(messages, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = None if tools else self._by_skeleton(text, messages, turns)
        if not spans:
            check_nothing_left_out(text, messages)
            check_tools(text, tools)
            spans = self._by_generation_tags(text, messages, tools, turns)
        if not spans:
            spans = self._by_markers_and_prefixes(text, messages, tools, turns)
        trained = (spans[i] for i in turns if conversation.trained[i])
        return RenderedChat(text, tuple(trained))

    def _text(self, messages: list[Message], tools: Tools, prompt: bool = False) -> str:
        """Return the rendered messages; with the generation prompt if `prompt`."""
        try:
            return render_chat(self.tokenizer, messages, tools=tools, add_generation_prompt=prompt)
        except TemplateFailed as error:
            raise RowError(f"the chat template refuses this row: {error}") from error

    def _by_skeleton(
        self, text: str, messages: list[Message], turns: list[int]
    ) -> dict[int, Span] | None:
        """Return the span of each turn by method 2 with a rendering that rows share.

        It has a marker in place of every message, so it serves all chats with these roles. Returns
        None unless the text is exactly this rendering with the messages in their places.
        """
        roles = tuple(message["role"] for message in messages)
        if self._has_tags or any(message.keys() != {"role", "content"} for message in messages):
            return None
        if roles not in self._skeletons:
            self._skeletons[roles] = self._skeleton(roles)
        pieces = self._skeletons[roles]
        found = pieces and exact_spans(text, pieces, [message["content"] for message in messages])
        if not found:
            return None
        return {turn: self._with_delimiters(text, found[turn], None) for turn in turns}

    def _skeleton(self, roles: tuple[str, ...]) -> list[str] | None:
        """Return the template's texts around messages of these roles; None if it reorders them."""
        markers = [marker(i) for i in range(len(roles))]
        chat = [{"role": role, "content": text} for role, text in zip(roles, markers, strict=True)]
        try:
            return split(self._text(chat, None), markers)
        except RowError:
            return None

    def _by_generation_tags(
        self, text: str, messages: list[Message], tools: Tools, turns: list[int]
    ) -> dict[int, Span] | None:
        """Return the span of each turn by method 1; None if the template has no usable tags."""
        source = self.tokenizer.get_chat_template(tools=tools)
        if not _GENERATION_TAG.search(source):
            return None
        rendered: Any = limited(
            lambda: render_jinja_template(
                conversations=[messages],
                tools=cast(Any, tools),
                chat_template=source,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        )
        tagged = rendered[1][0]
        if len(tagged) != len(turns):
            return None
        closing = self._find_delimiters(tools).closing
        spans = {}
        for turn, (start, stop) in zip(turns, tagged, strict=True):
            check_contains(text[start:stop], messages[turn], turn)
            is_closed = bool(closing) and text[start:stop].rstrip().endswith(closing.strip())
            spans[turn] = (start, stop if is_closed else self._turn_stop(text, stop, closing))
        return spans

    def _by_markers_and_prefixes(
        self, text: str, messages: list[Message], tools: Tools, turns: list[int]
    ) -> dict[int, Span]:
        """Return the span of each turn: of as many as possible by method 2, the rest by 3."""
        plain = [turn for turn in turns if set(messages[turn]) <= {"role", "content", "name"}]
        # Templates that treat thinking specially do so in the last turn.
        for chosen in (plain, plain[:-1], []):
            spans = self._by_markers(text, messages, tools, chosen)
            if spans is not None:
                break
        assert spans is not None
        rest = (turn for turn in turns if turn not in spans)
        return spans | {turn: self._by_prefix(text, messages, tools, turn) for turn in rest}

    def _by_markers(
        self, text: str, messages: list[Message], tools: Tools, turns: list[int]
    ) -> dict[int, Span] | None:
        """Return the span of each of `turns` by method 2; None if the texts do not align."""
        if not turns:
            return {}
        markers = {turn: marker(turn) for turn in turns}
        marked = [
            {**message, "content": markers[i]} if i in markers else message
            for i, message in enumerate(messages)
        ]
        try:
            pieces = split(self._text(marked, tools), list(markers.values()))
        except RowError:
            return None
        contents = [messages[turn]["content"] for turn in turns]
        spans = align(text, pieces, contents) if pieces else None
        if spans is None:
            return None
        return {
            turn: self._with_delimiters(text, span, tools)
            for turn, span in zip(turns, spans, strict=True)
        }

    def _with_delimiters(self, text: str, span: Span, tools: Tools) -> Span:
        """Return the span of a turn whose message has this span."""
        delimiters = self._find_delimiters(tools)
        start, stop = span
        return (
            delimiters.turn_start(text, start),
            self._turn_stop(text, stop, delimiters.closing),
        )

    def _by_prefix(self, text: str, messages: list[Message], tools: Tools, turn: int) -> Span:
        """Return the span of one turn by method 3. Raises RowError if it is not found."""
        if turn == 0:
            raise rewritten(turn)
        before = self._text(messages[:turn], tools, prompt=True)
        after = self._text(messages[: turn + 1], tools)
        if not (text.startswith(before) and text.startswith(after)) or len(after) <= len(before):
            raise rewritten(turn)
        stop = len(after.rstrip())
        check_contains(text[len(before) : stop], messages[turn], turn)
        return len(before), stop

    def _turn_stop(self, text: str, stop: int, closing: str) -> int:
        """Return the end of a turn whose message ends at `stop`, with its closing or EOS token."""
        if closing and text.startswith(closing, stop):
            return stop + len(closing)
        eos = self.tokenizer.eos_token
        match = re.compile(r"\s*" + re.escape(eos)).match(text, stop) if eos else None
        return match.end() if match else stop

    def _find_delimiters(self, tools: Tools) -> TemplateDelimiters:
        """Return the template's delimiters; a tokenizer may have another template for tools."""
        delimiters = self._delimiters.get(tools is not None)
        if delimiters is None:
            delimiters = self._delimiters[tools is not None] = self._probe(tools)
        return delimiters

    def _probe(self, tools: Tools) -> TemplateDelimiters:
        """Find the delimiters by rendering chats of one and of two exchanges of markers."""
        roles = ("user", "assistant") * 2
        chat = [{"role": role, "content": marker(i)} for i, role in enumerate(roles)]
        question = self._text(chat[:1], tools)
        with_prompt = self._text(chat[:1], tools, prompt=True)
        prompt = with_prompt[len(common_prefix(question, with_prompt)) :]
        one = split(self._text(chat[:2], tools), [marker(0), marker(1)])
        two = split(self._text(chat, tools), [marker(i) for i in range(4)])
        if one is None or two is None:
            raise RowError("the chat template does not render a plain chat of user and assistant")
        headers = (one[1], two[1], two[3])
        leads = {header.rpartition(prompt)[2] for header in headers if prompt and prompt in header}
        closing = closing_of(one[2], two[2], self.tokenizer.eos_token)
        return TemplateDelimiters(prompt, tuple(sorted(leads, key=len, reverse=True)), closing)
