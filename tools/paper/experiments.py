"""The experiments in the order in which they are measured: the cheap ones first."""

from __future__ import annotations

from classification_cells import MATRICES, RTE, SST2
from generation_cells import E2E, INSTRUCT
from inference_cells import LATENCY, TASKS
from memory_cells import MEMORY
from paper_cells import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    TASKS,
    LATENCY,
    MEMORY,
    SST2,
    MATRICES,
    INSTRUCT,
    E2E,
    RTE,
)
