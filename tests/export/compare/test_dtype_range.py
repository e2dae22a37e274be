"""Merging writes float16 if the model fits its range, else bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.errors import VerificationFailed
from qlora_cli.events import Silent
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.merge.write import write_merged
from qlora_cli.export.verify.verification import verify
from qlora_cli.jobs import merge
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run
from tests.helpers.cli_helpers import qlora
from tests.helpers.observers import NoteRecorder
from tests.helpers.runs import CPU, make_base, make_recipe, make_rows, make_run

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
NORM = "model.layers.0.input_layernorm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def overflow_weight(weights: dict[str, Tensor]) -> None:
    weights[NORM][3] = 1e6


def underflow_weights(weights: dict[str, Tensor]) -> None:
    weights[UP] *= 1e-7


def overflow_activations(weights: dict[str, Tensor]) -> None:
    """Every weight fits the range of float16; the product gate * up does not."""
    for name in ("gate", "up"):
        weights[f"model.layers.1.mlp.{name}_proj.weight"] *= 500


FAULTS: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (overflow_weight, f"{NORM} has values that float16 cannot represent"),
    (underflow_weights, f"{UP} loses "),
    (overflow_activations, "the activations overflow in float16: the output of model.layers.1.mlp"),
]
seeded = pytest.mark.parametrize(
    ("spoil", "message"), FAULTS, ids=lambda item: getattr(item, "__name__", "")
)


def make_spoiled_run(folder: Path, spoil: Callable[[dict[str, Tensor]], None]) -> RunFolder:
    """Create a run on a bfloat16 base, which has the range of float32; only q and v are adapted."""
    base = make_base(folder / "base", "llama", dtype=torch.bfloat16, tied=False)
    weights = load_file(base / "model.safetensors")
    spoil(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    recipe = make_recipe(
        base,
        make_rows(folder / "rows.jsonl"),
        adapter={"targets": ["q", "v"]},
        base={"compute_dtype": "bfloat16"},
    )
    return make_run(folder / "run", recipe)[0]


def read_manifest(folder: Path) -> Any:
    return json.loads((folder / "merge.json").read_text())


@pytest.mark.slow
@seeded
@pytest.mark.parametrize("base", ["dequantized", "auto"])
def test_bfloat16_is_written_instead_with_a_warning(
    spoil: Callable[[dict[str, Tensor]], None], message: str, base: str, tmp_path: Path
) -> None:
    run, out, notes = make_spoiled_run(tmp_path, spoil), tmp_path / "out", NoteRecorder()
    result = merge.run(run.path, out=out, dtype=None, base=base, observer=notes)
    assert result.dtype == "bfloat16"
    assert message in result.dtype_reason
    assert any(
        note.startswith("WARNING: the model does not fit the range of float16")
        for note in notes.notes
    )
    assert read_manifest(out)["settings"]["dtype"] == "bfloat16"
    assert message in read_manifest(out)["dtype_reason"]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert verify(out, Run(run.path), CPU, Silent()).faults == ()


@seeded
def test_a_requested_float16_that_does_not_fit_exits_with_4(
    spoil: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    run, out = make_spoiled_run(tmp_path, spoil), tmp_path / "out"
    with pytest.raises(VerificationFailed) as caught:
        merge.run(run.path, out=out, dtype="float16", base="original", observer=Silent())
    assert message in str(caught.value)
    assert not out.exists()
    outcome = qlora("merge", run.path, "--out", out, "--dtype", "float16")
    assert outcome.code == 4
    assert "--dtype bfloat16" in outcome.err


def test_verify_finds_activations_that_overflow(tmp_path: Path) -> None:
    """Another program may write such a folder: each tensor is right, and the model computes NaN."""
    run, out = make_spoiled_run(tmp_path, overflow_activations), tmp_path / "out"
    tensors = open_merged_tensors(Run(run.path), "original", torch.float16, CPU)
    write_merged(tensors, tmp_path / "base", out, {}, Silent())
    (fault,) = verify(out, Run(run.path), CPU, Silent()).faults
    assert "the activations overflow in float16" in fault


def test_float16_is_the_default_and_its_fit_is_recorded(tmp_path: Path) -> None:
    run, out = make_spoiled_run(tmp_path, lambda _: None), tmp_path / "out"
    result = merge.run(run.path, out=out, dtype=None, base="original", observer=Silent())
    assert (result.dtype, result.dtype_reason) == (
        "float16",
        "the default; the model fits its range",
    )
    found = read_manifest(out)["float16"]
    assert 0 < found["largest_activation"] < torch.finfo(torch.float16).max
    assert 0 <= found["lost"] <= found["most_lost"] < 0.01
    assert found["in_tensor"] in load_file(out / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_dtype_is_written_on_request(dtype: str, tmp_path: Path) -> None:
    run, out = make_spoiled_run(tmp_path, overflow_weight), tmp_path / "out"
    result = merge.run(run.path, out=out, dtype=dtype, base="auto", observer=Silent())
    assert (result.dtype, result.dtype_reason) == (dtype, "requested")
    assert read_manifest(out)["float16"] is None
    found = load_file(out / "model.safetensors")
    assert {str(tensor.dtype) for tensor in found.values()} == {f"torch.{dtype}"}
    assert verify(out, Run(run.path), CPU, Silent()).faults == ()
