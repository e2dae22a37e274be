"""A job and its dry run build the model from the same request."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultipleChoice

from qlora_cli.data.collate import largest_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.errors import ModelError
from qlora_cli.files.locate import read_config
from qlora_cli.memory.instrument import Instrument
from qlora_cli.models.build import ModelRequest, build
from qlora_cli.nn.codebook import clear_scale_codebook
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.meta_source import MetaSource
from qlora_cli.runs.open import open_source
from qlora_cli.train.state import build_state
from qlora_cli.units import GIB
from tests.helpers.runs import CPU, make_base, make_recipe, make_rows

META = torch.device("meta")
CPU_PROFILE = DeviceProfile("cpu", "a CPU", 24 * GIB)
ADA = DeviceProfile("cuda", "an RTX 4090", 24 * GIB, (8, 9), 128)
TURING = DeviceProfile("cuda", "an RTX 2080", 8 * GIB, (7, 5), 46)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 base whose config.json does not name a dtype."""
    folder = make_base(tmp_path_factory.mktemp("base") / "base", "llama", dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "float32"
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    make_rows(folder.parent / "rows.jsonl")
    return folder


def request(folder: Path, profile: DeviceProfile = CPU_PROFILE, **sections: Any) -> ModelRequest:
    recipe = make_recipe(folder, folder.parent / "rows.jsonl", **sections)
    config = read_config(folder / "config.json")
    return ModelRequest(recipe, config, lambda _, family: open_source(folder, family), CPU, profile)


def on_meta(made: ModelRequest) -> ModelRequest:
    dtype = made.file_dtype
    return replace(
        made, device=META, make_source=lambda model, family: MetaSource(model, family, dtype)
    )


def test_a_config_without_a_dtype_is_float32_in_plan_and_job(base: Path) -> None:
    made = request(base)
    assert made.config.dtype is None
    assert made.file_dtype == torch.float32
    assert on_meta(made).file_dtype == torch.float32


@pytest.mark.parametrize("bits", [4, 16])
def test_a_config_without_a_dtype_is_planned_as_it_is_loaded(base: Path, bits: int) -> None:
    made = request(base, base={"bits": bits})
    plan = dry_run(made.recipe, made.config, CPU_PROFILE, [largest_batch(32, 1, 300)])
    instrument = Instrument(CPU, CPU_PROFILE)
    clear_scale_codebook(CPU)
    with instrument.phase("load"):
        build_state(made)
    load = next(phase for phase in plan.phases if phase.name == "load")
    assert load.peak_bytes == instrument.phases[0].peak_bytes


def test_the_config_of_a_request_is_not_modified(base: Path) -> None:
    made = request(base)
    before = deepcopy(made.config).to_dict()
    build(made)
    assert made.config.to_dict() == before
    assert made.config.dtype is None


@pytest.mark.parametrize(
    ("profile", "compute", "kernel"),
    [
        (CPU_PROFILE, "bfloat16", "cpu"),
        (ADA, "bfloat16", "varlen"),
        (ADA, "float32", "efficient"),
        (TURING, "float16", "efficient"),
    ],
)
def test_the_attention_kernel_is_that_of_the_profile(
    base: Path, profile: DeviceProfile, compute: str, kernel: str
) -> None:
    """Also in a dry run on meta, where torch would select another one."""
    made = on_meta(request(base, profile, base={"compute_dtype": compute}))
    assert build(made).kernel == kernel


def test_the_model_class_is_that_of_the_request(base: Path) -> None:
    """A config without such a head is refused by transformers, which shows that it was asked."""
    made = replace(on_meta(request(base)), model_class=AutoModelForMultipleChoice)
    with pytest.raises(ModelError, match="AutoModelForMultipleChoice"):
        build(made)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_trains_is_what_the_method_names(base: Path, method: str) -> None:
    bits = {"bits": 16} if method == "full" else {}
    loaded = build(request(base, adapter={"method": method}, base=bits))
    names = set(loaded.trainable())
    if method == "full":
        assert names == {name for name, _ in loaded.model.named_parameters()}
        assert loaded.adapted == {}
    else:
        assert names
        assert all(".lora_a." in name or ".lora_b." in name for name in names)
