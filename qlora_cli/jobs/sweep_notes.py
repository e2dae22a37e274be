"""Repeats of notes are left out in a sweep, whose runs report the same rows and choices."""

from __future__ import annotations

from qlora_cli.events import Observer, StepEvent


class EachNoteOnce:
    """An observer that passes every event on, and each text of a note only the first time."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._seen: set[str] = set()

    def note(self, text: str) -> None:
        """Pass a new text on."""
        if text not in self._seen:
            self._seen.add(text)
            self._observer.note(text)

    def stage(self, name: str, total: int) -> None:
        """Pass the stage on."""
        self._observer.stage(name, total)

    def advance(self, done: int) -> None:
        """Pass the progress on."""
        self._observer.advance(done)

    def step(self, event: StepEvent) -> None:
        """Pass the step on."""
        self._observer.step(event)
