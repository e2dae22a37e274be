"""A model with its tokenizer and a switch between its adapters, which generates text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteriaList

from qlora_cli.errors import UsageError
from qlora_cli.jobs.answer_text import AnswerText, OnText
from qlora_cli.jobs.prompt_format import PromptSource
from qlora_cli.models.switch import AdapterSwitch
from qlora_cli.runs.open import OpenedModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    max_new_tokens: maximum length of an answer. temperature: 0 for greedy decoding. top_p: sample
    from the most likely tokens whose probabilities add up to it; None for the model's own setting.
    stop: texts at which an answer ends; they are not part of it. seed: for temperatures above 0;
    None for other random numbers each time. beams: answers that beam search keeps; 1 is no beam
    search.

    Raises UsageError if `top_p` is set for greedy decoding or a text of `stop` is empty.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = 0
    beams: int = 1

    def __post_init__(self) -> None:
        if self.top_p is not None and self.temperature == 0:
            raise UsageError(
                "it has no effect at temperature 0",
                where="--top-p",
                hint="set --temperature above 0, for example --temperature 0.7",
            )
        if "" in self.stop:
            raise UsageError("a stop text is empty", where="--stop")

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`."""
        if self.temperature == 0:
            # None replaces the sampling settings in the model's generation_config.json.
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            return greedy | {"num_beams": self.beams}
        top_p = {} if self.top_p is None else {"top_p": self.top_p}
        sampled = {"do_sample": True, "temperature": self.temperature, **top_p}
        return sampled | {"num_beams": self.beams}


@dataclass(frozen=True)
class TextGenerator:
    """Generates text token by token with a key-value cache.

    tokenizer: the base's. sources: adapter -> what decides how prompts for it are formatted, for
    the adapters of which that is known.
    """

    opened: OpenedModel
    switch: AdapterSwitch
    tokenizer: Any
    device: torch.device
    sources: Mapping[str, PromptSource] = field(default_factory=dict)

    def prompt_source(self, name: str) -> PromptSource:
        """Return what decides how prompts for an adapter are formatted.

        For the base, and for an adapter of which it is not known, it is that of the first adapter
        of which it is known, so that answers can be compared; else the base's chat template.
        """
        known = [self.sources[name]] if name in self.sources else [*self.sources.values()]
        return known[0] if known else PromptSource(self.tokenizer)

    @torch.no_grad()
    def continue_from(
        self,
        ids: list[int],
        sampling: Sampling,
        on_text: OnText | None = None,
        end: Sequence[int] = (),
    ) -> str:
        """Return the text that the model generates after `ids`, up to an end token.

        ids: token ids of the prompt. on_text: receives the text in pieces while it is generated.
        end: tokens that end the answer, in addition to the model's and the tokenizer's.
        Generates fewer than `max_new_tokens` tokens if the model's context ends before. Raises
        UsageError if the prompt is empty or fills the context.
        """
        num_tokens = self._max_new_tokens(ids, sampling.max_new_tokens)
        tokens = torch.tensor([ids], device=self.device)
        answer = AnswerText(self.tokenizer, len(ids), sampling.stop, on_text)
        if sampling.temperature > 0 and sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        output = self.opened.loaded.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_tokens,
            pad_token_id=self._pad_token_id(),
            eos_token_id=[*self._end_token_ids(), *end] or None,
            stopping_criteria=StoppingCriteriaList([answer] if answer.is_needed else []),
            **sampling.arguments,
        )
        return answer.finish(output[0])

    def _max_new_tokens(self, ids: list[int], requested: int) -> int:
        """Return how many tokens fit the model's context after `ids`, at most `requested`."""
        if not ids:
            raise UsageError("the prompt is empty", hint="write at least one word")
        loaded = self.opened.loaded
        config = loaded.config
        if max(ids) >= config.vocab_size:
            word = self.tokenizer.decode([max(ids)])
            raise UsageError(
                f"the prompt contains {word!r}, which the model does not have: its token id is "
                f"{max(ids)}, and the vocabulary ends at {config.vocab_size - 1}"
            )
        limit = loaded.num_positions
        if limit is None:
            return requested
        if len(ids) >= limit:
            raise UsageError(f"the prompt has {len(ids)} tokens; the model's context has {limit}")
        return min(requested, limit - len(ids))

    def _end_token_ids(self) -> list[int]:
        """Return the tokens that end an answer: the model's, and the end token of training rows."""
        own = self.opened.loaded.model.generation_config.eos_token_id
        ids = [own] if isinstance(own, int) else list(own or ())
        end = self.tokenizer.eos_token_id
        return ids if end is None or end in ids else [*ids, end]

    def _pad_token_id(self) -> int:
        """Return a token id for padding. One row is never padded, but transformers requires it."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0
