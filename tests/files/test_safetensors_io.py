"""The safetensors library reads the files that we write, and we read those that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.files.safetensors_io import TensorSpec, read_header, read_tensor, write_tensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()).view(shape) % 2).to(dtype)


def write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    specs = {
        name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    write_tensors(file, specs, tensors.__getitem__, metadata or {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4), (5, 1, 2)], ids=str)
def test_every_dtype_and_shape_is_written_and_read(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    own = {"a": tensor_of(dtype, shape), "b": tensor_of(torch.float32, (7,))}
    write(tmp_path / "ours", own, {"format": "pt"})
    assert all(torch.equal(load_file(tmp_path / "ours")[name], own[name]) for name in own)
    save_file(own, tmp_path / "theirs")
    entries, _ = read_header(tmp_path / "theirs")
    for name, tensor in own.items():
        found = read_tensor(entries[name])
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_the_library_reads_our_files(
    tmp_path_factory: pytest.TempPathFactory,
    contents: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    file = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {name: tensor_of(dtype, tuple(shape)) for name, (dtype, shape) in contents.items()}
    write(file, tensors, {"words": "a\n"})
    with safe_open(file, "pt") as found:
        assert set(found.keys()) == tensors.keys()
        assert found.metadata() == {"words": "a\n"}
        assert all(torch.equal(found.get_tensor(name), tensors[name]) for name in tensors)


def test_the_values_of_a_transposed_view_are_written(tmp_path: Path) -> None:
    transposed = torch.arange(6).view(2, 3).t()
    write(tmp_path / "x", {"a": transposed})
    assert torch.equal(load_file(tmp_path / "x")["a"], transposed)


def test_tensors_are_computed_one_at_a_time_in_order(tmp_path: Path) -> None:
    computed: list[str] = []

    def compute(name: str) -> Tensor:
        computed.append(name)
        return torch.zeros(2)

    names = ["b", "a", "c"]
    write_tensors(
        tmp_path / "x", {name: TensorSpec(torch.float32, (2,)) for name in names}, compute, {}
    )
    assert computed == names
    entries, _ = read_header(tmp_path / "x")
    assert sorted(entries, key=lambda name: entries[name].start) == names


def damaged(content: bytes) -> list[tuple[str, bytes]]:
    return [
        ("nothing", b""),
        ("a few bytes", content[:5]),
        ("half a header", content[:20]),
        ("half its values", content[:-3]),
        ("more than its values", content + b"\0"),
        ("a pickle", b"\x80\x02}q\x00X\x05\x00\x00\x00helloq\x01"),
        ("a length of petabytes", (2**50).to_bytes(8, "little") + content[8:]),
        ("no JSON", content[:8] + b"!" + content[9:]),
        ("an unknown dtype", content.replace(b'"F32"', b'"Q32"')),
        ("another shape", content.replace(b"[2,3]", b"[2,9]")),
        ("a list for a header", (2).to_bytes(8, "little") + b"[]"),
        ("a web page", b"<!DOCTYPE html>" + b" " * 200),
    ]


VALID = (
    (64).to_bytes(8, "little")
    + b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'.ljust(64)
    + bytes(24)
)


def test_the_example_is_valid(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(VALID)
    entries, _ = read_header(tmp_path / "x")
    assert torch.equal(read_tensor(entries["a"]), torch.zeros(2, 3))


@pytest.mark.parametrize(("how", "content"), damaged(VALID), ids=lambda item: str(item)[:20])
def test_a_damaged_file_is_named(how: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged safetensors file"):
        read_header(file)


OFFSETS = {
    "overlapping tensors": [[0, 24], [12, 36]],
    "a hole between tensors": [[0, 24], [30, 54]],
    "a negative offset": [[-4, 20], [20, 44]],
}


@pytest.mark.parametrize("how", OFFSETS)
def test_tensors_that_do_not_follow_one_another_are_refused(how: str, tmp_path: Path) -> None:
    """The library refuses them, too."""
    header = {
        name: {"dtype": "F32", "shape": [2, 3], "data_offsets": offsets}
        for name, offsets in zip("ab", OFFSETS[how], strict=True)
    }
    text = json.dumps(header).encode().ljust(200)
    file = tmp_path / "model.safetensors"
    size = max(end for _, end in OFFSETS[how])
    file.write_bytes((200).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(
        ModelError,
        match=r"damaged safetensors file: the (tensor . begins at|shape .* are not sizes)",
    ):
        read_header(file)
    with pytest.raises(SafetensorError):
        load_file(file)


def test_a_file_that_shrank_since_its_header_was_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(VALID)
    entries, _ = read_header(file)
    file.write_bytes(VALID[:-4])
    with pytest.raises(ModelError, match="shorter than its header says"):
        read_tensor(entries["a"])
