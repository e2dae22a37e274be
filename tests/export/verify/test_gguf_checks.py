"""`verify` compares the GGUF files in a merged folder, and names a damaged one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_cli.events import Silent
from qlora_cli.export.gguf.plan import GgufPlan
from qlora_cli.export.gguf.quantized import quantized_faults
from qlora_cli.export.gguf.write import export_gguf
from qlora_cli.export.verify.gguf_checks import gguf_file_faults
from qlora_cli.export.verify.record import RECORD, read_record
from tests.helpers.cli_helpers import qlora
from tests.helpers.runs import make_recipe, make_rows, make_run
from tests.helpers.vocabularies import make_model_with_tokenizer

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model_with_tokenizer(tmp_path_factory.mktemp("model") / "model", "llama")
    export_gguf(folder, "f16", Silent())
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def faults(folder: Path) -> str:
    return "\n".join(gguf_file_faults(folder, can_compare=True, observer=Silent()))


def test_a_correct_file_has_no_fault_under_either_check(folder: Path) -> None:
    assert faults(folder) == ""
    (folder / "model-F16.gguf").rename(folder / "renamed.gguf")
    assert faults(folder) == ""


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\0" * 4096, "is not a GGUF file")]
)
def test_an_empty_file_and_zero_bytes_are_faults(
    content: bytes, message: str, folder: Path
) -> None:
    (folder / "model-F16.gguf").write_bytes(content)
    assert f"model-F16.gguf {message}" in faults(folder)


@pytest.mark.parametrize("name", ["model-F16.gguf", "model-Q4_K_M.gguf"])
def test_zeros_in_place_of_a_tensor_are_a_fault(name: str, folder: Path) -> None:
    file = (folder / "model-F16.gguf").rename(folder / name)
    (tensor,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.attn_q.weight")
    content = bytearray(file.read_bytes())
    content[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = bytes(int(tensor.n_bytes))
    file.write_bytes(content)
    assert f"{name}: blk.1.attn_q.weight differs from the merged" in faults(folder)


@pytest.mark.parametrize("name", ["model-F16.gguf", "model-Q4_K_M.gguf"])
def test_a_file_that_was_cut_short_is_a_fault(name: str, folder: Path) -> None:
    file = (folder / "model-F16.gguf").rename(folder / name)
    file.write_bytes(file.read_bytes()[:-4096])
    assert f"{name}: the file cannot be read" in faults(folder)


def test_another_quantization_passes_within_its_error(folder: Path) -> None:
    file = folder / "model-F16.gguf"
    file.unlink()
    written = export_gguf(folder, "q8_0", Silent())
    plan = GgufPlan(folder, "f16")
    assert list(quantized_faults(written, plan, Silent())) == []
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    tensor = next(t for t in gguf.GGUFReader(written).tensors if t.tensor_type == q8_0)
    content = bytearray(written.read_bytes())
    middle = tensor.data_offset + int(tensor.n_bytes) // 2
    content[tensor.data_offset : middle] = bytes(middle - tensor.data_offset)
    written.write_bytes(content)
    (fault,) = quantized_faults(written, plan, Silent())
    assert "more than Q8_0 does" in fault


@pytest.mark.slow
def test_verify_fails_for_a_damaged_file_and_records_its_result(tmp_path: Path) -> None:
    base = make_model_with_tokenizer(tmp_path / "base", "llama")
    run, _ = make_run(tmp_path / "run", make_recipe(base, make_rows(tmp_path / "rows.jsonl")))
    out = tmp_path / "out"
    assert qlora("merge", run.path, "--out", out, "--gguf", "f16").code == 0
    assert read_record(out) is None
    outcome = qlora("verify", out, "--against", run.path)
    assert outcome.code == 0, outcome.err
    assert "Checked: the mean KL may be up to" in outcome.out
    record = read_record(out)
    assert record is not None
    assert record["passed"] is True
    assert record["explanation"]

    (out / "model-F16.gguf").write_bytes(b"")
    outcome = qlora("verify", out, "--against", run.path, "--json")
    assert outcome.code == 4
    assert outcome.json["faults"] == [
        "model-F16.gguf is empty; remove it and merge again with --gguf"
    ]
    assert json.loads((out / RECORD).read_text())["passed"] is False
