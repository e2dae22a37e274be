"""Real data on real small bases, through the command line: train, merge, verify, eval.

Each test states the loss that it requires, and the loss that was measured on a CPU with torch
2.13.0. The merged model's loss may differ by 15 %: `auto` merges into the original base, but the
adapter was trained on the quantized base (measured: 8 % on stories260K, 3 % on the starter base).
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_cli.events import Silent
from qlora_cli.runs.open import open_run
from qlora_cli.runs.run import Run
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow

RECIPE = """\
model: {{name: {base}}}
adapter: {{targets: all, rank: 8}}
data: {{train: {train}, eval: {held_out}, seq_len: 512}}
train: {{steps: {steps}, grad_accum: 1, lr: {lr}}}
output: {folder}/run
"""
LEARNING_RATES = {"starter": 3e-3, "stories260K": 1e-2}
STEPS = 24


@pytest.fixture(params=sorted(LEARNING_RATES))
def base(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> Path | str:
    """Return the embedded base and a copy of stories260K, which has no chat template."""
    if request.param == "starter":
        return "starter"
    return shutil.copytree(shared / "data" / "models" / request.param, tmp_path / request.param)


def train_merge_and_evaluate(
    base: Path | str, rows: list[dict[str, Any]], folder: Path
) -> dict[str, float]:
    """Train on all rows except the last 16, merge and verify.

    Returns the loss on the last 16 rows of the base, the trained model and the merged model.
    """
    files = {"train": rows[:-16], "held_out": rows[-16:]}
    for name, part in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    held_out = folder / "held_out.jsonl"
    recipe = folder / "job.yaml"
    recipe.write_text(
        RECIPE.format(
            base=base,
            train=folder / "train.jsonl",
            held_out=held_out,
            steps=STEPS,
            lr=LEARNING_RATES[Path(base).name],
            folder=folder,
        )
    )
    run, merged = folder / "run", folder / "merged"
    for command in (
        ("train", recipe),
        ("merge", run, "--out", merged),
        ("verify", merged, "--against", run),
    ):
        outcome = qlora(*command)
        assert outcome.code == 0, outcome.err
    losses = {}
    for stage, where in (("before", base), ("trained", run), ("merged", merged)):
        outcome = qlora("eval", where, "--data", held_out, "--json")
        assert outcome.code == 0, outcome.err
        losses[stage] = outcome.json["loss"]
    return losses


def test_a_chat_fine_tune(base: Path | str, shared: Path, tmp_path: Path) -> None:
    """Required: at most half of the held-out loss before training (measured: 17 % and 10 %)."""
    content = (shared / "data/instruct/sharegpt_dummy/dummy_conversation.json").read_text()
    chats = [row for row in json.loads(content) if len(json.dumps(row)) < 600]
    random.Random(0).shuffle(chats)
    if base != "starter":
        rows = tmp_path / "chats.jsonl"
        rows.write_text(json.dumps(chats[0]))
        outcome = qlora("data", "chat", f"model.name={base}", f"data.train={rows}", "data.eval=")
        assert outcome.code == 2
        assert "set data.template" in outcome.err
        template = next((shared / "data/chat_templates").rglob("chatml.jinja"))
        shutil.copy(template, Path(base) / "chat_template.jinja")
    losses = train_merge_and_evaluate(base, chats[:116], tmp_path)
    assert losses["trained"] <= 0.5 * losses["before"], losses
    assert losses["merged"] == pytest.approx(losses["trained"], rel=0.15)


def test_an_e2e_fine_tune(base: Path | str, shared: Path, tmp_path: Path) -> None:
    """Required: at most 75 % of the held-out loss before training (measured: 64 % and 63 %)."""
    lines = (shared / "data/nlg/e2e/train.txt").read_text().splitlines()
    pairs = [line.split("||") for line in random.Random(0).sample(lines, 116)]
    rows = [{"prompt": f"{facts}\n", "completion": text.strip()} for facts, text in pairs]
    losses = train_merge_and_evaluate(base, rows, tmp_path)
    assert losses["trained"] <= 0.75 * losses["before"], losses
    assert losses["merged"] == pytest.approx(losses["trained"], rel=0.15)


# gpt_nano_sort is a small GPT-2 that sorts: its input is six symbols from 0, 1, 2, its output is
# the same symbols in ascending order.

LENGTH = 6
INPUTS = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))
SORT_RECIPE = """\
model: {{name: {base}}}
adapter: {{targets: all}}
data: {{train: {train}, seq_len: 352}}
train: {{steps: 250, grad_accum: 1, lr: 5.0e-3, warmup: 0.1, activation_checkpointing: false}}
output: {folder}/run
"""


def share_sorted(logits: Callable[[Tensor], Tensor], *, descending: bool) -> float:
    """Return the share of the 729 inputs for which the first five greedy outputs are sorted.

    The base has 11 positions: six inputs and five outputs. A training row therefore ends with the
    fifth output, and the sixth is never trained.
    """
    ids = INPUTS
    for _ in range(LENGTH - 1):
        with torch.no_grad():
            ids = torch.cat([ids, logits(ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    expected = INPUTS.sort(dim=1, descending=descending).values[:, : LENGTH - 1]
    return (ids[:, LENGTH:] == expected).all(dim=1).double().mean().item()


def transformers_logits(folder: Path) -> Callable[[Tensor], Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda ids: model(ids).logits  # type: ignore[no-any-return]


def test_gpt2_learns_to_sort_in_descending_order(shared: Path, tmp_path: Path) -> None:
    """Train on 500 of the 729 inputs and test on all of them.

    Required: 99 % correct unmerged and merged into the dequantized base (measured: 100 %; other
    machines may round differently). Merged into the original base: 90 % (measured: 99.7 %), because
    the adapter was trained on the quantized base, and with a width of 48 the rounding errors of NF4
    do not average out.
    """
    base = shared / "data" / "models" / "gpt_nano_sort"
    rows = [[*row, *sorted(row, reverse=True)[:-1]] for row in INPUTS.tolist()]
    chosen = random.Random(0).sample(rows, 500)
    train = tmp_path / "train.jsonl"
    train.write_text(
        "".join(
            json.dumps({"input_ids": ids, "labels": [-100] * LENGTH + ids[LENGTH:]}) + "\n"
            for ids in chosen
        )
    )
    recipe = tmp_path / "sort.yaml"
    recipe.write_text(SORT_RECIPE.format(base=base, train=train, folder=tmp_path))
    assert share_sorted(transformers_logits(base), descending=False) == 1.0
    outcome = qlora("train", recipe)
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    trained = open_run(Run(run), torch.device("cpu"), Silent()).model
    shares = {"unmerged": share_sorted(lambda ids: trained(ids).logits, descending=True)}
    for kind in ("original", "dequantized"):
        merged = tmp_path / kind
        outcome = qlora("merge", run, "--out", merged, "--base", kind)
        assert outcome.code == 0, outcome.err
        outcome = qlora("verify", merged, "--against", run)
        assert outcome.code == 0, outcome.err
        shares[kind] = share_sorted(transformers_logits(merged), descending=True)
    assert min(shares["unmerged"], shares["dequantized"]) >= 0.99, shares
    assert shares["original"] >= 0.9, shares
