"""Damaged and absurd adapters: only our own errors come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from qlora_cli.adapters.peft_config import CONFIG, WEIGHTS
from qlora_cli.adapters.peft_file import AdapterMetadata, open_adapter
from qlora_cli.adapters.peft_names import tensor_name
from qlora_cli.nn.site import Site
from tests.helpers.fuzz import changed_json, changed_values, damaged, fuzzed, only_own_errors, write

pytestmark = pytest.mark.slow

RANK = 2
PATHS = [f"model.layers.{block}.self_attn.{name}_proj" for block in (0, 1) for name in "qv"]
SITES = [Site(path, (path[-6],), {path[-6]: slice(0, 4)}, 4, 4, False, False) for path in PATHS]
CONFIG_CONTENT: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": RANK,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": None,
    "rank_pattern": {"model.layers.0.self_attn.q_proj": RANK},
    "alpha_pattern": {".*v_proj": 4.0},
    "fan_in_fan_out": False,
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
}
METADATA = AdapterMetadata(RANK, 4.0, False, {PATHS[0]: {"": (0, 4)}})
TENSORS = {tensor_name(path, "A"): torch.ones(RANK, 4) for path in PATHS}
TENSORS |= {tensor_name(path, "B"): torch.ones(4, RANK) for path in PATHS}
FILES = save(TENSORS), save(TENSORS, METADATA.header())


def with_header(metadata: Any) -> bytes:
    """Return an adapter's file with metadata that may be of any type."""
    size = int.from_bytes(FILES[0][:8], "little")
    header = json.loads(FILES[0][8 : 8 + size]) | {"__metadata__": metadata}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + FILES[0][8 + size :]


def use(folder: Path) -> None:
    """Open an adapter, compare it with a base and read it."""
    adapter = open_adapter(folder)
    adapter.check(SITES)
    for layer in adapter.layers.values():
        layer.read()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter")


def test_the_adapters_are_valid(tmp_path: Path) -> None:
    write(tmp_path / CONFIG, json.dumps(CONFIG_CONTENT).encode())
    for content in FILES:
        write(tmp_path / WEIGHTS, content)
        use(tmp_path)


@fuzzed()
@given(changed_json(CONFIG_CONTENT), st.sampled_from(FILES))
def test_configs(folder: Path, config: bytes, weights: bytes) -> None:
    write(folder / CONFIG, config)
    write(folder / WEIGHTS, weights)
    with only_own_errors():
        use(folder)


METADATA_CONTENT = {"qlora": json.loads(METADATA.header()["qlora"])}
headers = st.one_of(
    changed_values(METADATA_CONTENT),
    changed_values(METADATA_CONTENT).map(lambda value: _text_of(value)),
).map(with_header)


def _text_of(value: Any) -> Any:
    """Return metadata whose values are text, as the format requires."""
    return {key: json.dumps(item) for key, item in value.items()}


@fuzzed()
@given(st.one_of(damaged(*FILES), headers))
def test_weights(folder: Path, weights: bytes) -> None:
    write(folder / CONFIG, json.dumps(CONFIG_CONTENT).encode())
    write(folder / WEIGHTS, weights)
    with only_own_errors():
        use(folder)
