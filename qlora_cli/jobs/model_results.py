"""The result of `qlora models`, without torch, because `ui/` imports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_cli.jobs.results import Result


@dataclass(frozen=True)
class ModelType:
    """One model type. state: `tested` by the test suite, `proved` or `refused` on this machine."""

    model_type: str
    state: Literal["tested", "proved", "refused"]
    detail: str


@dataclass(frozen=True)
class MeasuredLaw:
    """One law of a proof in words, with its measured value and its limit."""

    text: str
    value: float | None
    limit: float
    is_lower_bound: bool
    holds: bool
    error: str | None


@dataclass(frozen=True)
class ModelsResult(Result):
    """Result of `qlora models`.

    types: the known model types, or the one that was asked for. roles: the roles of its linears.
    laws: its proof; empty for types that the test suite proves. notes: what this type cannot do, or
    does in another way.
    """

    types: tuple[ModelType, ...]
    roles: tuple[str, ...] = ()
    laws: tuple[MeasuredLaw, ...] = ()
    notes: tuple[str, ...] = ()
