"""A chat template is a program from a stranger: it fails within limits, with one clear error."""

from __future__ import annotations

import signal
import time

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_cli.data import render
from qlora_cli.data.chat_template import ChatTemplate
from qlora_cli.data.conversation import from_messages
from qlora_cli.data.render import TemplateFailed, render_chat
from qlora_cli.data.row_errors import RowError
from qlora_cli.errors import ModelError
from tests.helpers.runs import make_tokenizer

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_chat_is_rendered() -> None:
    tokenizer = tokenizer_with("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert render_chat(tokenizer, CHAT) == "<a><b>"


FAILING = {
    "a division by zero": "{{ 1 // 0 }}",
    "a power": "{{ 10.0 ** 1000 }}",
    "a range": "{{ range(10 ** 9) | list }}",
    "an absent value": "{{ messages[0].x.y }}",
    "its own error": "{{ raise_exception('no') }}",
    "a recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "parentheses": "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
}


@pytest.mark.parametrize("how", FAILING)
def test_a_template_that_fails_refuses_the_row(how: str) -> None:
    tokenizer = tokenizer_with(FAILING[how])
    with pytest.raises(TemplateFailed):
        render_chat(tokenizer, CHAT)
    with pytest.raises(RowError, match="the chat template refuses this row"):
        ChatTemplate(tokenizer).render(from_messages({"messages": CHAT}))


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "MAX_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ModelError, match=r"takes more than 0\.2 s for one chat"):
        render_chat(tokenizer_with(LOOP), CHAT)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_timer_of_another_library_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    expired = []
    handler = signal.signal(signal.SIGALRM, lambda *_: expired.append(True))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        render_chat(tokenizer_with("x"), CHAT)
        deadline = time.monotonic() + 30
        while not expired and time.monotonic() < deadline:
            time.sleep(0.01)
        assert expired
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_a_template_that_writes_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "MAX_CHARACTERS", 1000)
    with pytest.raises(ModelError, match="writes 1,001 characters for one chat"):
        render_chat(tokenizer_with("{{ 'x' * 1001 }}"), CHAT)
