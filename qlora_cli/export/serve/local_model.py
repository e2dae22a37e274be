"""The merged model in transformers, which generates the answers that a server should return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import ModelError

_MAX_LIKELY = 50
"""Number of likely tokens that may be a server's choice."""


@dataclass(frozen=True)
class GreedyAnswer:
    """A greedy continuation.

    ids: the generated tokens without the one that ends the text. text: these tokens as text.
    log_probs: one vector (V,) for each generated token and one for the token after the last.
    """

    ids: list[int]
    text: str
    log_probs: list[Tensor]


class LocalModel:
    """A model's folder in float32, with its tokenizer.

    folder: the model's folder. device: runs the model.

    The constructor raises ModelError if the folder has no tokenizer or cannot be loaded.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self.tokenizer: Any = load_tokenizer(str(folder))
        if self.tokenizer is None:
            raise ModelError("the model has no tokenizer", where=str(folder))
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError) as fault:
            raise ModelError(f"cannot be loaded: {fault}", where=str(folder)) from fault
        self.model = model.to(device).eval()
        ends = self.model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        self.ends = {*listed, self.tokenizer.eos_token_id} - {None}

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], num: int) -> GreedyAnswer:
        """Return up to `num` greedy tokens after a prompt."""
        inputs, cache = list(prompt), None
        ids: list[int] = []
        log_probs: list[Tensor] = []
        for _ in range(num):
            batch = torch.tensor([inputs], device=self.device)
            output = self.model(input_ids=batch, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            log_probs.append(output.logits[0, -1].float().log_softmax(-1).cpu())
            token = int(log_probs[-1].argmax())
            if token in self.ends:
                break
            ids.append(token)
            inputs = [token]
        return GreedyAnswer(ids, self.decode(ids), log_probs)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits (T, V) at every position, in float32 on the CPU. ids: T tokens."""
        batch = torch.tensor([list(ids)], device=self.device)
        logits: Tensor = self.model(input_ids=batch).logits[0].float().cpu()
        return logits

    def decode(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of a text. special: add bos and eos as the tokenizer does."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def gap(self, answer: GreedyAnswer, text: str) -> float:
        """Return by how many nats another text is less likely at its first differing token.

        A server returns text and no tokens, and the same text may be other tokens. So at every
        position up to the first difference, the likely tokens that continue the text are compared
        with the most likely one. The result is the smallest gap, that is, a lower bound.

        answer: this model's answer. text: the other one, not equal to `answer.text`.
        """
        if len(answer.ids) == len(answer.log_probs) and text.startswith(answer.text):
            return 0.0  # The other text only continues after the last token.
        prefixes = [self.decode(answer.ids[:num]) for num in range(len(answer.log_probs))]
        gaps = [
            self._gap_at(answer, num, text)
            for num, prefix in enumerate(prefixes)
            if text.startswith(prefix)
        ]
        return min(gaps)

    def _gap_at(self, answer: GreedyAnswer, num: int, text: str) -> float:
        """Return the gap if the other text leaves this answer after `num` tokens."""
        log_probs = answer.log_probs[num]
        if text == self.decode(answer.ids[:num]):  # The other text ends here.
            chosen = max((float(log_probs[end]) for end in self.ends), default=-math.inf)
            return float(log_probs.max()) - chosen
        values, tokens = log_probs.topk(min(_MAX_LIKELY, len(log_probs)))
        own = answer.ids[num] if num < len(answer.ids) else None
        for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
            if token != own and self._continues([*answer.ids[:num], token], text):
                return float(values[0]) - float(value)
        return float(values[0] - values[-1])

    def _continues(self, ids: Sequence[int], text: str) -> bool:
        """Return whether a text may begin with these tokens. They may end within a character."""
        return text.startswith(self.decode(ids).rstrip("\ufffd")) and ids[-1] not in self.ends
