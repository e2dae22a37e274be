"""`qlora quickstart`: every job once on the embedded base, offline.

Plans, trains, merges and verifies, and generates text for the same prompts before and after
training.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from qlora_cli.data.rows import read_rows
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.files.atomic import PARSE_ERRORS, partial_folders, report_write_errors, write_json
from qlora_cli.files.locate import STARTER
from qlora_cli.jobs import merge, plan, train, verify
from qlora_cli.jobs.open_generator import open_generator
from qlora_cli.jobs.results import QuickstartResult
from qlora_cli.jobs.text_generator import Sampling
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.shipped import find_recipe
from qlora_cli.runs.layout import RunFolder

RECIPE = "starter"
HELD_OUT = "starter:held_out"
NUM_SAMPLES = 2
SAMPLE_TOKENS = 60
_RUN, _MERGED = "run", "merged"
_FILE_LIST = ".qlora-quickstart.json"
"""File in the quickstart's folder that lists the files which the quickstart created."""


def run(*, out: Path, observer: Observer, force: bool = False) -> QuickstartResult:
    """Run every job in the folder `out` and replace the files of an earlier quickstart.

    force: replace the folders `run` and `merged` even if they contain other files. Raises
    UsageError if `out` contains other files and `force` is not set.
    """
    if force:
        _remove_folders(out)
    else:
        _remove_earlier_files(out)
    with report_write_errors("the quickstart's folder", out, hint="name another folder with --out"):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / _FILE_LIST, {"files": []})
    try:
        return _run_jobs(out, observer)
    finally:
        # Without the list, a later quickstart refuses the folder. No file is lost.
        with suppress(OSError):
            write_json(out / _FILE_LIST, {"files": sorted(_own_files(out))})


def _run_jobs(out: Path, observer: Observer) -> QuickstartResult:
    recipe = load_recipe(find_recipe(RECIPE), [f"output={out / _RUN}"])
    planned = plan.run(recipe, device_profile=None, fit=False, compare=True)
    before = _samples(STARTER, observer)
    # The starter's rows are plain prompts on purpose.
    accepted = ("outside-template",)
    trained = train.run(recipe, recipe_path=None, resume=False, observer=observer, allow=accepted)
    assert trained.eval_loss is not None
    assert trained.eval_loss_before is not None
    merged = merge.run(trained.run, out=out / _MERGED, dtype=None, base="auto", observer=observer)
    verified = verify.run(merged.out, against=trained.run, observer=observer)
    after = _samples(str(merged.out), observer)
    return QuickstartResult(
        plan=planned,
        train=trained,
        merge=merged,
        verify=verified,
        loss_before=trained.eval_loss_before,
        loss_after=trained.eval_loss,
        samples=tuple((prompt, before[prompt], after[prompt]) for prompt in before),
    )


def _samples(model: str, observer: Observer) -> dict[str, str]:
    """Return held-out prompt -> text that the model generates for it, greedily.

    model: a model folder or `starter`.
    """
    generator = open_generator(model, observer)
    prompts = [row.fields["prompt"] for row in read_rows(HELD_OUT, limit=NUM_SAMPLES)]
    return {
        prompt: generator.continue_from(
            generator.tokenizer(prompt)["input_ids"], Sampling(SAMPLE_TOKENS)
        ).strip()
        for prompt in prompts
    }


def _remove_earlier_files(out: Path) -> None:
    """Remove the files of an earlier quickstart. Raises UsageError if `out` has any other file."""
    own, present = _listed_files(out), _files(out)
    foreign = sorted(present - own)
    if foreign:
        raise UsageError(
            f"{out} contains {foreign[0]}, which no finished quickstart created",
            where="--out",
            hint=f"name another folder, or use --force to replace {out / _RUN} and {out / _MERGED}",
        )
    for name in present & own:
        (out / name).unlink()
    for folder in _folders(out):
        for subfolder, _, _ in os.walk(folder, topdown=False):
            Path(subfolder).rmdir()


def _remove_folders(out: Path) -> None:
    """Remove the folders that a quickstart creates, with everything in them."""
    for path in _folders(out):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _folders(out: Path) -> list[Path]:
    """Return the folders of a quickstart: the run, the merged model, and incomplete merges."""
    return [out / _RUN, out / _MERGED, *partial_folders(out / _MERGED)]


def _files(out: Path) -> set[str]:
    """Return all files below `out` as relative paths. A link to a folder counts as a file."""
    paths = set()
    for parent, folders, files in os.walk(out):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        paths |= {Path(parent, name).relative_to(out).as_posix() for name in (*files, *links)}
    return paths


def _own_files(out: Path) -> set[str]:
    """Return the files in the quickstart's folders, and the report, which is written later."""
    prefixes = tuple(f"{path.relative_to(out).as_posix()}/" for path in _folders(out))
    run = RunFolder(Path(_RUN))
    pages = {run.report.as_posix(), run.memory_png.as_posix()}
    return pages | {name for name in _files(out) if name.startswith(prefixes)}


def _listed_files(out: Path) -> set[str]:
    """Return the files that an earlier quickstart listed, and the list; empty without a list."""
    try:
        return {_FILE_LIST, *json.loads((out / _FILE_LIST).read_text())["files"]}
    except (OSError, *PARSE_ERRORS):
        return set()
