"""The choices of `qlora merge` are defined in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import torch

from qlora_cli.cli.merge import merge
from qlora_cli.export.gguf.plan import FILE_TYPES
from qlora_cli.export.merge.manifest import MergeManifest
from qlora_cli.export.options import (
    AUTO_BASE,
    DEFAULT_DTYPE,
    FALLBACK_DTYPE,
    GGUF_ENCODINGS,
    GGUF_TYPES,
    MERGE_BASES,
    OUTPUT_DTYPES,
    GgufEncoding,
    MergeBase,
    has_narrow_range,
)
from qlora_cli.files.dtype import torch_dtype


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("dtype", list(OUTPUT_DTYPES)),
        ("base", [*MERGE_BASES, AUTO_BASE]),
        ("gguf", list(GGUF_TYPES)),
    ],
)
def test_the_command_line_offers_the_table(option: str, choices: list[str]) -> None:
    (parameter,) = (p for p in merge.params if p.name == option)
    assert isinstance(parameter.type, click.Choice)
    assert list(parameter.type.choices) == choices


@pytest.mark.parametrize("name", OUTPUT_DTYPES)
def test_a_dtype_of_a_narrower_range_than_float32_is_checked(name: str) -> None:
    is_narrow = torch.finfo(torch_dtype(name)).tiny > torch.finfo(torch.float32).tiny
    assert has_narrow_range(name) is is_narrow


def test_the_fallback_needs_no_check() -> None:
    assert {DEFAULT_DTYPE, FALLBACK_DTYPE} <= OUTPUT_DTYPES.keys()
    assert not has_narrow_range(FALLBACK_DTYPE)


def test_every_encoding_has_types_of_llama_cpp() -> None:
    assert FILE_TYPES.keys() == set(GGUF_ENCODINGS) == set(get_args(GgufEncoding))
    assert set(MERGE_BASES) == set(get_args(MergeBase))


OLDER: dict[str, Any] = {
    "base_model": "some/model",
    "method": "lora",
    "judgement": {  # words: allow
        "base": "original",
        "reason": "asked for",
        "rows": "",
        "table": {},
    },
    "dtype_reason": "the default, and it holds the model",
    "settings": {
        "base": "dequantized",
        "dtype": "bfloat16",
        "held": {"bits": 4, "compute": "bfloat16"},
        "packed_on": "cpu",
        "weights": {"model.safetensors": [1, 2]},
        "adapters": [
            {"folder": "/runs/a/adapter", "weight": 0.5, "digest": "aa"},
            {"folder": "/runs/b/adapter", "weight": 2.0, "digest": "bb"},
        ],
        "shards": {"model.safetensors": 3},
    },
}


def test_a_manifest_of_an_older_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "merge.json").write_text(json.dumps(OLDER))
    manifest = MergeManifest.read(tmp_path)
    assert (manifest.base, manifest.dtype) == ("dequantized", torch.bfloat16)
    assert (manifest.weight, manifest.others) == (0.5, ((Path("/runs/b/adapter"), 2.0),))
    assert manifest.digests == ("aa", "bb")
    assert manifest.settings == OLDER["settings"]
