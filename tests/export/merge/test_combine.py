"""Several adapters on one base: merged == W + sum of weight scaling B A, and verify passes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.errors import ProblemsError, UsageError
from qlora_cli.events import Silent
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.options import MergeBase
from qlora_cli.export.verify.verification import verify
from qlora_cli.jobs import merge
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run
from tests.helpers.cli_helpers import qlora
from tests.helpers.runs import CPU, make_base, make_recipe, make_rows, make_run

torch.set_num_threads(1)


@dataclass(frozen=True)
class World:
    """Three runs on one base with different adapters, and the weight change of each of them."""

    folder: Path
    base: Path
    runs: tuple[RunFolder, ...]
    deltas: tuple[dict[str, Tensor], ...]


KINDS: list[dict[str, Any]] = [
    {"targets": "all", "rank": 3},
    {"targets": ["q", "v"], "rank": 5, "alpha": 9.0, "rslora": True},
    {"targets": ["k", "down"], "rank": 2, "dtype": "float16"},
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = make_base(folder / "base", request.param)
    rows = make_rows(folder / "rows.jsonl")
    runs, deltas = [], []
    for number, adapter in enumerate(KINDS):
        recipe = make_recipe(base, rows, adapter=adapter)
        run, loaded = make_run(folder / f"run{number}", recipe, seed=number, spread=0.05)
        sites = {site.path: site for site in loaded.sites}
        layers = {path: layer.delta() for path, layer in adapted_layers(loaded.model)}
        runs.append(run)
        deltas.append({path: sites[path].to_file(delta) for path, delta in layers.items()})
    return World(folder, base, tuple(runs), tuple(deltas))


@pytest.mark.parametrize("kind", ["original", "dequantized"])
def test_merged_is_the_base_plus_the_weighted_sum(world: World, kind: MergeBase) -> None:
    weights = (0.5, -1.25, 2.0)
    own, *others = world.runs
    added = [(other.path, weight) for other, weight in zip(others, weights[1:], strict=True)]
    made = open_merged_tensors(Run(own.path), kind, torch.float32, CPU, weights[0], added)
    alone = open_merged_tensors(Run(own.path), kind, torch.float32, CPU, 0.0)
    for name in made.shapes():
        expected = alone.compute(name).double()
        for weight, deltas in zip(weights, world.deltas, strict=True):
            expected += weight * deltas.get(name.removesuffix(".weight"), torch.zeros(1)).double()
        error = (made.compute(name).double() - expected).abs().max()
        assert error < 1e-6 * expected.abs().max(), name


@pytest.mark.slow
def test_one_adapter_of_weight_1_is_the_plain_merge(world: World, tmp_path: Path) -> None:
    own = world.runs[0]
    given = {"dtype": "float16", "base": "dequantized", "observer": Silent()}
    merge.run(own.path, out=tmp_path / "plain", **given)
    merge.run(own.path, out=tmp_path / "weighted", weight=1.0, others=[], **given)
    name = "model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "weighted" / name).read_bytes()


def test_an_adapter_minus_itself_is_the_base(world: World) -> None:
    own = world.runs[0]
    made = open_merged_tensors(
        Run(own.path), "original", torch.float16, CPU, 1.0, [(own.path, -1.0)]
    )
    original = load_file(world.base / "model.safetensors")
    assert all(torch.equal(made.compute(name), original[name]) for name in original)


@pytest.mark.slow
def test_the_command_line_accepts_a_peft_folder_and_verify_passes(
    world: World, tmp_path: Path
) -> None:
    own, other = world.runs[0], Path(shutil.copytree(world.runs[1].adapter, tmp_path / "a=b"))
    out = tmp_path / "out"
    words = ["--weight", "0.5", "--with", f"{other}=0.25", "--with", world.runs[2].path]
    outcome = qlora("merge", own.path, "--out", out, *words, "--json")
    assert outcome.code == 0, outcome.err
    listed = json.loads((out / "merge.json").read_text())["settings"]["adapters"]
    folders = [own.adapter, other, world.runs[2].adapter]
    assert [(Path(entry["folder"]), entry["weight"]) for entry in listed] == [
        (folder.resolve(), weight) for folder, weight in zip(folders, (0.5, 0.25, 1.0), strict=True)
    ]
    outcome = qlora("verify", out, "--against", own.path, "--json")
    assert (outcome.code, outcome.json["faults"]) == (0, []), outcome.err
    assert "merge.json lists 0.5 x the run's adapter + 0.25 x" in outcome.err

    factors = load_file(other / "adapter_model.safetensors")
    for factor in factors.values():
        factor *= 1.01
    save_file(factors, other / "adapter_model.safetensors", metadata=header(other))
    faults = verify(out, Run(own.path), CPU, Silent()).faults
    changed = f"the adapter in {other.resolve()} is not the one in merge.json"
    assert any(fault.startswith(changed) for fault in faults)
    assert any("differs from base + scaling B A" in fault for fault in faults)


def header(adapter: Path) -> dict[str, str]:
    with (adapter / "adapter_model.safetensors").open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        found: dict[str, str] = json.loads(stream.read(length))["__metadata__"]
    return found


def test_adapters_of_another_base_are_refused(world: World, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "llama", hidden_size=32)
    recipe = make_recipe(other, make_rows(tmp_path / "rows.jsonl"))
    run, _ = make_run(tmp_path / "run", recipe)
    for where in (run.path, run.adapter):
        with pytest.raises(UsageError, match=r"was trained on .*/other, and .*/run0 on .*/base"):
            open_merged_tensors(
                Run(world.runs[0].path), "original", torch.float16, CPU, 1.0, [(where, 1.0)]
            )
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (run.adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ProblemsError, match="does not belong to this base"):
        open_merged_tensors(
            Run(world.runs[0].path), "original", torch.float16, CPU, 1.0, [(run.adapter, 1.0)]
        )


def test_full_fine_tuning_has_no_adapter_to_weight(world: World, tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "rows.jsonl")
    recipe = make_recipe(world.base, rows, base={"bits": 16}, adapter={"method": "full"})
    full = RunFolder(tmp_path / "full")
    full.create()
    full.write({"recipe": recipe.model_dump(mode="json"), "base_folder": str(world.base)})
    with pytest.raises(UsageError, match="is a full fine-tuning"):
        open_merged_tensors(Run(full.path), "original", torch.float16, CPU, 0.5)
