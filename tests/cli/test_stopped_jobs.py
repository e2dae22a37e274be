"""Jobs that do not fit or are interrupted: exit codes 3 and 130."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.memory.device import inspect_device
from tests.helpers.cli_checks import assert_folder_is_usable, assert_refused
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow


def test_a_job_that_does_not_fit_exits_3_and_writes_nothing(
    job_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.jobs import prepare_training

    small = dataclasses.replace(inspect_device(), capacity_bytes=1000)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_training, "inspect_device", lambda: small)
        assert_refused(qlora("train", job_recipe), 3, "the job needs", "has 1000 B", "qlora plan")
    assert_folder_is_usable(job_recipe)


ENDINGS = ["SIGINT", "SIGTERM", "SIGHUP"]


@pytest.mark.parametrize("name", ENDINGS)
def test_a_signal_in_a_step_exits_130_and_writes_a_checkpoint(
    job_recipe: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from qlora_cli.train import loop

    real = loop.train_step

    def interrupted(state: Any, *rest: Any) -> Any:
        if state.step == 1:
            os.kill(os.getpid(), getattr(signal, name))
        return real(state, *rest)

    run = job_recipe.parent / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        outcome = qlora("train", job_recipe, "train.checkpoint_every=100")
    assert outcome.code == 130
    assert "stopped after step 2 of 3" in outcome.err
    assert "--resume" in outcome.err
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert qlora("train", job_recipe, "train.checkpoint_every=100", "--resume").code == 0


@pytest.mark.parametrize("name", ENDINGS)
def test_a_signal_while_loading_ends_a_resumed_run_in_order(
    job_recipe: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from qlora_cli.jobs import train

    assert qlora("train", job_recipe).code == 0
    longer = ("train", job_recipe, "train.steps=5", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_state", lambda *_: os.kill(os.getpid(), getattr(signal, name)))
        assert qlora(*longer).code == 130
    run_json = job_recipe.parent / "run" / "run.json"
    assert json.loads(run_json.read_text())["status"] == "interrupted"
    assert qlora(*longer, "--json").json["steps"] == 5


def test_a_hangup_that_is_ignored_does_not_stop_a_run(
    job_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after nohup."""
    from qlora_cli.train import loop

    real = loop.train_step

    def hung_up(state: Any, *rest: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return real(state, *rest)

    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", hung_up)
            assert qlora("train", job_recipe).code == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_ctrl_c_before_the_first_step_writes_nothing(
    job_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.jobs import train

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "build_state", interrupted)
        outcome = qlora("train", job_recipe)
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert_folder_is_usable(job_recipe)
