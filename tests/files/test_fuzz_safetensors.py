"""Damaged and absurd safetensors files: our own error, or the tensors that the library reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from qlora_cli.files.safetensors_io import read_header, read_tensor
from tests.helpers.fuzz import changed_values, damaged, fuzzed, only_own_errors, write

pytestmark = pytest.mark.slow

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.int8)}
FILE = save(TENSORS, {"format": "pt"})
SIZE = int.from_bytes(FILE[:8], "little")
HEADER = json.loads(FILE[8 : 8 + SIZE])


def with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + FILE[8 + SIZE :]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("file") / "model.safetensors"


@fuzzed()
@given(st.one_of(damaged(FILE), changed_values(HEADER).map(with_header)))
def test_files(file: Path, content: bytes) -> None:
    write(file, content)
    with only_own_errors():
        entries, _ = read_header(file)
        read = {name: read_tensor(entry) for name, entry in entries.items()}
        try:
            opened = safe_open(file, "pt")
        except SafetensorError:
            return  # It refuses more, such as half characters in the metadata.
        with opened as same:
            for name, tensor in read.items():
                expected = same.get_tensor(name)
                assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
                assert tensor.numpy().tobytes() == expected.numpy().tobytes()
