"""The length of a planned job is that of the job; its time comes from a measured run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from qlora_cli.events import Silent
from qlora_cli.files.locate import find_config, read_config
from qlora_cli.jobs import data, data_survey, device_speed, plan
from qlora_cli.jobs.measured_speed import measured_speed, record_speed
from qlora_cli.memory.device import inspect_device
from qlora_cli.plan import speeds
from qlora_cli.recipe.change import with_settings
from qlora_cli.recipe.gpus import planned_gpu
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from tests.helpers.runs import make_base, make_recipe, make_rows


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    # The speeds of other tests' runs do not count.
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    rows = make_rows(tmp_path / "rows.jsonl", num=200)
    train = {"epochs": 2, "micro_batch": 1, "grad_accum": 2}
    base = make_base(tmp_path / "base", "llama")
    return make_recipe(base, rows, data={"seq_len": 64}, train=train)


def planned(recipe: Recipe) -> plan.PlanResult:
    return plan.run(recipe, device_profile=None, fit=False, compare=False)


@pytest.mark.parametrize("packing", [True, False])
def test_the_length_is_that_of_the_rows(recipe: Recipe, packing: bool) -> None:
    changed = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"packing": packing})}
    )
    length, found = planned(changed).length, data.run(changed, show=0)
    assert length is not None
    assert not length.is_estimate
    assert (length.rows, length.sequences, length.updates) == (
        found.rows,
        found.sequences,
        found.updates,
    )
    assert (length.tokens, length.trained_tokens) == (found.tokens, found.trained_tokens)


def test_many_rows_are_estimated_from_a_sample(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_survey, "SAMPLE", 50)
    length, found = planned(recipe).length, data.run(recipe, show=0)
    assert length is not None
    assert length.is_estimate
    assert length.text().startswith("about 200 rows")
    assert length.sequences == pytest.approx(found.sequences, rel=0.1)


def test_rows_that_cannot_be_read_are_named(recipe: Recipe) -> None:
    with Path(str(recipe.data.train)).open("a") as file:
        file.write(json.dumps({"unknown": 1}) + "\n")
    result = planned(recipe)
    assert result.length is None
    assert result.steps is None
    assert "1 of 201 rows" in str(result.length_problem), result.length_problem


def test_the_time_comes_from_a_like_run_on_the_same_device(recipe: Recipe) -> None:
    assert "single operations" in planned(recipe).time.source
    profile = inspect_device()
    config = read_config(find_config(recipe.model.name, None))
    resolved, _ = resolve(recipe, profile)
    record_speed(resolved, config, profile, 1000.0)
    result = planned(recipe)
    assert result.length is not None
    tokens = 2 * result.length.tokens
    assert result.time.total_seconds == pytest.approx(tokens / 1000.0)
    assert result.time.step_seconds == pytest.approx(tokens / 1000.0 / result.length.updates)
    assert "1,000 tokens/s" in result.time.source
    for key, value in OTHER_WORK:
        section = getattr(resolved, key).model_copy(update=value)
        other = resolved.model_copy(update={key: section})
        assert measured_speed(other, config, profile) is None, (key, value)


OTHER_WORK: list[tuple[str, dict[str, Any]]] = [
    ("base", {"bits": 8}),
    ("adapter", {"rank": 5}),
    ("adapter", {"ranks": {"q": 5}}),
    ("adapter", {"prefix": 4}),
    ("adapter", {"dropout": 0.1}),
    ("data", {"seq_len": 32}),
    ("train", {"micro_batch": 2}),
    ("train", {"offload_inputs": True}),
]
"""Settings with which a token needs other work."""


def test_a_finished_run_records_its_speed(recipe: Recipe, tmp_path: Path) -> None:
    from qlora_cli.jobs import train

    result = train.run(
        recipe.model_copy(update={"output": str(tmp_path / "run")}),
        recipe_path=None,
        resume=False,
        observer=Silent(),
    )
    profile = inspect_device()
    resolved, _ = resolve(recipe, profile)
    config = read_config(find_config(recipe.model.name, None))
    speed = measured_speed(resolved, config, profile)
    assert speed is not None
    assert speed.tokens_per_second == result.tokens_per_second


def test_packed_sequences_longer_than_the_positions_are_stated(recipe: Recipe) -> None:
    assert planned(recipe).row_limit is None
    longer = recipe.data.model_copy(update={"seq_len": 100_000})
    result = planned(recipe.model_copy(update={"data": longer}))
    assert result.row_limit is not None
    assert result.row_limit < 100_000


def test_the_time_on_a_named_gpu_comes_from_its_published_speed(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Starting the kernels of a tiny model takes longer than their work.
    monkeypatch.setattr(speeds, "CALL_SECONDS", 0.0)
    slow, fast = (
        plan.run(recipe, device_profile=planned_gpu(name), fit=False, compare=False).time
        for name in ("RTX 3060", "RTX 5090")
    )
    assert slow.total_seconds is not None
    assert fast.total_seconds is not None
    assert slow.total_seconds > fast.total_seconds
    # The recipe computes in float32.
    assert "published 12.7 TFLOP/s and 360 GB/s of RTX 3060" in slow.source
    assert "not measured" in slow.source


@pytest.mark.parametrize(
    ("residency", "offload", "contents"),
    [
        ("device", True, "inputs of blocks to host memory and back"),
        ("host", False, "weights to the device"),
        ("host", True, "weights to the device and inputs of blocks to host memory and back"),
    ],
)
def test_the_sentence_about_copies_names_what_is_copied(
    recipe: Recipe, residency: Literal["device", "host"], offload: bool, contents: str
) -> None:
    train = {"activation_checkpointing": True, "offload_inputs": offload}
    changed = with_settings(with_settings(recipe, "train", **train), "base", residency=residency)
    profile = planned_gpu("RTX 3060")
    copies = plan.run(changed, device_profile=profile, fit=False, compare=False).time.copies
    assert copies is not None
    assert f" 1 MiB of {contents}, which takes 1 s " in copies.text("1 MiB", "1 s", "2 s")


def test_the_time_on_a_gpu_without_a_name_is_not_estimated(recipe: Recipe) -> None:
    time = plan.run(recipe, device_profile=planned_gpu("24GiB"), fit=False, compare=False).time
    assert (time.step_seconds, time.total_seconds) == (None, None)
    assert "RTX 4090" in time.source


def test_the_speed_of_this_device_is_measured_once(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = planned(recipe).time
    monkeypatch.setattr(device_speed, "measure", None)
    assert planned(recipe).time == first
