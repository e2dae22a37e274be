"""`qlora quickstart`: the whole way on the embedded base, offline.

Plan, train, report, merge, verify, and the same prompts before and after.
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
from qlora_cli.jobs import evaluate, generate, merge, plan, train, verify
from qlora_cli.jobs.results import QuickstartResult
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.shipped import find_recipe
from qlora_cli.runs.layout import RunFolder

RECIPE = "starter"
HELD_OUT = "starter:held_out"
NUM_SAMPLES = 2
SAMPLE_TOKENS = 60
_RUN, _MERGED = "run", "merged"
_MADE = ".qlora-quickstart.json"
"""The quickstart's mark in its folder: which files in it a quickstart made."""


def run(*, out: Path, observer: Observer, force: bool = False) -> QuickstartResult:
    """Runs every job in `out`; what an earlier quickstart left there is replaced.

    force: replace the folders `run` and `merged` also where they hold other files. Raises
    UsageError where `out` holds other files and `force` is not set.
    """
    if force:
        _remove(out)
    else:
        _clear(out)
    with report_write_errors("the quickstart's folder", out, hint="name another folder with --out"):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / _MADE, {"files": []})
    try:
        return _work(out, observer)
    finally:
        # Without the list a later quickstart refuses the folder, which loses nothing.
        with suppress(OSError):
            write_json(out / _MADE, {"files": sorted(_made_now(out))})


def _work(out: Path, observer: Observer) -> QuickstartResult:
    recipe = load_recipe(find_recipe(RECIPE), [f"output={out / _RUN}"])
    planned = plan.run(recipe, device_profile=None, fit=False, compare=True)
    before = _samples(STARTER, observer)
    loss_before = evaluate.run(STARTER, data=HELD_OUT, observer=observer).loss
    trained = train.run(recipe, recipe_path=None, resume=False, observer=observer)
    assert trained.eval_loss is not None
    made = merge.run(trained.run, out=out / _MERGED, dtype=None, base="auto", observer=observer)
    verified = verify.run(made.out, against=trained.run, observer=observer)
    after = _samples(str(made.out), observer)
    return QuickstartResult(
        plan=planned,
        train=trained,
        merge=made,
        verify=verified,
        loss_before=loss_before,
        loss_after=trained.eval_loss,
        samples=tuple((prompt, before[prompt], after[prompt]) for prompt in before),
    )


def _samples(where: str, observer: Observer) -> dict[str, str]:
    """Held-out prompts and what the model makes of them."""
    generator = generate.open_generator(where, observer)
    prompts = [row.fields["prompt"] for row in read_rows(HELD_OUT, limit=NUM_SAMPLES)]
    return {
        prompt: generator.continue_from(
            generator.tokenizer(prompt)["input_ids"], SAMPLE_TOKENS, temperature=0.0
        ).strip()
        for prompt in prompts
    }


def _clear(out: Path) -> None:
    """Removes an earlier quickstart. Raises UsageError where `out` holds any other file."""
    made, found = _made_before(out), _files(out)
    foreign = sorted(found - made)
    if foreign:
        raise UsageError(
            f"{out} holds {foreign[0]}, which is not the file of a finished quickstart",
            where="--out",
            hint=f"name another folder, or replace {out / _RUN} and {out / _MERGED} with --force",
        )
    for name in found & made:
        (out / name).unlink()
    for folder in _folders(out):
        for place, _, _ in os.walk(folder, topdown=False):
            Path(place).rmdir()


def _remove(out: Path) -> None:
    """Removes the folders that a quickstart makes, whatever lies in them."""
    for path in _folders(out):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _folders(out: Path) -> list[Path]:
    """Where a quickstart writes: the run, the merged model, and a merge that was stopped."""
    return [out / _RUN, out / _MERGED, *partial_folders(out / _MERGED)]


def _files(out: Path) -> set[str]:
    """All that lies in `out` and is no folder, as paths within it. A link is no folder."""
    found = set()
    for place, folders, files in os.walk(out):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found |= {Path(place, name).relative_to(out).as_posix() for name in (*files, *links)}
    return found


def _made_now(out: Path) -> set[str]:
    """What lies in the quickstart's folders, and the report, which is written after the jobs."""
    module_scope = tuple(f"{path.relative_to(out).as_posix()}/" for path in _folders(out))
    run = RunFolder(Path(_RUN))
    pages = {run.report.as_posix(), run.memory_png.as_posix()}
    return pages | {name for name in _files(out) if name.startswith(module_scope)}


def _made_before(out: Path) -> set[str]:
    """What an earlier quickstart listed, with the list itself; empty where there is none."""
    try:
        return {_MADE, *json.loads((out / _MADE).read_text())["files"]}
    except (OSError, *PARSE_ERRORS):
        return set()
