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
    from qlora_cli.jobs import train

    small = dataclasses.replace(inspect_device(), capacity_bytes=1000)
    with monkeypatch.context() as patch:
        patch.setattr(train, "inspect_device", lambda: small)
        assert_refused(qlora("train", job_recipe), 3, "the job needs", "has 1000 B", "qlora plan")
    assert_folder_is_usable(job_recipe)


def test_ctrl_c_exits_130_and_writes_a_checkpoint(
    job_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.train import loop

    real = loop.train_step

    def interrupted(state: Any, *rest: Any) -> Any:
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
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
