"""A GGUF file opened in llama.cpp, on the CPU: tokens, logits and greedy answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.export.gguf.llama_library import llama_cpp


class LlamaFile:
    """A model in llama.cpp. Call `close` at the end.

    file: the GGUF file. context: maximum number of tokens of a prompt with its answer.

    The constructor raises ModelError if llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, context: int) -> None:
        try:
            self._model: Any = llama_cpp().Llama(
                str(file),
                n_ctx=context,
                n_batch=context,
                n_gpu_layers=0,
                logits_all=True,
                verbose=False,
            )
        except (ValueError, RuntimeError, OSError) as fault:
            raise ModelError(f"llama.cpp cannot load the file: {fault}", where=str(file)) from fault

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text with the special tokens that llama.cpp adds and reads."""
        return list(self._model.tokenize(text.encode(), add_bos=True, special=True))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits (T, V) at every position, in float32. ids: T tokens."""
        self._model.reset()
        self._model.eval(list(ids))
        return torch.from_numpy(np.array(self._model.scores[: len(ids)], dtype=np.float32))

    def greedy(self, prompt: Sequence[int], num: int, ends: Collection[int]) -> list[int]:
        """Return up to `num` greedy tokens after a prompt, without the end token.

        ends: tokens that end an answer.
        """
        self._model.reset()
        inputs, answer = list(prompt), list[int]()
        for _ in range(num):
            self._model.eval(inputs)
            token = int(np.argmax(self._model.scores[self._model.n_tokens - 1]))
            if token in ends:
                break
            answer.append(token)
            inputs = [token]
        return answer

    def close(self) -> None:
        """Free the model."""
        self._model.close()
