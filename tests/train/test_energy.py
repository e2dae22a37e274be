"""Energy: what the counters of a GPU's driver and of a CPU give, and why there is none."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pynvml
import pytest
import torch

from qlora_cli.jobs import report, train
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_steps
from qlora_cli.train import energy
from qlora_cli.train.energy import EnergyCounter, energy_counter
from qlora_cli.ui.summary import summary
from qlora_cli.units import format_figure
from tests.helpers.observers import NoteRecorder
from tests.helpers.resumed_runs import recipe_of
from tests.helpers.runs import make_base, make_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RANGE = 1_000_000_000


def make_package(folder: Path, number: int, microjoules: int) -> Path:
    package = folder / f"intel-rapl:{number}"
    package.mkdir(parents=True)
    (package / "name").write_text(f"package-{number}\n")
    (package / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (package / "energy_uj").write_text(f"{microjoules}\n")
    return package


def test_the_packages_of_a_cpu_are_added_and_a_counter_may_restart(tmp_path: Path) -> None:
    first, second = (make_package(tmp_path, n, RANGE - 1_000_000) for n in (0, 1))
    core = make_package(tmp_path, 2, 0)  # A part of a package, which has its own counter.
    (core / "name").write_text("core\n")
    counter = energy_counter(CPU, tmp_path)
    assert counter.source == "RAPL, 2 complete CPU package(s)"
    start = counter.read()
    (first / "energy_uj").write_text(f"{RANGE - 400_000}\n")
    (second / "energy_uj").write_text("500000\n")
    (core / "energy_uj").write_text("900000\n")
    assert counter.since(start) == pytest.approx(0.6 + 1.5)


def test_a_counter_that_disappears_gives_no_energy(tmp_path: Path) -> None:
    package = make_package(tmp_path, 0, 5)
    counter = energy_counter(CPU, tmp_path)
    start = counter.read()
    (package / "energy_uj").unlink()
    assert counter.since(start) is None
    assert counter.since(None) is None


@pytest.mark.parametrize("content", [None, "many\n"])
def test_a_cpu_without_a_usable_counter_has_a_reason(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (make_package(tmp_path, 0, 0) / "energy_uj").write_text(content)
    counter = energy_counter(CPU, tmp_path)
    assert counter.source.startswith("not measured: ")
    assert counter.read() is None


class Driver:
    """Answers of a driver: millijoules since it was loaded, which grow by 250,000 per call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.millijoules = count(81_234_567, 250_000)
        self.fails = False
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", self.energy)
        monkeypatch.setattr(energy, "_uuid", lambda device: "GPU-1")

    def energy(self, handle: bytes) -> int:
        assert handle == b"GPU-1"
        if self.fails:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return next(self.millijoules)


def test_a_gpu_counts_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    counter = energy_counter(GPU)
    assert counter.source == "NVML, the complete GPU"
    assert counter.since(counter.read()) == 250.0
    driver.fails = True
    assert counter.read() is None


def test_a_gpu_that_does_not_count_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch).fails = True
    assert "Not Supported" in energy_counter(GPU).source


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert "qlora-cli[energy]" in energy_counter(GPU).source


@pytest.mark.slow
@pytest.mark.parametrize("source", ["a counter", "not measured: no counter"])
def test_a_run_stores_the_energy_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    make_base(tmp_path / "llama", "llama")
    make_rows(tmp_path / "rows.jsonl")
    joules = count(100.0, 2.0)
    is_measured = source == "a counter"
    counter = EnergyCounter(source, lambda: next(joules) if is_measured else None)
    monkeypatch.setattr(train, "energy_counter", lambda device, processes: counter)
    recipe = recipe_of(tmp_path, tmp_path / "run")
    train.run(recipe, recipe_path=None, resume=False, observer=NoteRecorder())
    run = RunFolder(tmp_path / "run")
    lines = read_steps(run.metrics)
    assert {line["joules"] for line in lines} == ({2.0} if is_measured else {None})
    assert run.read()["energy"] == source
    shown = summary(report.run(run.path))["energy"]
    tokens = sum(line["tokens"] for line in lines)
    assert (f"{format_figure(tokens / (2.0 * len(lines)))} tokens/J" in shown) == is_measured
    assert source in shown
