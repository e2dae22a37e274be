"""Errors of the hub's library become one error with the cause and what to do."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from qlora_cli.errors import ModelError
from qlora_cli.files.hub import download
from tests.helpers.cli_helpers import qlora

NAME = "owner/model"


def failure(kind: type[Exception]) -> Exception:
    """Return an error of the hub's library, which otherwise needs an HTTP response."""
    fault = kind.__new__(kind)
    Exception.__init__(fault, "the hub's words\nmore words")
    return fault


def refused(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, name: str = NAME, revision: str | None = None
) -> ModelError:
    """Return the error of a download that fails with `fault`."""

    def fail(*_: Any, **__: Any) -> str:
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError) as caught:
        download(name, revision, ["*.json"])
    assert "\n" not in caught.value.what
    return caught.value


def test_a_gated_model_names_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, failure(errors.GatedRepoError))
    assert "is a gated model" in error.what
    assert error.hint
    assert f"https://huggingface.co/{NAME}" in error.hint
    assert "hf auth login" in error.hint


def test_an_unknown_model_and_an_unknown_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, failure(errors.RepositoryNotFoundError))
    assert "the hub has no such model" in error.what
    error = refused(monkeypatch, failure(errors.RevisionNotFoundError), revision="v9")
    assert error.what == "'owner/model' has no revision 'v9'"
    assert error.where == "model.revision"


def test_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error = refused(monkeypatch, failure(errors.LocalEntryNotFoundError))
    assert "the hub cannot be reached" in error.what
    assert str(constants.HF_HUB_CACHE) in str(error.hint)


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(monkeypatch, failure(errors.LocalEntryNotFoundError))
    assert "HF_HUB_OFFLINE is set" in error.what
    assert "unset HF_HUB_OFFLINE" in str(error.hint)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert "no space left to download" in error.what
    assert "HF_HOME" in str(error.hint)


@pytest.mark.parametrize(("status", "hint"), [(401, "hf auth login"), (500, "try again later")])
def test_an_http_error_names_the_status_and_what_to_do(
    status: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = failure(errors.HfHubHTTPError)
    vars(fault)["response"] = SimpleNamespace(status_code=status)
    error = refused(monkeypatch, fault)
    assert error.what == f"the hub does not provide {NAME!r}: the hub's words"
    assert hint in str(error.hint)


def test_another_error_of_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(monkeypatch, ConnectionResetError(errno.ECONNRESET, "Connection reset"))
    assert "cannot be downloaded" in error.what
    assert "Connection reset" in error.what
    assert "check the network" in str(error.hint)


def test_the_command_prints_one_line_and_a_hint_in_offline_mode() -> None:
    """The tests set HF_HUB_OFFLINE, so this is the hub's own library."""
    outcome = qlora("plan", "starter", "model.name=owner/absent-model")
    assert outcome.code == 2
    message, hint = outcome.err.strip().splitlines()[-2:]
    assert message.startswith("error: model.name: 'owner/absent-model' is not a folder")
    assert "HF_HUB_OFFLINE is set, so nothing is downloaded" in message
    assert "unset HF_HUB_OFFLINE" in hint
    outcome = qlora("data", "starter", "data.train=owner/absent-data")
    assert outcome.code == 2
    message, hint = outcome.err.strip().splitlines()[-2:]
    assert message.startswith("error: data.train: 'owner/absent-data' is not a local file")
    assert "HF_HUB_OFFLINE is set" in hint


@pytest.mark.parametrize("name", ["models/", "./models", "a/b/c", "not a name"])
def test_a_missing_folder_is_not_looked_up(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        download(name, None, ["*.json"])
    assert "Repo id" not in str(caught.value)
    assert "folder" in caught.value.what


def test_a_similar_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models" / "smollm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    error = refused(monkeypatch, failure(errors.LocalEntryNotFoundError), "models/smolm")
    assert "did you mean the folder models/smollm?" in str(error.hint)
