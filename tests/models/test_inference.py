"""Prepared generation changes no logit; with a cache the logits are those of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_cli.events import Silent
from qlora_cli.models import inference
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.inference import prepare_generation
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.switch import BASE, OWN, AdapterSwitch
from qlora_cli.nn.quant import QuantLinear
from qlora_cli.runs.open import open_for_adapters, open_model, open_run
from qlora_cli.runs.run import Run
from qlora_cli.units import format_bytes
from tests.helpers.families import MODEL_TYPES
from tests.helpers.observers import NoteRecorder
from tests.helpers.runs import CPU, logits, make_base, make_recipe, make_rows, make_run

PROMPTS = [[5], [80, 91, 7, 33, 250, 5, 6], list(range(3, 40))]
CONTEXT = 64
"""Positions of the small models."""


@torch.no_grad()
def cached_logits(loaded: LoadedModel, ids: list[int], prompt: int) -> Tensor:
    """Return the logits (T, V): of the first `prompt` tokens at once, of the others one by one."""
    out = loaded.model(torch.tensor([ids[:prompt]]), use_cache=True)
    rows, cache = [out.logits[0]], out.past_key_values
    for token in ids[prompt:]:
        out = loaded.model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        rows.append(out.logits[0])
        cache = out.past_key_values
    return torch.cat(rows).float()


def linears(loaded: LoadedModel) -> list[QuantLinear]:
    return [module for module in loaded.model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("bits", [4, 16])
def test_prepared_generation_gives_the_logits_of_training(
    family: str, bits: int, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family)
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"), base={"bits": bits})
    run, trained = make_run(tmp_path / "run", recipe, spread=0.1)
    opened = open_run(Run(run.path), CPU, Silent())
    prepare_generation(opened, CPU, Silent())
    for prompt in PROMPTS:
        ids = [*prompt, *(3 + 11 * step % 250 for step in range(CONTEXT - len(prompt)))]
        wanted = logits(trained, torch.tensor([ids]))
        assert torch.equal(logits(opened, torch.tensor([ids])), wanted)
        # A matrix product of one row adds in another order than one of many rows.
        found = cached_logits(opened, ids, len(prompt))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-4)
        assert torch.equal(found.argmax(dim=1), wanted.argmax(dim=1))


def test_a_cache_that_misses_a_token_is_detected(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"))
    _, trained = make_run(tmp_path / "run", recipe)
    trained.model.config.use_cache = True
    ids = [5, 80, 91, 7, 33, 250, 5, 6]
    wanted = logits(trained, torch.tensor([ids]))
    found = cached_logits(trained, [*ids[:3], *ids[4:]], 2)
    assert (found[-1] - wanted[-1]).abs().max() > 0.01


@pytest.mark.slow
def test_a_pretrained_model_over_its_whole_context(shared: Path) -> None:
    loaded = open_model(shared / "data" / "models" / "stories260K", CPU, Silent())
    length = loaded.config.max_position_embeddings
    ids = [1, *(3 + 37 * step % 500 for step in range(length - 1))]
    torch.testing.assert_close(
        cached_logits(loaded, ids, 20), logits(loaded, torch.tensor([ids])), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(("bits", "kept"), [(4, True), (8, False), (16, True)])
def test_weights_are_kept_in_the_compute_dtype(bits: int, kept: bool, tmp_path: Path) -> None:
    """Except for the codes of LLM.int8(); the head has 16 bits in any case."""
    base = make_base(tmp_path / "base", "llama")
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"), base={"bits": bits})
    run, _ = make_run(tmp_path / "run", recipe)
    opened, notes = open_run(Run(run.path), CPU, Silent()), NoteRecorder()
    wanted = {linear: linear.dequantize() for linear in linears(opened)}
    prepare_generation(opened, CPU, notes)
    copies = {linear for linear in wanted if linear.dequantize() is linear.dequantize()}
    assert copies == {linear for linear in wanted if kept or linear is opened.head}
    assert all(torch.equal(linear.dequantize(), weight) for linear, weight in wanted.items())
    size = format_bytes(sum(4 * wanted[linear].numel() for linear in copies))
    assert notes.notes == [f"the weights are also kept in float32, which needs {size} more memory"]


def test_copies_that_do_not_fit_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", "llama")
    run, _ = make_run(tmp_path / "run", make_recipe(base, make_rows(tmp_path / "rows.jsonl")))
    opened, notes = open_run(Run(run.path), CPU, Silent()), NoteRecorder()
    monkeypatch.setattr(inference, "fits", lambda *_: False)
    prepare_generation(opened, CPU, notes)
    assert all(linear.dequantize() is not linear.dequantize() for linear in linears(opened))
    assert "every token dequantizes the weights again" in notes.notes[0]


def test_merging_renews_the_copies(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"), base={"bits": 16})
    run, _ = make_run(tmp_path / "run", recipe, spread=0.1)
    ids = torch.tensor([PROMPTS[1]])
    found = []
    for prepares in (False, True):
        opened = open_for_adapters(str(run.path), CPU, Silent())
        source = open_source(opened.weights, opened.loaded.family)
        switch = AdapterSwitch(opened.loaded, source, merged=True)
        if prepares:
            prepare_generation(opened.loaded, CPU, Silent())
        for name in (OWN, BASE, OWN):
            switch.use(name)
            found.append(logits(opened.loaded, ids))
    assert not torch.equal(found[0], found[1])
    for plain, prepared in zip(found[:3], found[3:], strict=True):
        assert torch.equal(prepared, plain)
