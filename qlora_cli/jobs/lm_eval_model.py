"""A run or a model behind lm-eval's model interface. Imported only if lm-eval is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qlora_cli.data.load import ModelLimits
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.jobs.continuations import Continuation, ContinuationScore, score_continuations
from qlora_cli.jobs.prompt_format import PromptFormat
from qlora_cli.jobs.text_generator import Sampling, TextGenerator

_UNKNOWN_LENGTH = 2048
"""Context of a model whose config states none, as in lm-eval."""
_ANSWER_TOKENS = 256
"""Maximum length of an answer of a task that states none, as in lm-eval."""
_ONLY_FOR_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
"""Settings without effect on greedy decoding."""


@dataclass(frozen=True)
class AnswerSettings:
    """How a task's answers are generated. until: texts or special tokens that end an answer."""

    sampling: Sampling
    until: tuple[str, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any], task: str) -> AnswerSettings:
        """Return the settings of `generation_kwargs` in a task's YAML.

        Raises UsageError if there is a setting that this package does not have.
        """
        chosen = dict(normalize_gen_kwargs(dict(settings), _ANSWER_TOKENS))
        until = tuple(text for text in chosen.pop("until") if text)
        max_tokens = chosen.pop("max_gen_toks")
        temperature = float(chosen.pop("temperature", 0.0))
        if not chosen.pop("do_sample"):
            temperature = 0.0
        top_p = None if temperature == 0 else chosen.pop("top_p", None)
        if temperature == 0:
            for name in _ONLY_FOR_SAMPLING:
                chosen.pop(name, None)
        if chosen:
            raise UsageError(
                f"the task {task} generates answers with {', '.join(sorted(chosen))}, which "
                "qlora does not have",
                where="--tasks",
                hint="omit the task, or evaluate the merged model with lm-eval's own command",
            )
        # seed=None: lm-eval sets one seed for the complete evaluation.
        return cls(Sampling(max_tokens, temperature, top_p, seed=None), until)


class GeneratorLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's model interface for a TextGenerator.

    The tokens are those that lm-eval's `hf` model computes, so that figures can be compared.
    prompt: formats the prompts of `apply_chat_template`. observer: receives the progress.
    """

    def __init__(self, generator: TextGenerator, prompt: PromptFormat, observer: Observer) -> None:
        super().__init__()
        self.tokenizer = prompt.tokenizer
        self._generator = generator
        self._prompt = prompt
        self._observer = observer
        limits = ModelLimits.of(generator.opened.loaded.config)
        self.max_length = limits.positions or _UNKNOWN_LENGTH

    @property
    def eot_token_id(self) -> int:
        """Return the end token. Raises UsageError if the tokenizer has none."""
        token: int | None = self.tokenizer.eos_token_id
        if token is None:
            raise UsageError("the tokenizer has no end token, which lm-eval needs")
        return token

    @property
    def prefix_token_id(self) -> int:
        """Return the token before a text without a context."""
        token: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        """Return the name under which lm-eval stores prompts with a chat template."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template, empty if it is not requested."""
        return str(self.tokenizer.chat_template) if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as text. add_generation_prompt: False to continue its last message."""
        return self._prompt.chat_text(chat_history, continues=not add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return token ids. add_special_tokens: None to add them unless the text has a BOS."""
        if add_special_tokens is None:
            has_bos = has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
            special = {"add_special_tokens": False} if has_bos else {}
        else:
            special = {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **special)
        return ids

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return (log-probability, is greedy) of each request. lm-eval shows no bar of its own."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-probability, is greedy). requests: (texts, context ids, continuation ids)."""
        for texts, _context, ids in requests:
            if not ids:
                raise UsageError(
                    f"the continuation {texts[1]!r} has no token of its own after its context",
                    where="--tasks",
                )
        scores = self._score([Continuation(context, ids) for _, context, ids in requests])
        return [(score.log_probability, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-probability of each text, computed in windows of the model's context."""
        owners: list[int] = []
        windows: list[Continuation] = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append(Continuation(*make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._score(windows), strict=True):
            totals[owner] += score.log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the answer to each request, without the text that ends it."""
        self._observer.stage("generate", len(requests))
        answers = []
        for number, request in enumerate(requests, 1):
            context, settings = request.args
            answers.append(
                self._answer(context, AnswerSettings.of(settings, request.task_name or ""))
            )
            self._observer.advance(number)
        return answers

    def _answer(self, context: str, settings: AnswerSettings) -> str:
        room = self.max_length - settings.sampling.max_new_tokens
        if room <= 0:
            raise UsageError(
                f"answers of up to {settings.sampling.max_new_tokens} tokens do not fit the "
                f"model's context of {self.max_length}",
                where="--tasks",
                hint="set max_gen_toks in generation_kwargs of the task's YAML",
            )
        # A special token is not part of the decoded text, so it cannot end the answer as a text.
        special = [text for text in settings.until if text in self.tokenizer.all_special_tokens]
        stop = tuple(text for text in settings.until if text not in special)
        return self._generator.continue_from(
            self.tok_encode(context)[-room:],
            replace(settings.sampling, stop=stop),
            end=self.tokenizer.convert_tokens_to_ids(special),
        )

    def _score(self, continuations: Sequence[Continuation]) -> list[ContinuationScore]:
        self._observer.stage("score", len(continuations))
        generator = self._generator
        return score_continuations(
            generator.opened.loaded,
            generator.device,
            continuations,
            self.max_length,
            self._observer.advance,
        )
