"""Findings about the labels of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.examples import Examples
from qlora_cli.data.findings import Finding, finding
from qlora_cli.data.row_findings import about


def label_findings(examples: Examples, digests: NDArray[np.uint64]) -> Iterator[Finding]:
    """Yield findings about the labels of rows.

    digests: one of the tokens of each example; equal ones are equal texts.
    """
    values = examples.encoded.values[examples.rows]
    if len(values) > 1 and (values == values[0]).all():
        yield finding("one-label", len(values), [examples.origin(0)])
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    differs = values != values[first[inverse]]
    yield from about("label-conflict", examples, differs)
