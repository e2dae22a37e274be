"""Render chats with a tokenizer's chat template, within limits of time and size.

A chat template is a program from a stranger. transformers renders it in Jinja's sandbox, which
limits what it can access, and not how long it runs.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from jinja2 import TemplateError

from qlora_cli.errors import ModelError

_T = TypeVar("_T")
MAX_SECONDS = 10.0
"""Time for one chat. Rendering a chat takes less than a millisecond."""
MAX_CHARACTERS = 50_000_000
"""Length of one rendered chat."""
_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""The exceptions of Jinja, and those of the operations in a template."""


class TemplateFailed(ValueError):
    """A chat template that raises an error on a chat."""


class _TooSlow(Exception):
    pass


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """Return the messages as the tokenizer's chat template writes them.

    options: further arguments of `apply_chat_template`. Raises TemplateFailed if the template fails
    on this chat, ModelError if it takes too long or writes too much.
    """
    text = limited(lambda: tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    if len(text := str(text)) > MAX_CHARACTERS:
        raise ModelError(
            f"the chat template writes {len(text):,} characters for one chat",
            hint="name another template with data.template",
        )
    return text


def limited(render: Callable[[], _T]) -> _T:
    """Return the result of `render`, which runs a template. Errors as of `render_chat`."""
    try:
        with _time_limit():
            return render()
    except _TooSlow as error:
        raise ModelError(
            f"the chat template takes more than {MAX_SECONDS:g} s for one chat",
            hint="name another template with data.template",
        ) from error
    except RecursionError as error:
        raise TemplateFailed("the template is nested too deeply") from error
    except _ERRORS as error:
        raise TemplateFailed(str(error)) from error


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise _TooSlow after `MAX_SECONDS`. Only the main thread of a process can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(_: int, __: FrameType | None) -> None:
        raise _TooSlow

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, expire)
    left, interval = signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        # Another timer of this process, if there is one, continues.
        left = max(left - (time.monotonic() - began), 0.001) if left else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)
