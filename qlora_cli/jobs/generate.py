"""`qlora generate` and `qlora chat`: ask a run or a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_cli.checkpoint.open import Opened, open_any
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import Observer
from qlora_cli.jobs.results import GenerateResult
from qlora_cli.memory.device import inspect_device

CHAT_TOKENS = 512
"""The most tokens of one answer in a chat."""


def run(
    where: str,
    *,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    observer: Observer,
) -> GenerateResult:
    """Goes on from a prompt, as it stands. temperature 0 takes the likeliest token each time.

    Raises InputError where there is no such model, no tokenizer, or the prompt is too long.
    """
    speaker = open_speaker(where, observer)
    torch.manual_seed(seed)
    ids = speaker.tokenizer(prompt)["input_ids"]
    return GenerateResult(prompt, speaker.continue_from(ids, max_new_tokens, temperature))


def open_chat(where: str, observer: Observer) -> Chat:
    """A conversation that begins. Raises ModelError where the tokenizer has no chat template."""
    speaker = open_speaker(where, observer)
    if not speaker.tokenizer.chat_template:
        raise ModelError(
            "its tokenizer has no chat template",
            where=where,
            hint="use `qlora generate`, or train on rows of a model that has one",
        )
    return Chat(speaker)


@dataclass(frozen=True)
class Speaker:
    """A model and its tokenizer, ready to answer."""

    opened: Opened
    tokenizer: Any
    device: torch.device

    @torch.no_grad()
    def continue_from(self, ids: list[int], max_new_tokens: int, temperature: float) -> str:
        """The text behind `ids`, up to an end token. Raises UsageError where no room is left."""
        room = self._room(ids, max_new_tokens)
        model = self.opened.built.model
        tokens = torch.tensor([ids], device=self.device)
        draws = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        # The model's own sampling settings would otherwise speak into a greedy answer.
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            pad_token_id=self._padding(),
            **(draws or greedy),
        )
        text: str = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        return text

    def _room(self, ids: list[int], wanted: int) -> int:
        if not ids:
            raise UsageError("the prompt is empty", hint="give it at least one word")
        limit: int | None = getattr(self.opened.built.config, "max_position_embeddings", None)
        if limit is None:
            return wanted
        if len(ids) >= limit:
            raise UsageError(f"the prompt has {len(ids)} tokens; the model takes {limit}")
        return min(wanted, limit - len(ids))

    def _padding(self) -> int:
        """One row is never padded, but transformers asks which token would do it."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0


def open_speaker(where: str, observer: Observer) -> Speaker:
    """Opens a run's folder or a model. Raises ModelError where it has no tokenizer."""
    device = torch.device(inspect_device().kind)
    opened = open_any(where, device, observer)
    tokenizer = load_tokenizer(str(opened.folder))
    if tokenizer is None:
        raise ModelError("it has no tokenizer, so it cannot read text", where=str(opened.folder))
    return Speaker(opened, tokenizer, device)


@dataclass
class Chat:
    """A conversation: what was said so far goes into each answer."""

    speaker: Speaker
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> str:
        """The answer to `text`."""
        self.messages.append({"role": "user", "content": text})
        ids = self.speaker.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=False
        )
        answer = self.speaker.continue_from(ids, CHAT_TOKENS, temperature=0.0).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer
