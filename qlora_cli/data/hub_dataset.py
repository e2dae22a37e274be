"""Reads the rows of a dataset on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_cli.data.delimited import Item
from qlora_cli.errors import InputError
from qlora_cli.files.hub import NO_SPACE_HINT, is_full_disk


def read_hub(name: str, split: str) -> Iterator[Item]:
    """Yield the rows of a split of a hub dataset.

    name: `owner/name`. Raises InputError if the dataset or split cannot be loaded.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
        yield from enumerate((dict(fields) for fields in rows), 1)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, ImportError) as error:
        summary = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name!r} is not a local file, and its split {split!r} cannot be loaded from the hub: "
            f"{summary}",
            hint=_hub_hint(error),
        ) from error


def _hub_hint(error: Exception) -> str:
    """Return what to do about a dataset that the hub's library cannot load."""
    from huggingface_hub import constants

    if is_full_disk(error):
        return NO_SPACE_HINT
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or name a local file"
    return (
        "check the name, the split (owner/name:split) and the network; log in for a gated dataset "
        "(`hf auth login`)"
    )
