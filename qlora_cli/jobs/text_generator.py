"""A model with its tokenizer and adapters that generates text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from qlora_cli.adapters.peft_file import AdapterFile, open_adapter
from qlora_cli.data.template import with_template
from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import Observer
from qlora_cli.memory.device import inspect_device
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.switch import BASE, OWN, AdapterSwitch, check_adapter_name
from qlora_cli.runs.open import OpenedModel, open_any, open_for_adapters
from qlora_cli.runs.run import Run

NO_ADAPTERS: Mapping[str, Path] = MappingProxyType({})
OnText = Callable[[str], None]
"""Receives the next piece of an answer while it is generated."""
_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the first bytes of an incomplete character to."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    max_new_tokens: maximum length of an answer. temperature: 0 for greedy decoding. top_p: sample
    from the most likely tokens whose probabilities add up to it; None for the model's own setting.
    stop: texts at which an answer ends; they are not part of it. seed: for temperatures above 0;
    None for other random numbers each time.

    Raises UsageError if `top_p` is set for greedy decoding or a text of `stop` is empty.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = 0

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
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        top_p = {} if self.top_p is None else {"top_p": self.top_p}
        return {"do_sample": True, "temperature": self.temperature, **top_p}


@dataclass(frozen=True)
class TextGenerator:
    """A model with its tokenizer and a switch between its adapters, to generate text."""

    opened: OpenedModel
    switch: AdapterSwitch
    tokenizer: Any
    device: torch.device
    trained: Run | None = None
    """The run whose training decides how prompts are formatted: the opened one, or else the first
    run among the adapters; None if there is none."""

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
        answer = _Answer(self.tokenizer, len(ids), sampling.stop, on_text)
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
        limit: int | None = getattr(self.opened.loaded.config, "max_position_embeddings", None)
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


class _Answer(StoppingCriteria):
    """The text of an answer while it is generated: passes it on and finds the stop texts in it."""

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


def open_generator(
    run_or_model: str,
    observer: Observer,
    adapters: Mapping[str, Path] = NO_ADAPTERS,
    *,
    uses: Sequence[str] = (),
    merged: bool = False,
) -> TextGenerator:
    """Open a run or a model with its tokenizer, and load adapters for it.

    run_or_model: a run's folder, one of its checkpoints, a model folder, a Hub id or `starter`.
    adapters: name -> folder of an adapter or a run, trained on the base of `run_or_model`.
    uses: names that will be selected; they are checked before anything is loaded.
    merged: merge the active adapter into the weights.

    A run's own adapter is active until the switch selects another one. Raises InputError if the
    model, an adapter, a name or the tokenizer does not exist, UsageError if `merged` is set and
    there is no adapter.
    """
    check_not_an_adapter(run_or_model)
    check_uses(run_or_model, adapters, uses)
    runs = {name: Run.find(folder) for name, folder in adapters.items()}
    files: dict[str, AdapterFile] = {
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
    trained = first_run((opened.run, *runs.values()))
    if trained is not None:
        tokenizer = with_template(tokenizer, trained.recipe.data)
    source = open_source(opened.weights, opened.loaded.family)
    switch = AdapterSwitch(opened.loaded, source, merged=merged)
    for name, adapter in files.items():
        switch.add(name, adapter)
        _note_other_base(name, runs[name], opened.folder, observer)
    if merged and not switch.adapters:
        raise UsageError("there is no adapter to merge", where="--merged")
    return TextGenerator(opened, switch, tokenizer, device, trained)


def check_uses(run_or_model: str, adapters: Mapping[str, Path], uses: Sequence[str]) -> None:
    """Raise UsageError if a name of `uses` is none of the adapters. Loads nothing.

    Arguments as of `open_generator`.
    """
    if not uses:
        return
    run = Run.find(run_or_model)
    own = (OWN,) if run is not None and not run.is_full_fine_tuning else ()
    for name in uses:
        check_adapter_name(name, [BASE, *own, *adapters])


def check_not_an_adapter(where: str) -> None:
    """Raise UsageError if `where` is an adapter's folder without a base, with the way to use it."""
    folder = Path(where).expanduser()
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return
    run = Run.find(folder.parent)
    if run is not None:
        hint = f"name the run's folder: {folder.parent}"
    else:
        base = open_adapter(folder).config.base_model_name_or_path or "BASE"
        hint = f"name its base, and it as an adapter: `qlora generate {base} --adapter x={where}`"
    raise UsageError(f"{where} is an adapter without its base", hint=hint)


def first_run(runs: Iterable[Run | None]) -> Run | None:
    """Return the first of `runs` that is not None."""
    return next((run for run in runs if run is not None), None)


def _note_other_base(name: str, run: Run | None, base: Path, observer: Observer) -> None:
    """Report an adapter of a run that was trained on another base than `base`."""
    trained_on = run.require("base_folder") if run is not None else None
    if trained_on is not None and Path(trained_on) != base.resolve():
        observer.note(f"adapter {name} was trained on {trained_on} and is used here on {base}")
