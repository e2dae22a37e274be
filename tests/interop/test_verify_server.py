"""`qlora verify --server` against llama-cpp-python's server. Skipped if it is not installed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from gguf import GGUFReader

from qlora_cli.events import Silent
from qlora_cli.export.gguf.write import export_gguf
from qlora_cli.files.locate import STARTER_FOLDER
from tests.helpers.cli_helpers import Outcome, qlora
from tests.helpers.llama_cpp_server import serve_file
from tests.helpers.runs import make_recipe, make_rows, make_run
from tests.helpers.vocabularies import byte_level_of, make_model_with_tokenizer, sentencepiece

pytest.importorskip("llama_cpp.server.app", reason="needs llama-cpp-python[server]")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Merge:
    """A run, its merge and the float16 GGUF file in it."""

    run: Path
    folder: Path
    file: Path


def merge(folder: Path, base: Path, rows: Path, spread: float) -> Merge:
    recipe = make_recipe(base, rows, data={"seq_len": 256})
    run, _ = make_run(folder / "run", recipe, spread=spread)
    words = ("merge", run.path, "--out", folder / "out", "--base", "original", "--gguf", "f16")
    outcome = qlora(*words)
    assert outcome.code == 0, outcome.err
    return Merge(run.path, folder / "out", folder / "out/model-F16.gguf")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """Return a merge of the embedded base, a trained model with a BOS token and a chat template."""
    folder = tmp_path_factory.mktemp("starter")
    lines = (STARTER_FOLDER / "held_out.jsonl").read_text().splitlines()[:4]
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n")
    return merge(folder, STARTER_FOLDER, rows, spread=0.02)


def check(made: Merge, file: Path, *words: str, served_with: tuple[str, ...] = ()) -> Outcome:
    with serve_file(file, *served_with) as url:
        return qlora(
            "verify", made.folder, "--against", made.run, "--server", url, *words, "--json"
        )


def faults(outcome: Outcome) -> str:
    assert outcome.code == 4, outcome.out + outcome.err
    return "\n".join(outcome.json["faults"])


def test_a_correct_server_passes(made: Merge) -> None:
    """The server applies a repetition penalty of 1.1 to requests that do not ask for none."""
    outcome = check(made, made.file, "--bits", "8")
    assert outcome.code == 0, outcome.out + outcome.err
    result = outcome.json
    assert (result["texts"], result["chats"]) == (4, 4)
    assert result["mean_gap"] < 1e-3
    assert result["mean_logprob_difference"] < 0.01


def test_a_correct_server_without_log_probabilities_passes(made: Merge) -> None:
    served_with = ("--logits_all", "False")
    outcome = check(made, made.file, served_with=served_with)
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.json["mean_logprob_difference"] is None
    assert outcome.json["mean_gap"] < 1e-3
    assert check(made, made.file, "--bits", "8", served_with=served_with).code == 2


@pytest.mark.parametrize("kind", ["gpt-2", "sentencepiece"])
def test_a_correct_server_of_a_random_model_passes(kind: str, tmp_path: Path) -> None:
    """Its answers contain bytes that are no character, which the server omits."""
    tokenizer = sentencepiece() if kind == "sentencepiece" else byte_level_of(kind)
    base = make_model_with_tokenizer(tmp_path / "base", "llama", tokenizer, spread=0.3)
    found = merge(tmp_path, base, make_rows(tmp_path / "rows.jsonl", num=3), spread=0.2)
    outcome = check(found, found.file)
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.json["mean_gap"] < 1e-3


def test_a_stronger_quantization_is_named(made: Merge) -> None:
    file = export_gguf(made.folder, "q4_k_m", Silent())
    assert check(made, file).code == 0
    assert "quantization: the answers differ" in faults(check(made, file, "--bits", "8"))


def test_the_base_in_place_of_the_merge_is_named(made: Merge, tmp_path: Path) -> None:
    shutil.copytree(STARTER_FOLDER, tmp_path / "base")
    file = export_gguf(tmp_path / "base", "f16", Silent())
    text = faults(check(made, file))
    assert "weights: the base without the adapter explains the server's answers" in text


def test_another_template_is_named(made: Merge) -> None:
    text = faults(check(made, made.file, served_with=("--chat_format", "llama-2")))
    assert "template: the server " in text
    assert "weights" not in text


def test_a_missing_bos_token_is_named(made: Merge, tmp_path: Path) -> None:
    file = Path(shutil.copy(made.file, tmp_path / "no-bos.gguf"))
    field = GGUFReader(file, "r+").get_field("tokenizer.ggml.add_bos_token")
    assert field is not None
    field.parts[-1][0] = False
    text = faults(check(made, file))
    assert "special tokens: the server omits the BOS token (4 of 4 texts)" in text
    assert "weights" not in text
