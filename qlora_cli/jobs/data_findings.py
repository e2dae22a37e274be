"""Check a recipe's rows: for `qlora data`, and before every training."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlora_cli.data.checks import examine
from qlora_cli.data.encoded_dataset import EncodedDataset
from qlora_cli.data.findings import stop_at_errors
from qlora_cli.data.load import LoadedData
from qlora_cli.data.template import replaces_template
from qlora_cli.events import Observer
from qlora_cli.recipe.schema import Data


def dataset_of(data: Data, loaded: LoadedData, tokenizer: Any, base: Path) -> EncodedDataset:
    """Return the rows of a recipe as the checks take them.

    tokenizer: the base's, with the chat template of `data`. base: the base's folder.
    """
    return EncodedDataset(
        loaded.train.examples,
        None if loaded.held_out is None else loaded.held_out.examples,
        loaded.train.format,
        tokenizer,
        data.seq_len,
        data.packing,
        loaded.faults,
        replaces_template(data, base, tokenizer),
    )


def report_findings(dataset: EncodedDataset, allow: Collection[str], observer: Observer) -> None:
    """Report each finding whose code is not in `allow` as a note.

    Raises DataError listing those of severity `error`.
    """
    findings = [found for found in examine(dataset) if found.code not in allow]
    stop_at_errors(findings)
    for found in findings:
        observer.note(f"{found.severity}: {found.line}")
