"""Prefix-tuning (`adapter.prefix`): PEFT reads what this package writes, and computes the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from qlora_cli.data.collate import collate
from qlora_cli.data.encode import Example
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import Silent
from qlora_cli.export.push.contents import select_contents
from qlora_cli.jobs import merge, verify, verify_server
from qlora_cli.jobs.open_generator import open_generator
from qlora_cli.models.attach import load_adapter, remove_adapter
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.prefix import MODEL_TYPES, block_prefixes
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.open import open_model, open_run
from qlora_cli.runs.run import Run
from qlora_cli.tasks.backbone import hidden_states
from tests.helpers.interrupted import train_run
from tests.helpers.observers import NoteRecorder
from tests.helpers.peft_helpers import (
    IDS,
    frozen_16_bit,
    load_into_peft,
    peft_logits,
    transformers_model,
)
from tests.helpers.resumed_runs import losses, make_bases, recipe_of
from tests.helpers.runs import CPU, build_base, logits, make_recipe, make_run
from tests.helpers.together import train_together
from tests.helpers.training import ROWS, make_state

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LENGTH = 5


def prefix_run(folder: Path, recipe: Any) -> tuple[RunFolder, LoadedModel]:
    """Write a run whose adapter and prefix have large random values."""
    run, loaded = make_run(folder, recipe, spread=0.05)
    torch.manual_seed(3)
    with torch.no_grad():
        for prefix in block_prefixes(loaded.model):
            prefix.key.normal_(std=2)
            prefix.value.normal_(std=2)
    save_adapter(loaded, recipe, run.adapter)
    return run, loaded


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_peft_computes_the_same_logits(family: str, tmp_path: Path) -> None:
    base, recipe = frozen_16_bit(tmp_path, family, prefix=LENGTH)
    run, loaded = prefix_run(tmp_path / "run", recipe)
    merged = load_into_peft(base, run.adapter).merge_and_unload()
    peft = PeftModel.from_pretrained(merged, run.adapter / "prefix")
    ours, theirs = logits(loaded, IDS), peft_logits(peft)
    without = peft_logits(peft.get_base_model())
    assert (ours - without).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("blocks", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_rows_have_the_gradients_of_single_rows(
    family: str, blocks: bool, tmp_path: Path
) -> None:
    sections = {"adapter": {"prefix": LENGTH}, "train": {"activation_checkpointing": blocks}}
    state = make_state(tmp_path, family, **sections)
    loaded = state.loaded

    def gradients(rows: list[list[Example]]) -> dict[str, torch.Tensor]:
        loaded.model.zero_grad()
        for row in rows:
            hidden_states(loaded, collate(row), CPU).square().sum().backward()
        return {n: p.grad.clone() for n, p in loaded.trainable().items() if p.grad is not None}

    packed, single = gradients([ROWS]), gradients([[row] for row in ROWS])
    assert packed.keys() == single.keys() == loaded.trainable().keys()
    for name, gradient in packed.items():
        scale = float(single[name].abs().max())
        torch.testing.assert_close(gradient, single[name], rtol=1e-4, atol=1e-4 * scale, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("residency", ["host", "disk"])
def test_a_streamed_base_gives_the_same_gradients(residency: str, tmp_path: Path) -> None:
    bases, found = make_bases(tmp_path, "llama"), []
    for place in ("device", residency):
        base, train = {"residency": place}, {"activation_checkpointing": 1}
        sections = {"base": base, "train": train, "adapter": {"prefix": LENGTH, "dropout": 0.2}}
        found.append(train_run(recipe_of(bases, tmp_path / place, **sections)))
    assert losses(found[0]) == losses(found[1])


@pytest.mark.slow
def test_two_processes_train_the_prefix_of_one(tmp_path: Path) -> None:
    bases = make_bases(tmp_path, "llama")
    sections = {"adapter": {"prefix": LENGTH}, "train": {"lr": 1e-3}}
    alone = train_run(recipe_of(bases, tmp_path / "alone", **sections))
    recipe = recipe_of(bases, tmp_path / "together", **sections)
    assert train_together(recipe) == [0, 0]
    files = [folder / "adapter" / "prefix" for folder in (alone.path, tmp_path / "together")]
    one, two = (load_file(file / "adapter_model.safetensors") for file in files)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def greedy(loaded: LoadedModel, num: int) -> list[int]:
    """Return the tokens after `IDS`, from forward passes without a cache."""
    ids = IDS
    for _ in range(num):
        ids = torch.cat([ids, logits(loaded, ids)[-1].argmax().view(1, 1)], dim=1)
    return ids[0].tolist()


@pytest.mark.slow
def test_merge_keeps_the_prefix_beside_the_model(tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, "llama", prefix=LENGTH)
    run, loaded = prefix_run(tmp_path / "run", recipe)
    out, notes = tmp_path / "merged", NoteRecorder()
    merge.run(run.path, out=out, dtype="float16", base="original", observer=notes)
    assert any("cannot be merged" in note for note in notes.notes)
    assert json.loads((out / "merge.json").read_text())["prefix"] == "prefix"
    assert verify.run(out, against=run.path, observer=Silent()).passed
    opened = open_run(Run(run.path), CPU, Silent())
    merged = open_model(out, CPU, Silent())
    wanted = logits(loaded, IDS)
    torch.testing.assert_close(logits(opened, IDS), wanted)
    torch.testing.assert_close(logits(merged, IDS), wanted, rtol=0, atol=0.1)
    generator = open_generator(str(out), Silent())
    generator.switch.use("base")
    generated = generator.opened.loaded
    torch.testing.assert_close(logits(generated, IDS), logits(merged, IDS))
    peft = PeftModel.from_pretrained(transformers_model(out), out / "prefix")
    torch.testing.assert_close(peft_logits(peft), logits(merged, IDS), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_verification_fails_with_another_prefix(tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, "llama", prefix=LENGTH)
    run, _ = prefix_run(tmp_path / "run", recipe)
    out = tmp_path / "merged"
    merge.run(run.path, out=out, dtype="float16", base="original", observer=Silent())
    file = out / "prefix" / "adapter_model.safetensors"
    values = load_file(file)["prompt_embeddings"]
    save_file({"prompt_embeddings": values.flip(0).contiguous() * 2}, file)
    faults = verify.run(out, against=run.path, observer=Silent()).faults
    assert any("prefix/adapter_model.safetensors differs" in fault for fault in faults)
    assert any("the predictions differ" in fault for fault in faults)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_cache_uses_the_prefix(family: str, tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, family, prefix=LENGTH)
    run, _ = prefix_run(tmp_path / "run", recipe)
    opened = open_run(Run(run.path), CPU, Silent())
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    output = opened.model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    assert output[0].tolist() == greedy(opened, 8)
    with_prefix = logits(opened, IDS)
    remove_adapter(opened)
    assert (with_prefix - logits(opened, IDS)).abs().max() > 0.1


def test_another_prefix_length_is_refused(tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, "llama", prefix=LENGTH)
    run, loaded = prefix_run(tmp_path / "run", recipe)
    other = build_base(recipe)
    load_adapter(other, run.adapter)
    torch.testing.assert_close(logits(other, IDS), logits(loaded, IDS))
    section = recipe.adapter.model_copy(update={"prefix": LENGTH + 1})
    longer = build_base(recipe.model_copy(update={"adapter": section}))
    with pytest.raises(ModelError, match=r"5 virtual tokens, and adapter\.prefix is 6"):
        load_adapter(longer, run.adapter)


def test_unsupported_model_types_are_refused(tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, "bloom", prefix=LENGTH)
    with pytest.raises(UsageError, match="bloom have no prefix"):
        build_base(recipe)


def test_what_a_prefix_cannot_do_is_refused(tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, "llama", prefix=LENGTH)
    run, _ = prefix_run(tmp_path / "run", recipe)
    out = tmp_path / "merged"
    with pytest.raises(UsageError, match="GGUF"):
        merge.run(run.path, out=out, dtype=None, base="auto", observer=Silent(), gguf="f16")
    with pytest.raises(UsageError, match="not weighted or combined"):
        merge.run(run.path, out=out, dtype=None, base="auto", observer=Silent(), weight=0.5)
    with pytest.raises(UsageError, match="has a prefix"):
        select_contents(run.path, unverified=False)
    out.mkdir()
    shutil.copytree(run.adapter / "prefix", out / "prefix")
    server = {"url": "http://localhost:1", "name": None, "bits": 16}
    with pytest.raises(UsageError, match="a server does not use"):
        verify_server.run(out, against=run.path, observer=Silent(), **server)


@pytest.mark.parametrize(
    ("task", "section", "value"),
    [
        ("preference", "train", {}),
        ("classification", "train", {}),
        ("causal", "base", {"bits": 4, "residency": "shard"}),
        ("causal", "adapter", {"prefix": 4, "init": "pissa"}),
    ],
)
def test_recipes_with_unsupported_settings_are_refused(
    task: str, section: str, value: dict[str, Any]
) -> None:
    given = {"adapter": {"prefix": 4}, section: value}
    if section == "adapter":
        given = {"adapter": value}
    with pytest.raises(ValidationError, match=r"adapter\.prefix does not support"):
        make_recipe(Path("base"), Path("rows"), task, **given)


def test_a_damaged_prefix_is_refused(tmp_path: Path) -> None:
    _, recipe = frozen_16_bit(tmp_path, "llama", prefix=LENGTH)
    run, _ = prefix_run(tmp_path / "run", recipe)
    config = run.adapter / "prefix" / "adapter_config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(ModelError, match="prompt_embeddings"):
        open_run(Run(run.path), CPU, Silent())
