"""Errors about memory and the GPU become one clear error, whichever library raises them."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_cli.errors import DoesNotFit, QloraError
from qlora_cli.shortage import converted
from tests.helpers.cli_helpers import qlora

CASES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 3, "GPU is out of"),
    (torch.OutOfMemoryError(), 3, "GPU is out of memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), 3, "GPU is out of"),
    (MemoryError(), 3, "computer is out of memory: MemoryError"),
    (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), 1, "GPU reported"),
]


@pytest.mark.parametrize(("error", "code", "text"), CASES)
def test_foreign_errors_are_converted(error: Exception, code: int, text: str) -> None:
    known = converted(error)
    assert isinstance(known, QloraError)
    assert known.exit_code == code
    assert text in str(known)
    assert "more" not in known.what


def test_the_error_of_the_cpu_allocator_is_converted() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert isinstance(converted(caught.value), DoesNotFit)


def test_other_errors_stay_as_they_are() -> None:
    for error in (ValueError("x"), RuntimeError("a shape is wrong"), QloraError("memory")):
        assert converted(error) is error


@pytest.mark.parametrize("words", [("report", "nowhere"), ("eval", "nowhere", "--data", "x")])
def test_a_command_without_memory_exits_3(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qlora_cli.jobs.report.run", without_memory)
    monkeypatch.setattr("qlora_cli.jobs.evaluate.run", without_memory)
    outcome = qlora(*words, "--json")
    assert outcome.code == 3
    assert json.loads(outcome.out)["error"]["kind"] == "DoesNotFit"
    assert "bug" not in outcome.err
