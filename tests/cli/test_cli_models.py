"""`qlora models`: the list, and the proof of one model type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.cli_helpers import qlora


def test_models_lists_the_tested_types() -> None:
    outcome = qlora("models")
    assert outcome.code == 0
    assert "llama" in outcome.out
    assert "NAME_OR_FOLDER" in outcome.out


@pytest.mark.slow
def test_a_config_is_proved(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "olmo2"}))
    outcome = qlora("models", config, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    (model_type,) = result["types"]
    assert (model_type["model_type"], model_type["state"]) == ("olmo2", "proved")
    assert result["roles"] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert all(law["holds"] for law in result["laws"])
    text = qlora("models", config).out
    assert "at most 1e-05" in text
    assert "It can be trained. Roles for adapter.targets: q, k, v, o, gate, up, down" in text


@pytest.mark.slow
def test_an_encoder_is_proved_as_a_classifier(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "electra"}))
    result = qlora("models", config, "--json").json
    (model_type,) = result["types"]
    assert model_type["state"] == "proved"
    assert model_type["detail"].endswith("for task: classification")
    assert result["roles"] == ["q", "k", "v", "o", "up", "down"]


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    outcome = qlora("models", tmp_path / "none.json")
    assert outcome.code == 2
    assert "no file" in outcome.err
