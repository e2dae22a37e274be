"""`qlora chat`: a conversation with a run or a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.events import Observer
from qlora_cli.jobs.answer_text import OnText
from qlora_cli.jobs.open_generator import NO_ADAPTERS, open_generator
from qlora_cli.jobs.prompt_format import PromptFormat
from qlora_cli.jobs.text_generator import Sampling, TextGenerator
from qlora_cli.models.switch import BASE
from qlora_cli.recipe.schema import DataFormat

CHAT_TOKENS = 512
"""Maximum number of tokens of one answer in a chat, unless the user sets another."""


def open_chat(
    run_or_model: str,
    observer: Observer,
    *,
    sampling: Sampling | None = None,
    system: str | None = None,
    adapters: Mapping[str, Path] = NO_ADAPTERS,
    use: str | None = None,
    merged: bool = False,
) -> Chat:
    """Open a run or a model and return an empty conversation with it.

    sampling: None for greedy decoding of at most CHAT_TOKENS tokens. system: a system prompt;
    None for that of `data.system` in a run's recipe.
    use: name of the adapter to start with; None for the first one. The other arguments are those
    of `open_generator`. Raises ModelError if the tokenizer has no chat template, UsageError if
    `use` is unknown.
    """
    uses = () if use is None else (use,)
    generator = open_generator(run_or_model, observer, adapters, uses=uses, merged=merged)
    name = use or next(iter(generator.switch.adapters), BASE)
    _check_template(generator, name)
    _note_other_format(generator.prompt_source(name).trained_format, observer)
    generator.switch.use(name)
    return Chat(generator, sampling or Sampling(CHAT_TOKENS), system)


def _check_template(generator: TextGenerator, name: str) -> None:
    """Raise ModelError if there is no chat template for an adapter."""
    if not generator.prompt_source(name).tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template",
            where=str(generator.opened.folder),
            hint="use `qlora generate`, or a model whose tokenizer has one",
        )


def _note_other_format(trained: DataFormat | None, observer: Observer) -> None:
    """Report a model whose training rows, of the format `trained`, were no chats."""
    if trained in ("completion", "text", "tokens"):
        observer.note(
            f"the model was trained on {trained} rows and not on chats; `qlora generate` sends "
            "prompts as in training"
        )


@dataclass
class Chat:
    """A conversation. Each answer is generated from all messages so far.

    system: the system prompt, empty for none; None for that of `data.system` in the recipe of the
    run whose adapter answers. messages: of the user and the assistant in turn, without the system
    prompt.
    """

    generator: TextGenerator
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def reply(self, text: str, on_text: OnText | None = None) -> str:
        """Add a message of the user and return the answer, which is added as well.

        on_text: receives the answer in pieces while it is generated. If it is interrupted
        (KeyboardInterrupt), the pieces so far are kept as the answer and the exception is raised
        again; without any piece the message is not added. Raises UsageError if the chat does not
        fit the model's context; the message is then not added.
        """
        pieces: list[str] = []

        def collect(piece: str) -> None:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

        asked = [*self.messages, {"role": "user", "content": text}]
        answer: str | None = None
        try:
            ids = self._format.chat_ids(asked)
            answer = self.generator.continue_from(
                ids, self.sampling, collect, self._format.end_ids()
            )
        except KeyboardInterrupt:
            answer = "".join(pieces) or None
            raise
        finally:
            if answer is not None:
                self.messages = [*asked, {"role": "assistant", "content": answer.strip()}]
        return answer.strip()

    def reset(self) -> None:
        """Remove all messages; the system prompt stays."""
        self.messages = []

    def set_system(self, text: str | None) -> None:
        """Set the system prompt, None for none, and remove all messages."""
        self.system = text or ""
        self.reset()

    def use_adapter(self, name: str) -> None:
        """Answer with another adapter from now on, and remove all messages.

        The messages are removed because the model would imitate the other adapter's answers. name:
        an adapter, or `base` for none. Raises UsageError if it is unknown, QloraError if it cannot
        be merged into the weights, ModelError if there is no chat template for it.
        """
        previous = self.current_adapter
        self.generator.switch.check(name)
        _check_template(self.generator, name)
        self.generator.switch.use(name)
        if self.current_adapter != previous:
            self.reset()

    @property
    def current_adapter(self) -> str:
        """Name of the adapter that answers, or `base`."""
        return self.generator.switch.current

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `use_adapter` accepts."""
        return (BASE, *self.generator.switch.adapters)

    @property
    def _format(self) -> PromptFormat:
        source = self.generator.prompt_source(self.current_adapter)
        system = self.system
        if system is None and source.run is not None:
            system = source.run.recipe.data.system
        return PromptFormat("chat", source.tokenizer, "", system)
