"""The merged model in transformers, which generates the answers that a server should return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.data.tokenizer import load_tokenizer
from qlora_cli.errors import ModelError


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

    def decode(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of a text. special: add bos and eos as the tokenizer does."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def gap(self, answer: GreedyAnswer, text: str) -> float:
        """Return by how many nats another text is less likely at its first differing token.

        answer: this model's answer. text: the other one, not equal to `answer.text`.
        """
        other = self.encode(text, special=False)
        index = next(
            (i for i, (a, b) in enumerate(zip(answer.ids, other, strict=False)) if a != b),
            min(len(answer.ids), len(other)),
        )
        if index >= len(answer.log_probs):  # The other text continues after the last token.
            return 0.0
        log_probs = answer.log_probs[index]
        end = max((float(log_probs[number]) for number in self.ends), default=0.0)
        chosen = float(log_probs[other[index]]) if index < len(other) else end
        return float(log_probs.max()) - chosen
