"""Observers that record what a job reports."""

from __future__ import annotations

from qlora_cli.events import Silent


class NoteRecorder(Silent):
    """Records every note of a job. notes: the notes, in order."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class StageRecorder(NoteRecorder):
    """Records every stage of a job as well. stages: name and number of units of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[tuple[str, int]] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))
