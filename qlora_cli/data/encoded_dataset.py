"""Encoded rows as the data checks take them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.examples import Examples
from qlora_cli.data.formats import FORMATS, RowFormat
from qlora_cli.data.text_checks import RowFaults
from qlora_cli.data.token_facts import TokenFacts, TokenIds
from qlora_cli.recipe.schema import DataFormat

OWN_PROMPTS = 0.3
"""Share of different prompts among the rows; with fewer, prompts are repeated on purpose."""


@dataclass(frozen=True)
class EncodedDataset:
    """Encoded rows and how they are arranged.

    held_out: rows of the evaluation set; None if there is none. tokenizer: the base's; None if it
    has none. faults: of the texts of the rows. replaces_template: whether
    `data.template` differs from the base's own chat template.
    """

    examples: Examples
    held_out: Examples | None
    format: DataFormat
    tokenizer: Any
    seq_len: int
    packing: bool
    faults: RowFaults = field(default_factory=RowFaults)
    replaces_template: bool = False

    @cached_property
    def facts(self) -> TokenFacts:
        """Return the facts about the tokens of `examples`."""
        return TokenFacts.of(self.examples, TokenIds.of(self.tokenizer))

    @cached_property
    def held_out_facts(self) -> TokenFacts | None:
        """Return the facts about the tokens of `held_out`."""
        if self.held_out is None:
            return None
        return TokenFacts.of(self.held_out, TokenIds.of(self.tokenizer))

    @property
    def row_format(self) -> RowFormat:
        """Return the format's entry in the registry."""
        return FORMATS[self.format]

    @property
    def uses_template(self) -> bool:
        """Return whether the chat template writes the rows."""
        return self.row_format.uses_chat_template(self.tokenizer)

    @cached_property
    def is_split(self) -> NDArray[np.bool_]:
        """Return for each row whether it is a piece of a longer one."""
        return self.examples.pieces > 0

    @cached_property
    def has_prompt(self) -> NDArray[np.bool_]:
        """Return for each row whether more than a BOS token is in front of its answer."""
        return (self.facts.first > 1) & ~self.is_split
