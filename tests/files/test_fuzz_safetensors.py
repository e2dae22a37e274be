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

from qlora_cli.errors import ModelError
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


REFUSED = {
    # Names of the library's dtypes that no supported checkpoint has, and the bytes of an element.
    **{"F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"U16": 2, "U32": 4, "U64": 8, "C64": 8},
}
"""What the library reads and this package refuses."""


@fuzzed()
@given(st.one_of(damaged(FILE), changed_values(HEADER).map(with_header)))
def test_files(file: Path, content: bytes) -> None:
    """The same files are read as by the library, with the same tensors."""
    write(file, content)
    read: dict[str, torch.Tensor] | None = None
    with only_own_errors():
        entries, _ = read_header(file)
        read = {name: read_tensor(entry) for name, entry in entries.items()}
    expected = read_by_library(file)
    assert (read is None) == (expected is None)
    for name, tensor in (read or {}).items():
        assert expected is not None
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes()


def read_by_library(file: Path) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a file; None if the library refuses it."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError:
        return None


@pytest.mark.parametrize("dtype", REFUSED)
def test_dtypes_that_only_the_library_reads_are_named(file: Path, dtype: str) -> None:
    entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * REFUSED[dtype]]}
    text = json.dumps({"a": entry}).encode()
    write(file, len(text).to_bytes(8, "little") + text + bytes(2 * REFUSED[dtype]))
    assert read_by_library(file) is not None
    with pytest.raises(ModelError, match=f"the dtype '{dtype}' is not supported"):
        read_header(file)


HEADERS = [
    {**HEADER, "__metadata__": ""},
    {**HEADER, "__metadata__": {"format": "\ud800"}},
    {**HEADER, "\ud800": HEADER["a"]},
    {**HEADER, "a": {**HEADER["a"], "more": 10**400}},
]


@pytest.mark.parametrize("header", HEADERS, ids=["text", "value", "name", "number"])
def test_headers_that_the_library_refuses(file: Path, header: Any) -> None:
    write(file, with_header(header))
    assert read_by_library(file) is None
    with pytest.raises(ModelError, match="damaged safetensors file"):
        read_header(file)
