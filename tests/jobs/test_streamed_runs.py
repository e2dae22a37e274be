"""Runs whose blocks are in host memory or on disk: equal files and answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_cli.events import Silent
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.open import open_any
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import assert_same_run, make_bases, recipe_of
from tests.helpers.runs import CPU

pytestmark = pytest.mark.slow
RESIDENCIES = ("device", "host", "disk")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    folder = tmp_path_factory.mktemp("runs")
    bases = make_bases(folder, "llama")
    train = {"activation_checkpointing": True}
    return {
        residency: train_run(
            recipe_of(bases, folder / residency, base={"residency": residency}, train=train)
        )
        for residency in RESIDENCIES
    }


@pytest.mark.parametrize("residency", RESIDENCIES[1:])
def test_the_run_is_equal(runs: dict[str, RunFolder], residency: str) -> None:
    assert_same_run(runs[residency], runs["device"])


@pytest.mark.parametrize("residency", RESIDENCIES[1:])
def test_the_answers_are_equal(runs: dict[str, RunFolder], residency: str) -> None:
    """Each adapter is read from its files, and attached to blocks without weights."""
    ids = torch.tensor([[1, 40, 30, 20, 50]])

    def logits(run: RunFolder) -> Tensor:
        loaded = open_any(str(run.path), CPU, Silent()).loaded
        assert (loaded.stream is not None) == (run is not runs["device"])
        with torch.inference_mode():
            found: Tensor = loaded.model(ids).logits
        return found

    assert torch.equal(logits(runs[residency]), logits(runs["device"]))


def test_run_json_states_where_the_weights_are(runs: dict[str, RunFolder]) -> None:
    text = "{} while the block does not compute"
    for residency, where in (("host", "in CPU memory"), ("disk", "on disk")):
        assert text.format(where) in str(runs[residency].read())
        assert text.format(where) not in str(runs["device"].read())
