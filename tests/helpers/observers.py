"""Observers that record what a job reports."""

from __future__ import annotations

from qlora_cli.events import Silent


class NoteRecorder(Silent):
    """Records every note of a job. notes: the notes, in order."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
