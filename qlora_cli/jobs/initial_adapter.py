"""What a job reads from an existing adapter before it trains: `adapter.from`, `adapter.init`."""

from __future__ import annotations

from pathlib import Path

from qlora_cli.adapters.peft_file import AdapterFile, open_adapter
from qlora_cli.errors import InputError, UsageError
from qlora_cli.events import Observer
from qlora_cli.files.paths import user_path
from qlora_cli.files.source import fingerprint
from qlora_cli.jobs.prepare import Prepared
from qlora_cli.models.attach import load_adapter
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import ADAPTER
from qlora_cli.runs.run import Run
from qlora_cli.train.state import State

_HINT = (
    "adapter.from needs the same adapter.targets, rank, alpha and dtype; for other settings merge "
    "the adapter first (`qlora merge`) and train the merged model"
)


def check_initial_adapter(prepared: Prepared) -> None:
    """Raise InputError if the recipe starts from an adapter that does not exist.

    The base of a run must be the base of the job.
    """
    where = prepared.recipe.adapter.from_
    if where is None:
        return
    _open(where)
    run = Run.find(where)
    stored = run.record.get("base_fingerprint") if run is not None else None
    if run is not None and stored is not None and stored != fingerprint(prepared.folder, stored):
        raise UsageError(
            f"{where} was trained on another base ({run.recipe.model.name})",
            where="adapter.from",
            hint="an adapter works only on the base that it was trained on",
        )


def load_initial_adapter(prepared: Prepared, state: State, observer: Observer) -> None:
    """Read the adapter that the recipe starts from into `state`; do nothing if there is none.

    Raises UsageError if its layers, rank, scaling or dtype are not those of the recipe.
    """
    where = prepared.recipe.adapter.from_
    if where is None:
        return
    folder = _open(where).folder
    try:
        load_adapter(state.loaded, folder)
    except InputError as fault:
        raise UsageError(
            f"cannot start from {where}: {fault.what}", where="adapter.from", hint=_HINT
        ) from fault
    observer.note(f"adapter.from: starting with the adapter in {folder}")


def initial_factors_in(checkpoint: Path | None, recipe: Recipe) -> AdapterFile | None:
    """Return the adapter in a checkpoint if it has the factors of `adapter.init`, else None.

    A resumed job reads them, so that its base is that of the job before.
    """
    if checkpoint is None or not recipe.adapter.is_initialized:
        return None
    return open_adapter(checkpoint / ADAPTER)


def _open(where: str) -> AdapterFile:
    run = Run.find(where)
    folder = user_path(where)
    if run is None and not folder.is_dir():
        raise UsageError(
            f"there is no folder {where}",
            where="adapter.from",
            hint="name a run's folder, one of its checkpoints or an adapter's folder",
        )
    return run.adapter_file if run is not None else open_adapter(folder)
