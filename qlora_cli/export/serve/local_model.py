"""The merged model in transformers, with which a server or a GGUF file is compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import ModelError
from qlora_cli.files.locate import read_config
from qlora_cli.models.composed import auto_class
from qlora_cli.models.progress_bars import without_progress_bars

_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token that is one byte, in tokenizers of SentencePiece's kind."""
_REPLACEMENT = "\ufffd"
"""What transformers decodes bytes to that are no character."""


class LocalModel:
    """A model's folder in float32, with its tokenizer.

    folder: the model's folder. device: runs the model.

    `ends` has the tokens that end an answer, and `possible_ends` also those at which only some
    servers end it: llama.cpp ends it at `<|im_end|>` and others of its own list. The constructor
    raises ModelError if the folder has no tokenizer or cannot be loaded.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self.tokenizer: Any = load_tokenizer(str(folder))
        if self.tokenizer is None:
            raise ModelError("the model has no tokenizer", where=str(folder))
        try:
            config = read_config(folder / "config.json")
            with without_progress_bars():
                model: Any = auto_class(config, AutoModelForCausalLM).from_pretrained(
                    folder, dtype=torch.float32, trust_remote_code=False
                )
        except (OSError, ValueError, RuntimeError) as fault:
            raise ModelError(f"cannot be loaded: {fault}", where=str(folder)) from fault
        self.model = model.to(device).eval()
        ends = self.model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        self.ends = {*listed, self.tokenizer.eos_token_id} - {None}
        added = self.tokenizer.added_tokens_decoder.items()
        self._bytes = {
            number: int(token[3:5], 16)
            for token, number in self.tokenizer.get_vocab().items()
            if _BYTE.fullmatch(token)
        }
        self.possible_ends = self.ends | {number for number, token in added if token.special}

    def greedy(self, prompt: Sequence[int], num: int) -> list[int]:
        """Return up to `num` greedy tokens after a prompt, without the one that ends the text."""
        decoder = Decoder(self, prompt)
        while len(decoder.ids) < num:
            token = int(decoder.logits.argmax())
            if token in self.ends:
                break
            decoder.append(token)
        return decoder.ids

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits (T, V) at every position, in float32 on the CPU. ids: T tokens."""
        batch = torch.tensor([list(ids)], device=self.device)
        logits: Tensor = self.model(input_ids=batch).logits[0].float().cpu()
        return logits

    def decode(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special tokens."""
        return self._decoded([ids])[0]

    def continuations(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return several rows of tokens as texts that follow another text.

        So a space at the beginning is kept, which some tokenizers omit from the start of a text.
        Bytes that are no character are left out.
        """
        plain = [ids for ids in rows if self._bytes.keys().isdisjoint(ids)]
        texts = iter(self._after_text(plain))
        return [
            next(texts) if self._bytes.keys().isdisjoint(ids) else self._with_bytes(ids)
            for ids in rows
        ]

    def _with_bytes(self, ids: Sequence[int]) -> str:
        """Return tokens as text, of which some are single bytes.

        transformers replaces all bytes of a run if one of them is no character; servers do not.
        """
        parts = [
            bytes(self._bytes[token] for token in run)
            if is_byte
            else self._after_text([list(run)])[0].encode()
            for is_byte, run in groupby(ids, self._bytes.__contains__)
        ]
        return b"".join(parts).decode(errors="ignore")

    def _after_text(self, rows: Sequence[Sequence[int]]) -> list[str]:
        before = self.encode("a", special=False)
        start = len(self.decode(before))
        texts = self._decoded([[*before, *ids] for ids in rows])
        return [text[start:].replace(_REPLACEMENT, "") for text in texts]

    def _decoded(self, rows: Sequence[Sequence[int]]) -> list[str]:
        # A server does not remove spaces before punctuation, as some tokenizers' settings do.
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return [str(text) for text in self.tokenizer.batch_decode(rows, **settings)]

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of a text. special: add bos and eos as the tokenizer does."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])


class Decoder:
    """Adds one token after another to a prompt.

    ids: the tokens after the prompt. logits: (V,), of the token after the last, in float32 on the
    CPU.
    """

    def __init__(self, model: LocalModel, prompt: Sequence[int]) -> None:
        self._model = model
        self._cache: Any = None
        self.ids: list[int] = []
        self.logits = self._forward(prompt)

    def append(self, token: int) -> None:
        """Add a token."""
        self.ids.append(token)
        self.logits = self._forward([token])

    @torch.no_grad()
    def _forward(self, inputs: Sequence[int]) -> Tensor:
        batch = torch.tensor([list(inputs)], device=self._model.device)
        output = self._model.model(input_ids=batch, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[0, -1].float().cpu()
        return logits
