"""`qlora generate` and `qlora chat`: generate text with a run or a model and its adapters."""

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
"""Maximum number of tokens of one answer in a chat."""
NO_ADAPTERS: Mapping[str, Path] = MappingProxyType({})


def run(
    run_or_model: str,
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
    """Continue a prompt with each of several adapters.

    run_or_model: a run's folder, a model folder, a Hub id or `starter`.
    prompt: used as it is, without a chat template.
    temperature: 0 for greedy decoding. seed: the same for each adapter.
    adapters: name -> folder of an adapter or a run, trained on the base of `run_or_model`.
    uses: names of the adapters to generate with, in this order; empty for all.
    merged: merge each adapter into the weights before it generates.

    Raises InputError if the model, an adapter, a name or the tokenizer does not exist, or if the
    prompt is empty or too long.
    """
    generator = open_generator(run_or_model, observer, adapters, merged=merged)
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
    run_or_model: str,
    observer: Observer,
    *,
    adapters: Mapping[str, Path] = NO_ADAPTERS,
    use: str | None = None,
    merged: bool = False,
) -> Chat:
    """Open a run or a model and return an empty conversation with it.

    use: name of the adapter to start with; None for the first one. The other arguments are those of
    `run`. Raises ModelError if the tokenizer has no chat template, UsageError if `use` is unknown.
    """
    generator = open_generator(run_or_model, observer, adapters, merged=merged)
    if not generator.tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template",
            where=run_or_model,
            hint="use `qlora generate`, or a model whose tokenizer has one",
        )
    generator.switch.use(use or next(iter(generator.switch.adapters), BASE))
    return Chat(generator)


@dataclass(frozen=True)
class TextGenerator:
    """A model with its tokenizer and a switch between its adapters, to generate text."""

    opened: OpenedModel
    switch: AdapterSwitch
    tokenizer: Any
    device: torch.device

    @torch.no_grad()
    def continue_from(self, ids: list[int], max_new_tokens: int, temperature: float) -> str:
        """Return the text that the model generates after `ids`, up to an end token.

        ids: token ids of the prompt. temperature: 0 for greedy decoding. Generates fewer than
        `max_new_tokens` tokens if the model's context ends before. Raises UsageError if the prompt
        is empty or fills the context.
        """
        num_tokens = self._max_new_tokens(ids, max_new_tokens)
        model = self.opened.loaded.model
        tokens = torch.tensor([ids], device=self.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        # None replaces the sampling settings in the model's generation_config.json.
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_tokens,
            pad_token_id=self._pad_token_id(),
            **(sampling or greedy),
        )
        text: str = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        return text

    def _max_new_tokens(self, ids: list[int], requested: int) -> int:
        """Return how many tokens fit the model's context after `ids`, at most `requested`."""
        if not ids:
            raise UsageError("the prompt is empty", hint="write at least one word")
        limit: int | None = getattr(self.opened.loaded.config, "max_position_embeddings", None)
        if limit is None:
            return requested
        if len(ids) >= limit:
            raise UsageError(f"the prompt has {len(ids)} tokens; the model's context has {limit}")
        return min(requested, limit - len(ids))

    def _pad_token_id(self) -> int:
        """Return a token id for padding. One row is never padded, but transformers requires it."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0


def open_generator(
    run_or_model: str,
    observer: Observer,
    adapters: Mapping[str, Path] = NO_ADAPTERS,
    *,
    merged: bool = False,
) -> TextGenerator:
    """Open a run or a model with its tokenizer, and load adapters for it.

    The arguments are those of `run`. A run's own adapter is active until the switch selects
    another one. Raises ModelError if there is no tokenizer, UsageError if `merged` is set and there
    is no adapter.
    """
    runs = {name: Run.find(folder) for name, folder in adapters.items()}
    files = {
        name: run.adapter_file if run is not None else open_adapter(adapters[name].expanduser())
        for name, run in runs.items()
    }
    device = torch.device(inspect_device().kind)
    open_model = open_for_adapters if adapters or merged else open_any
    opened = open_model(run_or_model, device, observer)
    tokenizer = load_tokenizer(str(opened.folder))
    if tokenizer is None:
        raise ModelError(
            "the model has no tokenizer, so it cannot generate text", where=str(opened.folder)
        )
    source = open_source(opened.weights, opened.loaded.family)
    switch = AdapterSwitch(opened.loaded, source, merged=merged)
    for name, adapter in files.items():
        switch.add(name, adapter)
        _note_other_base(name, runs[name], opened.folder, observer)
    if merged and not switch.adapters:
        raise UsageError("there is no adapter to merge", where="--merged")
    return TextGenerator(opened, switch, tokenizer, device)


def _note_other_base(name: str, run: Run | None, base: Path, observer: Observer) -> None:
    """Report an adapter of a run that was trained on another base than `base`."""
    trained_on = run.require("base_folder") if run is not None else None
    if trained_on is not None and Path(trained_on) != base.resolve():
        observer.note(f"adapter {name} was trained on {trained_on} and is used here on {base}")


@dataclass
class Chat:
    """A conversation. Each answer is generated from all messages so far."""

    generator: TextGenerator
    messages: list[dict[str, str]] = field(default_factory=list)

    def reply(self, text: str) -> str:
        """Add a message of the user and return the answer, which is added as well."""
        self.messages.append({"role": "user", "content": text})
        ids = self.generator.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=False
        )
        answer = self.generator.continue_from(ids, CHAT_TOKENS, temperature=0.0).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def use_adapter(self, name: str) -> None:
        """Answer with another adapter from now on; the messages stay.

        name: an adapter, or `base` for none. Raises UsageError if it is unknown, QloraError if
        it cannot be merged into the weights.
        """
        self.generator.switch.use(name)

    @property
    def current_adapter(self) -> str:
        """Name of the adapter that answers, or `base`."""
        return self.generator.switch.current
