"""`qlora push`: upload a merged model or an adapter to the Hugging Face Hub with a model card."""

from __future__ import annotations

from pathlib import Path

from qlora_cli.events import Observer
from qlora_cli.export.push.card import license_of, model_card
from qlora_cli.export.push.contents import UploadContents, select_contents
from qlora_cli.export.push.hub import CARD, check_repo, upload, write_preview
from qlora_cli.jobs.results import PushResult


def run(
    target: Path,
    repo: str,
    *,
    private: bool,
    preview: Path | None,
    unverified: bool,
    observer: Observer,
) -> PushResult:
    """Upload a run's adapter or a merged model.

    target: folder of a run or of a merged model. repo: `owner/name` on the hub. private: whether a
    new repository is private. preview: write the files into this folder and upload nothing; None to
    upload. unverified: True to upload a merged model without a passed verification.

    Raises UsageError if the arguments are wrong or the merge was not verified, QloraError if the
    upload fails.
    """
    check_repo(repo)
    contents = select_contents(target, unverified=unverified)
    _describe(contents, observer)
    card = model_card(contents, repo)
    files = (*(path.as_posix() for path in contents.files), CARD)
    observer.note(f"{'to send' if preview is not None else 'sending'}: {', '.join(files)}")
    url = None
    if preview is not None:
        write_preview(contents, card, preview)
    else:
        url = upload(contents, card, repo, private=private)
    sizes = [contents.num_bytes(path) for path in contents.files]
    return PushResult(
        repo=repo,
        url=url,
        folder=preview,
        files=files,
        bytes=sum(sizes) + len(card.encode()),
        verified=bool(contents.verification and contents.verification.get("passed")),
    )


def _describe(contents: UploadContents, observer: Observer) -> None:
    """Report what is sent, what is changed in it and which license the model card states."""
    observer.note(f"the files are those in {contents.folder}")
    if contents.run is None:
        observer.note("the run of this model is not known, so the model card has no recipe")
    for path in contents.replaced:
        observer.note(f"{path} is sent with the name of the base's folder in place of its path")
    if (license := license_of(contents)) == "unknown":
        observer.note("the license of the base is not known: the model card states `unknown`")
    else:
        observer.note(f"the model card states the base's license, {license}")
