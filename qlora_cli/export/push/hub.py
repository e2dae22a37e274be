"""Upload files to the Hugging Face Hub, or write them into a folder instead."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.errors import QloraError, UsageError
from qlora_cli.export.push.contents import UploadContents
from qlora_cli.files.atomic import atomic_folder, report_write_errors

CARD = "README.md"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_COPIED_BYTES = 2**20
"""Larger files are linked in a dry run and not copied."""


def check_repo(repo: str) -> None:
    """Raise UsageError if `repo` is not `owner/name`."""
    if not _REPO.fullmatch(repo):
        raise UsageError(
            f"{repo!r} is not the name of a repository", where="REPO", hint="write owner/name"
        )


def write_preview(contents: UploadContents, card: str, folder: Path) -> None:
    """Write what would be uploaded into a new folder. Large files become symbolic links.

    Raises UsageError if `folder` contains files, QloraError if it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is in use", where="--out", hint="name another folder")
    with report_write_errors("the files to upload", folder), atomic_folder(folder) as partial:
        for path in contents.files:
            source, target = (contents.folder / path).resolve(), partial / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in contents.replaced:
                target.write_bytes(contents.replaced[path])
            elif source.stat().st_size > _MAX_COPIED_BYTES:
                target.symlink_to(source)
            else:
                shutil.copyfile(source, target)
        (partial / CARD).write_text(card)


def upload(contents: UploadContents, card: str, repo: str, *, private: bool) -> str:
    """Create the repository if it is new, upload all files in one commit and return its URL.

    private: whether a new repository is private; an existing one keeps its visibility.

    Raises QloraError if the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [
        CommitOperationAdd(
            path.as_posix(), contents.replaced.get(path, str(contents.folder / path))
        )
        for path in contents.files
    ]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    with _report_hub_errors(repo):
        api = HfApi(library_name="qlora-cli")
        url: Any = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message="Upload with qlora push")
    return str(url)


@contextmanager
def _report_hub_errors(repo: str) -> Iterator[None]:
    """Convert the errors of huggingface_hub into a QloraError."""
    from huggingface_hub.errors import HfHubHTTPError

    # The bases include the error of the HTTP client, whose package depends on the hub's version.
    errors: tuple[Any, ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)
    try:
        yield
    except errors as fault:
        lines = str(fault).strip().splitlines() or [type(fault).__name__]
        raise QloraError(
            f"the upload to {repo} failed: {lines[0]}",
            hint="log in with `hf auth login` or set HF_TOKEN to a token that may write; check the "
            "network; --dry-run writes the files into a folder instead",
        ) from fault
