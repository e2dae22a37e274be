"""The texts that a chat template writes around an assistant message."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qlora_cli.data.align import common_prefix

_SPECIAL_TOKEN = re.compile(r"\s*(<[^<>\s]+>|\[/?\w+\])")


@dataclass(frozen=True)
class TemplateDelimiters:
    """The texts that a template writes around an assistant message.

    prompt: the text that `add_generation_prompt` appends. leads: texts that may follow between the
    prompt and the message, longest first. closing: the end of a turn; empty if there is none.
    """

    prompt: str
    leads: tuple[str, ...]
    closing: str

    def turn_start(self, text: str, start: int) -> int:
        """Return where a turn begins whose message begins at `start` of the rendered text."""
        for lead in self.leads:
            if text.endswith(self.prompt + lead, 0, start):
                return start - len(lead)
        return start


def closing_of(at_end: str, before_user: str, eos: str | None) -> str:
    """Return the text that ends a turn.

    at_end: text after the last assistant message of a chat. before_user: text between an assistant
    message and the next user message. A template that writes more at the end of a chat (an EOS
    token, the next prompt) has the closing and possibly the start of a header in common with
    `before_user`; then the EOS token decides, else the first `<...>` or `[...]`.
    """
    common = common_prefix(at_end, before_user)
    if common == at_end:
        return at_end.rstrip()
    if eos and eos in common:
        return common[: common.index(eos) + len(eos)]
    match = _SPECIAL_TOKEN.match(common)
    return match[0] if match else ""
