"""What a row of any format is converted to, before it is encoded."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_cli.data.conversation import Conversation


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt, which the model reads, and a completion, on which it is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class TokenIds:
    """Ready token ids and their labels, of the same length and not shifted."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt, of which the first is preferred. Each contains the prompt."""

    chosen: Conversation | PromptCompletion
    rejected: Conversation | PromptCompletion


@dataclass(frozen=True)
class LabelledText:
    """A text or a pair of texts, and its label: a name, or a number. second: None without a pair.

    label: None if the label is not known.
    """

    text: str
    second: str | None
    label: str | int | float | None


Content = Conversation | PromptCompletion | TokenIds | AnswerPair | LabelledText
"""What a row is converted to."""
