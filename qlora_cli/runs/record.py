"""The types of the values in run.json, which are checked when it is read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

_Number = Annotated[int, Field(ge=0, lt=2**53)]


class _Choice(BaseModel):
    """A value that was chosen for the user, with its reason."""

    key: str
    value: Any
    reason: str


class _Shortage(BaseModel):
    """A step that ran out of memory, and what has applied since then."""

    step: _Number
    reason: str
    recomputed_blocks: _Number
    parts: Annotated[int, Field(ge=1, lt=2**53)]


class _Tensors(BaseModel):
    """How tensors of one kind are stored."""

    tensors: str
    count: _Number
    held: str
    reason: str


class _Result(BaseModel):
    """The result of a finished run."""

    steps: _Number
    train_loss: float | None = None
    tokens_per_second: float | None = None
    eval_loss: float | None = None
    best_step: _Number | None = None
    eval_loss_before: float | None = None


class RunRecord(BaseModel):
    """The values of run.json that are read back. Older versions wrote fewer of them."""

    status: str | None = None
    recipe: dict[str, Any] | None = None
    base_folder: str | None = None
    base_fingerprint: str | None = None
    base_config: str | None = None
    data_digest: str | None = None
    steps: _Number | None = None
    choices: list[_Choice] | None = None
    tensors: list[_Tensors] | None = None
    memory_shortages: list[_Shortage] | None = None
    versions: dict[str, str] | None = None
    checksums: dict[str, str] | None = None
    device: dict[str, Any] | None = None
    energy: str | None = None
    result: _Result | None = None
