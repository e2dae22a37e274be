"""Format a prompt as the rows that a model was trained on: as a chat, with a prompt text, or plain.

`generate`, `chat` and `eval` format prompts here only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_cli.data.chat_template import ChatTemplate
from qlora_cli.data.conversation import PAIR
from qlora_cli.data.formats import ALPACA, FORMATS, detect_format
from qlora_cli.data.mixture import sources_of
from qlora_cli.data.render import TemplateFailed, render_chat
from qlora_cli.data.row_store import Row
from qlora_cli.data.rows import read_rows
from qlora_cli.data.system_prompt import add_system, writes_system
from qlora_cli.errors import InputError, UsageError
from qlora_cli.recipe.schema import DataFormat
from qlora_cli.runs.run import Run

Name = Literal["chat", "alpaca", "plain"]
Messages = Sequence[dict[str, Any]]
_ROWS = 20
"""Number of training rows that are read to detect their format."""
_RAW = "--raw sends it as it is"


@dataclass(frozen=True)
class PromptSource:
    """What decides how prompts are formatted.

    tokenizer: the base's, with the chat template of the training. run: the run that was trained;
    None for a plain model, a merged one, or an adapter without its run. merged_format: format of
    the rows that a merged model was trained on. owner: whose chat template it is.
    """

    tokenizer: Any
    run: Run | None = None
    merged_format: DataFormat | None = None
    owner: Literal["model", "adapter"] = "model"

    @property
    def trained_format(self) -> DataFormat | None:
        """The format of the training rows; None if there was no training or it is not known."""
        return self.merged_format if self.run is None else trained_format(self.run)


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt becomes the token ids that the model reads.

    name: `chat` for the tokenizer's chat template, `alpaca` for Stanford Alpaca's prompt, `plain`
    for the text as it is. tokenizer: the base's. reason: one sentence for the user. system: the
    system prompt of a chat, or None.
    """

    name: Name
    tokenizer: Any
    reason: str
    system: str | None = None

    def ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt. Raises UsageError if the chat template fails."""
        if self.name == "chat":
            return self.chat_ids([{"role": "user", "content": prompt}])
        text = ALPACA.format(instruction=prompt) if self.name == "alpaca" else prompt
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def chat_ids(self, messages: Messages) -> list[int]:
        """Return the token ids of a chat, to which the model has to answer.

        Errors are those of `chat_text`.
        """
        text = self.chat_text(messages)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def chat_text(self, messages: Messages, *, continues: bool = False) -> str:
        """Return a chat as text, to which the model has to answer.

        The system prompt is added as in training: if the chat template does not write system
        prompts, the first user message begins with it. continues: the model has to continue the
        last message instead. Raises UsageError if the format is not `chat` or the chat template
        fails.
        """
        if self.name != "chat":
            raise UsageError(
                f"messages need the chat template, and the prompt format is {self.name}",
                hint="write the prompt as one text",
            )
        if self.system:
            row = Row("prompt", {"messages": list(messages)})
            added = add_system([row], "messages", self.tokenizer, self.system)
            messages = added[0].fields["messages"]
        return _chat_text(self.tokenizer, messages, continues)

    def end_ids(self) -> list[int]:
        """Return the token that ends an answer of a chat, if the template writes one token."""
        if self.name != "chat":
            return []
        closing = ChatTemplate(self.tokenizer).turn_end().strip()
        ids: list[int] = self.tokenizer(closing, add_special_tokens=False)["input_ids"]
        return ids if len(ids) == 1 else []


def _chat_text(tokenizer: Any, messages: Messages, continues: bool) -> str:
    """Return a chat with the start of the assistant's answer, or with an open last message."""
    try:
        return render_chat(
            tokenizer,
            messages,
            add_generation_prompt=not continues,
            continue_final_message=continues,
        )
    except TemplateFailed as error:
        raise UsageError(f"the chat template refuses the chat: {error}") from error


def prompt_format(
    source: PromptSource, *, raw: bool = False, system: str | None = None
) -> PromptFormat:
    """Return the format in which a model expects prompts.

    source: without a run, the chat template is used if there is one. raw: send prompts as they are.
    system: a system prompt; None for that of `data.system` in a run's recipe.
    Raises UsageError if there is a system prompt and the format is not `chat`.
    """
    tokenizer, run = source.tokenizer, source.run
    name, reason = _choose(source)
    if raw:
        name, reason = "plain", "the prompt is sent as it is (--raw)"
    if system is not None and name != "chat":
        raise UsageError(
            "a system prompt needs the chat template, which the prompt is not formatted with",
            where="--system",
            hint=f"omit it; {reason}",
        )
    if system is None and run is not None and name == "chat":
        system = run.recipe.data.system
    if system and not writes_system(tokenizer):
        reason += "; it writes no system prompts, so the first user message begins with it"
    return PromptFormat(name, tokenizer, reason, system)


def _choose(source: PromptSource) -> tuple[Name, str]:
    """Return the format and the reason for it."""
    run, has_template = source.run, bool(source.tokenizer.chat_template)
    trained = source.trained_format
    if run is None and trained not in FORMATS:
        if has_template:
            owner = source.owner
            return "chat", f"the prompt is formatted with the {owner}'s chat template; {_RAW}"
        return "plain", "the prompt is sent as it is: the tokenizer has no chat template"
    if trained is None:
        name: Name = "chat" if has_template else "plain"
        return name, f"the training rows cannot be read, so the prompt is formatted as {name}"
    if FORMATS[trained].uses_chat_template(source.tokenizer):
        return "chat", f"the prompt is formatted with the chat template, as in training; {_RAW}"
    if trained == "alpaca":
        return "alpaca", f"the prompt is formatted as an Alpaca instruction, as in training; {_RAW}"
    return "plain", f"the prompt is sent as it is, as the {trained} rows in training were"


def trained_format(run: Run) -> DataFormat | None:
    """Return the format of a run's training rows; None if they cannot be read any more.

    For pairs it is the format of rows that are written as one of their answers.
    """
    data = run.recipe.data
    if data.format != "auto" and data.format != "preference":
        return data.format
    try:
        rows = read_rows(sources_of(data.train)[0].path, _ROWS, columns=data.columns)
        if data.format == "preference":
            return "completion" if isinstance(rows[0].fields.get(PAIR[0]), str) else "messages"
        return detect_format(rows, "auto")
    except InputError:
        return None
