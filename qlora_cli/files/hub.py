"""Downloads files of a model from the Hugging Face Hub, or finds them in the hub's cache.

Every error of the hub's library becomes one `ModelError` that names the cause.
"""

from __future__ import annotations

import difflib
import errno
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.files.paths import user_path

_WHERE = "model.name"
_GATED_OWNERS = ("meta-llama", "mistralai", "google")
"""Owners whose models on the hub require that their license is accepted."""

_REFUSED = (401, 403)
"""HTTP status codes for a token that is not valid or has no access."""
NO_SPACE_HINT = "free space there, or set HF_HOME to a folder on another disk"


def download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Return the folder with the files of a hub model that match `patterns`.

    name: a hub id. revision: branch, tag or commit; None for the default. Files in the hub's cache
    are not downloaded again. Raises ModelError if `name` is no hub id or the hub does not provide
    the files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise _no_folder(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as fault:
        raise ModelError(
            f"{name!r} is neither a folder nor a hub id",
            where=_WHERE,
            hint="a hub id is written as owner/name; " + (_similar_folders(name) or "see hf.co"),
        ) from fault
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        raise _hub_error(name, revision, fault) from fault


def _hub_error(name: str, revision: str | None, fault: Exception) -> ModelError:
    """Return the error for a failed download, by the class of the hub library's error."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(fault, GatedRepoError):
        what = f"{name!r} is a gated model, and this account has no access to it"
        hint = gated_hint(name)
    elif isinstance(fault, RevisionNotFoundError):
        what = f"{name!r} has no revision {revision or 'main'!r}"
        hint = f"branches and tags: https://huggingface.co/{name}/tree/main"
        return ModelError(what, where="model.revision", hint=hint)
    elif isinstance(fault, RepositoryNotFoundError):
        what = f"{name!r} is not a folder, and the hub has no such model, or it is private"
        hint = "check the name; for a private model, log in with `hf auth login`"
    elif isinstance(fault, HfHubHTTPError):
        what = f"the hub does not provide {name!r}: {_first_line(fault)}"
        hint = "try again later, or name a folder"
        if getattr(getattr(fault, "response", None), "status_code", None) in _REFUSED:
            hint = "the hub refuses the token: log in again with `hf auth login`, or unset HF_TOKEN"
    elif isinstance(fault, LocalEntryNotFoundError):
        what, hint = _unreachable(name)
    else:
        what, hint = _cannot_store(name, fault)
    similar = _similar_folders(name)
    return ModelError(what, where=_WHERE, hint=f"{similar}; {hint}" if similar else hint)


def is_gated(name: str) -> bool:
    """Return whether a hub id is of an owner of gated models. No network is used."""
    return name.partition("/")[0] in _GATED_OWNERS


def gated_hint(name: str) -> str:
    """Return what to do to get access to a gated model."""
    return (
        f"accept its license at https://huggingface.co/{name}, then log in with `hf auth login`, "
        "or set HF_TOKEN"
    )


def _unreachable(name: str) -> tuple[str, str]:
    """Return message and hint for a model that is not in the cache while the hub is unreachable."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return (
            f"{name!r} is not a folder and not in the hub's cache, and HF_HUB_OFFLINE is set, so "
            "nothing is downloaded",
            f"unset HF_HUB_OFFLINE, or name a folder; the cache is {constants.HF_HUB_CACHE}",
        )
    return (
        f"{name!r} is not a folder and not in the hub's cache, and the hub cannot be reached",
        f"check the network, or name a folder; the cache is {constants.HF_HUB_CACHE}",
    )


def _cannot_store(name: str, fault: Exception) -> tuple[str, str]:
    """Return message and hint for an error of the file system or of the connection."""
    from huggingface_hub import constants

    if is_full_disk(fault):
        return f"no space left to download {name!r} into {constants.HF_HUB_CACHE}", NO_SPACE_HINT
    what = f"{name!r} cannot be downloaded: {_first_line(fault)}"
    return what, f"check the network and the hub's cache, {constants.HF_HUB_CACHE}"


def is_full_disk(fault: Exception) -> bool:
    """Return whether an error means that the disk or the user's share of it is full."""
    return getattr(fault, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def _first_line(fault: Exception) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]


def _no_folder(name: str) -> ModelError:
    parent = user_path(name).parent
    hint = _similar_folders(name)
    if not parent.is_dir():
        hint = f"{parent} is not a folder either"
    return ModelError(f"no folder {name}", where=_WHERE, hint=hint)


def _similar_folders(name: str) -> str | None:
    """Return a hint with folders of a similar name, or None if there are none."""
    path = user_path(name)
    if not path.parent.is_dir():
        return None
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    similar = difflib.get_close_matches(path.name, names, n=3)
    if not similar:
        return None
    return f"did you mean the folder {', '.join(str(path.parent / match) for match in similar)}?"
