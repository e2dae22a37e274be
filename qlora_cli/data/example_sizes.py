"""Sizes of examples, given as a list or as `Examples`, whose arrays are used without copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.encode import Example
from qlora_cli.data.examples import Examples


def sizes(examples: Sequence[Example]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the number of tokens and of trained tokens of each example."""
    if isinstance(examples, Examples):
        return examples.lengths, examples.targets
    lengths = [len(example.ids) for example in examples]
    targets = [example.num_targets for example in examples]
    return np.array(lengths, np.int32), np.array(targets, np.int32)


def segment_sizes(examples: Sequence[Example]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the number of segments of each example and the length of its longest one."""
    if isinstance(examples, Examples):
        return examples.segment_sizes()
    segments = [example.segments or (len(example.ids),) for example in examples]
    return np.array([*map(len, segments)], np.int32), np.array([*map(max, segments)], np.int32)
