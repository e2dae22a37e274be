"""The estimated time of a micro-batch whose copies overlap with its computation."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from plan_cases import Case
from plan_measure import plan_case

from qlora_cli.device import DeviceProfile
from qlora_cli.jobs import device_speed as speed_module
from qlora_cli.jobs.device_speed import device_speed
from qlora_cli.plan.link_time import overlapped_seconds
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.speeds import LINK_EFFICIENCY, nominal_speed
from qlora_cli.plan.step_time import PartOfBatch, micro_batches, work_of
from qlora_cli.recipe.gpus import link_of, planned_gpu

GPU = planned_gpu("RTX 4090")
SPEED = nominal_speed(GPU, torch.bfloat16)


def planned(*changes: str) -> tuple[MemoryPlan, list[PartOfBatch]]:
    """Return the plan of a small Llama with six blocks, and its last micro-batch."""
    settings = ("data.seq_len=64", "train.offload_inputs=false", "train.loss_chunk=64", *changes)
    plan = plan_case(Case("llama", "small", settings), GPU)
    return plan, micro_batches(plan.segments)[-1]


def seconds(plan: MemoryPlan, parts: list[PartOfBatch], link: float) -> float:
    return overlapped_seconds(parts, plan, replace(SPEED, link_bytes_per_second=link))


@pytest.fixture(scope="module")
def host() -> tuple[MemoryPlan, list[PartOfBatch]]:
    return planned("base.residency=host")


def test_copies_over_a_fast_link_are_hidden(host: tuple[MemoryPlan, list[PartOfBatch]]) -> None:
    plan, parts = host
    assert plan.head_bytes
    assert plan.streamed_bytes
    assert seconds(plan, parts, 1e18) == pytest.approx(SPEED.seconds(work_of(parts)))


def test_a_slow_link_decides_and_hides_the_computation_of_blocks(
    host: tuple[MemoryPlan, list[PartOfBatch]],
) -> None:
    plan, parts = host
    link = 1e3
    copying = plan.copied_bytes / link
    assert copying > 1000 * SPEED.seconds(work_of(parts))
    assert seconds(plan, parts, link) == pytest.approx(copying, rel=1e-9)


def test_the_head_is_copied_during_the_loss(host: tuple[MemoryPlan, list[PartOfBatch]]) -> None:
    plan, parts = replace(host[0], streamed_bytes=0), host[1]
    link = 1e3
    others = [part for part in parts if part.part != "loss"]
    expected = plan.head_bytes / link + SPEED.seconds(work_of(others))
    assert seconds(plan, parts, link) == pytest.approx(expected, rel=1e-9)


def test_a_link_as_fast_as_the_computation_leaves_both_visible(
    host: tuple[MemoryPlan, list[PartOfBatch]],
) -> None:
    """The time is between the slower of both and their sum, because blocks are not all alike."""
    plan, parts = host
    computing = SPEED.seconds(work_of(parts))
    found = seconds(plan, parts, plan.copied_bytes / computing)
    assert computing < found < 2 * computing


def test_only_streamed_blocks_wait_for_the_link(
    host: tuple[MemoryPlan, list[PartOfBatch]],
) -> None:
    """Blocks that keep their activations keep their weights, too."""
    plan, parts = planned("base.residency=host", "train.activation_checkpointing=2")
    assert 3 * plan.streamed_bytes == host[0].streamed_bytes
    link = 1e3
    kept = [part for part in parts if part.part != "loss" and part.block not in (0, 1)]
    expected = plan.copied_bytes / link + SPEED.seconds(work_of(kept))
    assert seconds(plan, parts, link) == pytest.approx(expected, rel=1e-9)


def test_a_base_on_the_device_copies_nothing() -> None:
    plan, parts = planned()
    assert plan.copied_bytes == 0
    assert seconds(plan, parts, 1.0) == pytest.approx(SPEED.seconds(work_of(parts)))


def test_inputs_in_host_memory_are_copied_too() -> None:
    plan, parts = planned("train.offload_inputs=true")
    assert plan.moved_inputs == plan.copied_bytes > 0
    assert seconds(plan, parts, 1e3) == plan.copied_bytes / 1e3


@pytest.mark.parametrize("name", ["RTX 3060", "RTX 4060", "RTX 5090", "24GiB"])
def test_the_link_of_a_planned_gpu_is_a_share_of_its_specification(name: str) -> None:
    gpu = planned_gpu(name)
    speed = nominal_speed(gpu, torch.bfloat16)
    assert speed.link_bytes_per_second == LINK_EFFICIENCY * link_of(gpu).bytes_per_second
    assert link_of(gpu).name in speed.link_source
    assert "not measured" in speed.link_source


def test_the_link_of_a_device_of_this_machine_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(speed_module, "_SECONDS", 0.01)
    cpu = DeviceProfile(kind="cpu", name="this CPU", capacity_bytes=2**34)
    speed = device_speed(cpu, torch.float32)
    assert speed is not None
    assert speed.link_bytes_per_second > 0
    assert speed.link_source.endswith("measured on this machine")
    # The second call reads the file of the first one.
    monkeypatch.setattr(speed_module, "measure", None)
    again = device_speed(cpu, torch.float32)
    assert again is not None
    assert asdict(again) == asdict(speed)
