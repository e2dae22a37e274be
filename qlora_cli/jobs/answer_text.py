"""The text of an answer while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

OnText = Callable[[str], None]
"""Receives the next piece of an answer while it is generated."""
_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the first bytes of an incomplete character to."""


class AnswerText(StoppingCriteria):
    """Passes the text of an answer on and finds the stop texts in it."""

    def __init__(
        self, tokenizer: Any, prompt_length: int, stop: Sequence[str], on_text: OnText | None
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._stop = stop
        self._on_text = on_text
        self._shown = 0

    @property
    def is_needed(self) -> bool:
        """Whether the text is needed after each token."""
        return bool(self._stop) or self._on_text is not None

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Pass new text on; return whether a stop text ends the answer. input_ids: (1, tokens)."""
        text, stopped = self._text(input_ids[0])
        if not stopped:
            self._show(text[: len(text) - self._unsafe_length(text)])
        return torch.full((1,), stopped, device=input_ids.device)

    def finish(self, ids: Tensor) -> str:
        """Return the complete text, and pass on its rest. ids: (tokens,), with the prompt."""
        text, _ = self._text(ids)
        self._show(text)
        return text

    def _text(self, ids: Tensor) -> tuple[str, bool]:
        """Return the text up to the first stop text, and whether there is one."""
        new_ids = ids[self._prompt_length :]
        text: str = self._tokenizer.decode(new_ids, skip_special_tokens=True)
        ends = [text.find(stop) for stop in self._stop if stop in text]
        return (text[: min(ends)], True) if ends else (text, False)

    def _show(self, text: str) -> None:
        if self._on_text is not None and len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)

    def _unsafe_length(self, text: str) -> int:
        """Return the number of last characters that later tokens may change or remove."""
        lengths = [len(text) - len(text.rstrip(_INCOMPLETE))]
        for stop in self._stop:
            lengths += [n for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max(lengths)
