"""Free host memory: one definition, with every limit that can end an allocation."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from qlora_cli.memory import host

CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group with 100 MB in use, of which 40 MB are pages of files."""
    monkeypatch.setattr(host, "_GROUP", tmp_path)
    (tmp_path / "memory.current").write_text("100000000\n")
    (tmp_path / "memory.stat").write_text("anon 60000000\ninactive_file 40000000\n")
    return tmp_path


def test_the_container_s_limit_counts(group: Path) -> None:
    (group / "memory.max").write_text("90000000\n")
    assert host.available_bytes(CPU) == 90_000_000 - 60_000_000
    assert host.host_capacity_bytes() == 90_000_000
    assert host.fits(20_000_000, CPU)
    assert not host.fits(30_000_000, CPU)


def test_a_container_without_a_limit_has_the_machine_s_memory(group: Path) -> None:
    free = host.available_bytes(CPU)
    (group / "memory.max").write_text("max\n")
    assert host.available_bytes(CPU) == pytest.approx(free, rel=0.2)
    assert host.host_capacity_bytes() > host.available_bytes(CPU) > 0


def test_a_container_beyond_its_limit_has_nothing_left(group: Path) -> None:
    (group / "memory.max").write_text("50000000\n")
    assert host.available_bytes(CPU) == 0


def test_the_process_own_limit_counts(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = host._kibibytes(Path("/proc/self/status"))["VmData"]

    def limit(kind: int) -> tuple[int, int]:
        soft = own + 10**7 if kind == resource.RLIMIT_DATA else resource.RLIM_INFINITY
        return soft, resource.RLIM_INFINITY

    monkeypatch.setattr(resource, "getrlimit", limit)
    assert 0 <= host.available_bytes(CPU) <= 2 * 10**7
