"""Preference pairs and a training state for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.encode import Example
from qlora_cli.train.state import State
from tests.helpers.runs import CPU
from tests.helpers.training import example, make_state

LENGTHS = ((9, 14), (17, 6), (5, 5))
"""Tokens of both answers of each of the pairs."""


def pair(number: int, chosen: int, rejected: int) -> Example:
    """Return an encoded pair whose answers have the same prompt of three tokens."""
    answers = [example(30 * number, 3, untrained=3)] * 2
    ids, labels = [], []
    for side, (prompt, length) in enumerate(zip(answers, (chosen, rejected), strict=True)):
        rest = example(50 * number + 90 * side + 7, length - 3, untrained=0).ids
        ids += prompt.ids + rest
        labels += prompt.labels + rest
    return Example(ids, labels, f"pair {number}", (chosen, rejected))


PAIRS = [pair(number, *lengths) for number, lengths in enumerate(LENGTHS)]


def make_pair_rows(file: Path, num: int = 12, length: int = 8) -> Path:
    """Write preference rows of `prompt`, `chosen` and `rejected`, computed by a formula."""

    def letters(seed: int, number: int) -> str:
        return "".join(chr(97 + (7 * seed + 3 * i * i + i) % 26) for i in range(number))

    rows = [
        {
            "prompt": letters(row, 4),
            "chosen": letters(row + 31, length - row % 3),
            "rejected": letters(row + 57, length - row % 4),
        }
        for row in range(num)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_pair_state(folder: Path, family: str = "llama", **sections: Any) -> State:
    """Return the state of preference training of a small model, with random values in B."""
    preference = {"beta": 0.1, **sections.pop("preference", {})}
    return make_state(folder, family, task="preference", preference=preference, **sections)


def with_reference(state: State, pairs: list[Example]) -> list[Example]:
    """Return the pairs with their log-probabilities under the reference model."""
    values = [
        state.task.constants(state.loaded, state.task.collate([item]), CPU)[0].tolist()
        for item in pairs
    ]
    return [replace(item, constants=tuple(v)) for item, v in zip(pairs, values, strict=True)]


def zero_b(state: State) -> None:
    """Set B of every layer to zero, as before training."""
    with torch.no_grad():
        for name, parameter in state.trainable.items():
            if "lora_b" in name:
                parameter.zero_()
