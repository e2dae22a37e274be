"""`qlora quickstart`: the whole way on the embedded base, offline.

Plan, train, report, merge, verify, and the same prompts before and after.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora_cli.checkpoint.layout import RunFolder
from qlora_cli.data.formats import read_rows
from qlora_cli.errors import UsageError
from qlora_cli.events import Observer
from qlora_cli.jobs import evaluate, generate, merge, plan, train, verify
from qlora_cli.jobs.results import QuickstartResult
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.shipped import find_recipe
from qlora_cli.weights.locate import STARTER

RECIPE = "starter"
HELD_OUT = "starter:held_out"
NUM_SAMPLES = 2
SAMPLE_TOKENS = 60
_RUN, _MERGED = "run", "merged"


def run(*, out: Path, observer: Observer) -> QuickstartResult:
    """Goes the whole way in `out`; what an earlier quickstart left there is replaced.

    Raises UsageError where `out` holds anything else.
    """
    _clear(out)
    recipe = load_recipe(find_recipe(RECIPE), [f"output={out / _RUN}"])
    planned = plan.run(recipe, device_facts=None, fit=False, compare=True)
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
    speaker = generate.open_speaker(where, observer)
    prompts = [row.fields["prompt"] for row in read_rows(HELD_OUT, limit=NUM_SAMPLES)]
    return {
        prompt: speaker.continue_from(
            speaker.tokenizer(prompt)["input_ids"], SAMPLE_TOKENS, temperature=0.0
        ).strip()
        for prompt in prompts
    }


def _clear(out: Path) -> None:
    """Removes an earlier quickstart, and nothing else."""
    if not out.exists():
        return
    foreign = [entry.name for entry in out.iterdir() if entry.name not in (_RUN, _MERGED)]
    earlier = RunFolder(out / _RUN)
    if foreign or (earlier.path.exists() and not earlier.run_json.is_file()):
        raise UsageError(
            f"{out} holds other things than an earlier quickstart",
            where="--out",
            hint="name another folder",
        )
    for name in (_RUN, _MERGED):
        shutil.rmtree(out / name, ignore_errors=True)
