"""A small base on which the cost of quantization is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_cli.data.encode import Example
from qlora_cli.files.locate import read_config
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.quantize.measurement import MeasuredBase
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.runs import CPU, make_base

ROWS = [[3 + (40 * r + 11 * i + i * i) % 250 for i in range(12)] for r in range(6)]
FORMAT = WeightFormat(4, torch.float32, torch.float16, threshold=0.0)


def measured_base(folder: Path, family: str = "llama", **settings: Any) -> MeasuredBase:
    """Return a small base with the rows on which it is measured. settings: of the config."""
    base = make_base(folder / "base", family, spread=0.15, **settings)
    rows = [Example(ids, [IGNORE_INDEX, *ids[1:]], "") for ids in ROWS]
    config = read_config(base / "config.json")
    return MeasuredBase(CAUSAL, base, config, FORMAT, rows, CPU)
