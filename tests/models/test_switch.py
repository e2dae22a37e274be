"""Several adapters on one base: each gives the same logits as alone; the base is restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.adapters.peft_file import AdapterFile, open_adapter
from qlora_cli.errors import ModelError, ProblemsError, QloraError, UsageError
from qlora_cli.events import Silent
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.models.attach import attach_adapter, remove_adapter
from qlora_cli.models.checkpoint_source import open_source
from qlora_cli.models.model import LoadedModel
from qlora_cli.models.save_adapter import save_adapter
from qlora_cli.models.switch import BASE, OWN, AdapterSwitch
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.open import open_for_adapters
from qlora_cli.runs.run import Run, adapter_at
from tests.helpers.runs import (
    CPU,
    build_base,
    logits,
    make_base,
    make_recipe,
    make_rows,
    make_run,
    randomize_b,
)

IDS = torch.tensor([[5, 80, 91, 7, 33, 250]])
ADAPTERS: dict[str, dict[str, Any]] = {
    "wide": {"rank": 3, "alpha": 6.0, "targets": "all"},
    "narrow": {"rank": 7, "alpha": 3.0, "targets": ["v"], "rslora": True},
    "half": {"rank": 2, "targets": ["q", "down"], "dtype": "float16", "dropout": 0.5},
}
"""Adapters that differ in rank, targets, scaling and dtype, also on the same linear layer."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def recipe_for(base: Path, bits: int = 16, **adapter: Any) -> Recipe:
    return make_recipe(base, base / "rows.jsonl", base={"bits": bits}, adapter=adapter)


def base_model(recipe: Recipe) -> LoadedModel:
    """Return the base of a recipe for inference, without an adapter."""
    loaded = build_base(recipe)
    loaded.model.eval().requires_grad_(False)
    remove_adapter(loaded)
    return loaded


def adapters_on(base: Path, folder: Path) -> dict[str, AdapterFile]:
    """Write the adapters of `ADAPTERS` with different random values and open them."""
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        recipe = recipe_for(base, **settings)
        loaded = build_base(recipe)
        randomize_b(loaded, seed=seed, spread=0.1)
        save_adapter(loaded, recipe, folder / name)
    return {name: open_adapter(folder / name) for name in ADAPTERS}


def switch_with(
    loaded: LoadedModel, base: Path, adapters: dict[str, AdapterFile], merged: bool
) -> AdapterSwitch:
    switch = AdapterSwitch(loaded, open_source(base, loaded.family), merged=merged)
    for name, adapter in adapters.items():
        switch.add(name, adapter)
    return switch


def weights(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return name in the base -> value of each parameter that is not an adapter's."""
    return {
        name.replace(".base.", "."): value.detach().clone()
        for name, value in loaded.model.named_parameters()
        if ".lora_" not in name
    }


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_same_bytes(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].stride() == value.stride(), name
        assert torch.equal(as_bytes(found[name]), as_bytes(value)), name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("bits", [4, 16])
def test_each_adapter_gives_the_logits_that_it_gives_alone(
    family: str, bits: int, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family)
    adapters = adapters_on(base, tmp_path)
    loaded = base_model(recipe_for(base, bits))
    alone = {BASE: logits(loaded, IDS)}
    for name, adapter in adapters.items():
        model = base_model(recipe_for(base, bits))
        attach_adapter(model, adapter)
        alone[name] = logits(model, IDS)
    before = weights(loaded)
    switch = switch_with(loaded, base, adapters, merged=False)
    for name in ("wide", "narrow", BASE, "half", "wide", BASE, "narrow"):
        switch.use(name)
        assert switch.current == name
        assert torch.equal(logits(loaded, IDS), alone[name]), name
    assert_same_bytes(weights(loaded), before)
    assert len({tuple(found.flatten().tolist()) for found in alone.values()}) == len(alone)


def test_switching_copies_no_weight(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    loaded = base_model(recipe_for(base, bits=4))
    switch = switch_with(loaded, base, adapters_on(base, tmp_path), merged=False)
    places = {site.path: loaded.model.get_submodule(site.path).weight for site in loaded.sites}
    switch.use("wide")
    for path, weight in places.items():
        assert loaded.model.get_submodule(path).base.weight is weight
    switch.use(BASE)
    assert all(loaded.model.get_submodule(path).weight is weight for path, weight in places.items())
    assert not list(adapted_layers(loaded.model))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_removing_a_merged_adapter_restores_the_base_bit_for_bit(
    family: str, dtype: str, tmp_path: Path
) -> None:
    """Also when switching between adapters, and for a float32 file whose weights are in 16 bit."""
    base = make_base(tmp_path / "base", family, dtype=DTYPES[dtype])
    loaded = base_model(recipe_for(base))
    before = weights(loaded)
    switch = switch_with(loaded, base, adapters_on(base, tmp_path), merged=True)
    merged = {}
    for name in ("wide", "narrow", BASE, "half", "narrow", "wide", BASE):
        switch.use(name)
        now = weights(loaded)
        assert_same_bytes(now, merged.setdefault(name, now))
        assert not list(adapted_layers(loaded.model)), "no adapter layer remains"
    assert_same_bytes(merged[BASE], before)
    for name, adapter in ((name, open_adapter(tmp_path / name)) for name in ADAPTERS):
        changed = {key for key in before if not torch.equal(merged[name][key], before[key])}
        assert changed == {f"{path}.weight" for path in adapter.layers}


def test_subtracting_a_merged_adapter_does_not_restore_the_base(tmp_path: Path) -> None:
    """The reason for reading the weights again: in 16 bit, W + BA - BA is not W."""
    base = make_base(tmp_path / "base", "llama")
    loaded = base_model(recipe_for(base))
    switch = switch_with(loaded, base, adapters_on(base, tmp_path), merged=False)
    switch.use("wide")
    _, layer = next(adapted_layers(loaded.model))
    weight, delta = layer.base.weight, layer.delta()
    merged = (weight.float() + delta).half()
    assert not torch.equal((merged.float() - delta).half(), weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_in_memory_gives_the_weights_that_merge_writes(family: str, tmp_path: Path) -> None:
    """Except for sums close to the middle of two values, which float32 and float64 round apart."""
    base = make_base(tmp_path / "base", family)
    rows = make_rows(tmp_path / "rows.jsonl")
    recipe = make_recipe(base, rows, base={"bits": 16}, adapter={"targets": "all"})
    run, trained = make_run(tmp_path / "run", recipe)
    written = open_merged_tensors(Run(run.path), "original", torch.float16, CPU)
    opened = open_for_adapters(str(run.path), CPU, Silent())
    source = open_source(opened.weights, opened.loaded.family)
    AdapterSwitch(opened.loaded, source, merged=True)
    for site in opened.loaded.sites:
        found = opened.loaded.model.get_submodule(site.path).weight
        wanted = written.compute(written.source.file_name(f"{site.path}.weight"))
        wanted = site.from_file(wanted)
        torch.testing.assert_close(found, wanted, rtol=2.0**-10, atol=2.0**-24)
    torch.testing.assert_close(
        logits(opened.loaded, IDS), logits(trained, IDS), rtol=1e-2, atol=0.05
    )


def test_the_adapter_of_an_opened_run_is_active(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    run, trained = make_run(tmp_path / "run", recipe_for(base, bits=4, rank=5))
    opened = open_for_adapters(str(run.path), CPU, Silent())
    switch = AdapterSwitch(opened.loaded, open_source(opened.weights, opened.loaded.family))
    assert (switch.current, switch.adapters) == (OWN, (OWN,))
    switch.add("again", adapter_at(run.path))
    for name in (OWN, "again", OWN):
        switch.use(name)
        assert torch.equal(logits(opened.loaded, IDS), logits(trained, IDS))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_can_be_added_to_a_model_and_to_a_full_fine_tuning(
    family: str, tmp_path: Path
) -> None:
    """The linear layers of both get a 16-bit base first."""
    base = make_base(tmp_path / "base", family)
    adapters = adapters_on(base, tmp_path)
    full = RunFolder(tmp_path / "full")
    recipe = make_recipe(base, base / "rows.jsonl", base={"bits": 16}, adapter={"method": "full"})
    full.create()
    full.write(
        {
            "status": "done",
            "recipe": recipe.model_dump(mode="json"),
            "base_folder": str(base.resolve()),
        }
    )
    make_base(full.weights, family)
    wanted = base_model(recipe_for(base))
    attach_adapter(wanted, adapters["wide"])
    for where in (base, full.path):
        opened = open_for_adapters(str(where), CPU, Silent())
        switch = switch_with(opened.loaded, opened.weights, adapters, merged=False)
        assert not list(adapted_layers(opened.loaded.model))
        switch.use("wide")
        assert torch.equal(logits(opened.loaded, IDS), logits(wanted, IDS))
    with pytest.raises(UsageError, match="is a full fine-tuning; it has no adapter"):
        adapter_at(full.path)


Fault = Callable[[AdapterSwitch, dict[str, AdapterFile]], object]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda switch, _: switch.use("wode"), "there is no adapter 'wode'\n  did you mean wide?"),
        (lambda switch, _: switch.use("?"), "valid names: base, wide, narrow, half"),
        (lambda switch, found: switch.add("wide", found["half"]), "the name 'wide' is taken"),
        (lambda switch, found: switch.add("base", found["half"]), "the name 'base' is taken"),
        (lambda switch, found: switch.add("run", found["half"]), "the name 'run' is taken"),
    ],
)
def test_a_wrong_name_is_refused_and_changes_nothing(
    fault: Fault, message: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapters = adapters_on(base, tmp_path)
    loaded = base_model(recipe_for(base))
    switch = switch_with(loaded, base, adapters, merged=False)
    switch.use("half")
    before = logits(loaded, IDS)
    with pytest.raises(UsageError) as caught:
        fault(switch, adapters)
    assert message in str(caught.value)
    assert switch.current == "half"
    assert torch.equal(logits(loaded, IDS), before)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    other = make_base(tmp_path / "other", "llama", hidden_size=80)
    adapters = adapters_on(other, tmp_path)
    loaded = base_model(recipe_for(base))
    with pytest.raises(ProblemsError, match="does not belong to this base"):
        switch_with(loaded, base, adapters, merged=False)


@pytest.mark.parametrize("bits", [4, 8])
def test_merging_into_a_quantized_base_is_refused(bits: int, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    loaded = base_model(recipe_for(base, bits))
    with pytest.raises(UsageError, match=f"the weights of a {bits}-bit base"):
        switch_with(loaded, base, {}, merged=True)


def test_an_overflow_is_reported_and_the_base_is_restored(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    recipe = recipe_for(base, targets="all")
    loaded = build_base(recipe)
    randomize_b(loaded, spread=0.02)
    last = list(adapted_layers(loaded.model))[-1][1]
    next(iter(last.lora_b.values())).data.fill_(1e7)
    save_adapter(loaded, recipe, tmp_path / "loud")
    found = base_model(recipe)
    before = weights(found)
    switch = switch_with(found, base, {"loud": open_adapter(tmp_path / "loud")}, merged=True)
    with pytest.raises(QloraError, match=r"'loud' it has values beyond torch\.float16"):
        switch.use("loud")
    assert switch.current == BASE
    assert_same_bytes(weights(found), before)


def test_a_base_file_that_has_changed_is_reported(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    loaded = base_model(recipe_for(base))
    switch = switch_with(loaded, base, adapters_on(base, tmp_path), merged=True)
    switch.use("wide")
    file = base / "model.safetensors"
    file.rename(base / "elsewhere")
    with pytest.raises(ModelError, match=r"model\.safetensors: .* No such file"):
        switch.use(BASE)
    file.write_bytes((base / "elsewhere").read_bytes())
    with pytest.raises(ModelError, match="has changed since it was loaded"):
        switch.use(BASE)
    (base / "elsewhere").replace(file)
    switch.use(BASE)
    assert_same_bytes(weights(loaded), weights(base_model(recipe_for(base))))
