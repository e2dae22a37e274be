"""`qlora generate` and `qlora chat`: ask a run or a model, with one adapter of several on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from qlora_cli.adapters.peft_file import open_adapter
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import Observer
from qlora_cli.jobs.results import GenerateResult
from qlora_cli.memory.device import inspect_device
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.switch import BASE, AdapterSwitch
from qlora_cli.runs.open import OpenedModel, open_any, open_for_adapters
from qlora_cli.runs.run import Run

CHAT_TOKENS = 512
"""The most tokens of one answer in a chat."""
NO_ADAPTERS: Mapping[str, Path] = MappingProxyType({})


def run(
    where: str,
    *,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    observer: Observer,
    adapters: Mapping[str, Path] = NO_ADAPTERS,
    uses: Sequence[str] = (),
    merged: bool = False,
) -> GenerateResult:
    """Goes on from a prompt, as it stands. temperature 0 takes the likeliest token each time.

    adapters: name -> folder or run, on the base of `where`. uses: names that answer, each in turn
    and with the same draws; none means every adapter. merged: they answer from within the weights.
    Raises InputError where there is no such model, adapter or name, no tokenizer, or the prompt is
    too long.
    """
    generator = open_generator(where, observer, adapters, merged=merged)
    for name in uses:
        generator.switch.check(name)
    ids = generator.tokenizer(prompt)["input_ids"]
    answers = {}
    for name in uses or generator.switch.adapters or (BASE,):
        generator.switch.use(name)
        torch.manual_seed(seed)
        answers[name] = generator.continue_from(ids, max_new_tokens, temperature)
    return GenerateResult(prompt, next(iter(answers.values())), answers)


def open_chat(
    where: str,
    observer: Observer,
    *,
    adapters: Mapping[str, Path] = NO_ADAPTERS,
    use: str | None = None,
    merged: bool = False,
) -> Chat:
    """A conversation that begins; `use` answers, or the first adapter.

    Raises ModelError where the tokenizer has no chat template, UsageError for an unknown name.
    """
    generator = open_generator(where, observer, adapters, merged=merged)
    if not generator.tokenizer.chat_template:
        raise ModelError(
            "its tokenizer has no chat template",
            where=where,
            hint="use `qlora generate`, or train on rows of a model that has one",
        )
    generator.switch.use(use or next(iter(generator.switch.adapters), BASE))
    return Chat(generator)


@dataclass(frozen=True)
class TextGenerator:
    """A model, the adapters it may answer with, and its tokenizer."""

    opened: OpenedModel
    switch: AdapterSwitch
    tokenizer: Any
    device: torch.device

    @torch.no_grad()
    def continue_from(self, ids: list[int], max_new_tokens: int, temperature: float) -> str:
        """The text behind `ids`, up to an end token. Raises UsageError where no room is left."""
        room = self._room(ids, max_new_tokens)
        model = self.opened.loaded.model
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
        limit: int | None = getattr(self.opened.loaded.config, "max_position_embeddings", None)
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


def open_generator(
    where: str,
    observer: Observer,
    adapters: Mapping[str, Path] = NO_ADAPTERS,
    *,
    merged: bool = False,
) -> TextGenerator:
    """Opens a run's folder or a model, and adapters on it. Raises ModelError without a tokenizer.

    A run answers with its own adapter until the switch is used.
    """
    runs = {name: Run.find(folder) for name, folder in adapters.items()}
    found = {
        name: run.adapter_file if run is not None else open_adapter(adapters[name].expanduser())
        for name, run in runs.items()
    }
    device = torch.device(inspect_device().kind)
    open_it = open_for_adapters if adapters or merged else open_any
    opened = open_it(where, device, observer)
    tokenizer = load_tokenizer(str(opened.folder))
    if tokenizer is None:
        raise ModelError("it has no tokenizer, so it cannot read text", where=str(opened.folder))
    source = open_source(opened.weights, opened.loaded.family)
    switch = AdapterSwitch(opened.loaded, source, merged=merged)
    for name, adapter in found.items():
        switch.add(name, adapter)
        _note_its_base(name, runs[name], opened.folder, observer)
    if merged and not switch.adapters:
        raise UsageError("there is no adapter to merge", where="--merged")
    return TextGenerator(opened, switch, tokenizer, device)


def _note_its_base(name: str, run: Run | None, base: Path, observer: Observer) -> None:
    """Says so where a run's adapter was trained on another base than the one it answers on."""
    own = run.require("base_folder") if run is not None else None
    if own is not None and Path(own) != base.resolve():
        observer.note(f"adapter {name} was trained on {own} and answers here on {base}")


@dataclass
class Chat:
    """A conversation: what was said so far goes into each answer."""

    generator: TextGenerator
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> str:
        """The answer to `text`."""
        self.messages.append({"role": "user", "content": text})
        ids = self.generator.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=False
        )
        answer = self.generator.continue_from(ids, CHAT_TOKENS, temperature=0.0).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def use(self, name: str) -> None:
        """Another adapter answers from here on; what was said stays said. Raises QloraError."""
        self.generator.switch.use(name)

    @property
    def answering(self) -> str:
        """The adapter's name, or `base`."""
        return self.generator.switch.current
