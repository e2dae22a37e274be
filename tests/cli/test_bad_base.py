"""A base model that cannot be used: exit code 2, and the name of the file at fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qlora_cli.files.source import WEIGHTS_FILE, WEIGHTS_INDEX
from tests.helpers.cli_checks import assert_folder_is_usable, assert_refused, truncate
from tests.helpers.cli_helpers import qlora

pytestmark = pytest.mark.slow


def test_a_missing_base_is_refused(job_recipe: Path, tiny_base: Path) -> None:
    missing = tiny_base.with_name(f"{tiny_base.name}x")
    assert_refused(
        qlora("train", job_recipe, f"model.name={missing}"), 2, f"no folder {missing}", tiny_base
    )
    assert_refused(
        qlora("train", job_recipe, "model.name=nobody/nothing"), 2, "model.name", "nobody/nothing"
    )
    assert_refused(
        qlora("train", job_recipe, f"model.name={job_recipe.parent}"), 2, "no config.json"
    )
    assert_folder_is_usable(job_recipe)


def test_a_model_type_without_proof_is_refused_with_the_reason(
    job_recipe: Path, tiny_base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = {"model_type": "roberta", "vocab_size": 300, "num_attention_heads": 1, **sizes}
    (other / "config.json").write_text(json.dumps(config))
    for command in ("train", "plan"):
        outcome = qlora(command, job_recipe, f"model.name={other}")
        assert_refused(
            outcome,
            2,
            "'roberta' is not supported",
            "no is_decoder: true",
            "task: classification",
            "llama",
        )
    assert_folder_is_usable(job_recipe)


def test_an_invalid_config_is_refused(job_recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    for text in ("{", "[]", "{}", '{"model_type": "no-such-model"}'):
        (other / "config.json").write_text(text)
        assert_refused(qlora("train", job_recipe, f"model.name={other}"), 2, other / "config.json")
    assert_folder_is_usable(job_recipe)


def test_unknown_targets_are_refused_with_the_valid_roles(job_recipe: Path) -> None:
    outcome = qlora("train", job_recipe, "adapter.targets=[q, query, model.layers.0.attn]")
    words = ("'query'", "'model.layers.0.attn'", "roles of this model: q, k, v, o, gate, up, down")
    assert_refused(outcome, 2, "adapter.targets", *words)
    assert_folder_is_usable(job_recipe)


def _garbage(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"\xff" * 40 + content[48:])


def _no_header(file: Path) -> None:
    file.write_bytes(b"\x01")


def _endless_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


@pytest.mark.parametrize("damage", [truncate, _garbage, _no_header, _endless_header])
def test_a_damaged_safetensors_file_is_refused(
    job_recipe: Path, tiny_base: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    damage(other / WEIGHTS_FILE)
    for command in (
        ("train", job_recipe, f"model.name={other}"),
        ("generate", other, "--prompt", "x"),
    ):
        assert_refused(
            qlora(*command), 2, other / WEIGHTS_FILE, "damaged safetensors file", "fetch the file"
        )
    assert_folder_is_usable(job_recipe)


def test_a_missing_shard_and_a_damaged_index_are_refused(
    job_recipe: Path, sharded_base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(sharded_base, tmp_path / "other")
    shard = sorted(other.glob("model-*.safetensors"))[1]
    shard.unlink()

    def assert_both_refused(*words: str | Path) -> None:
        for command in ("train", "plan"):
            assert_refused(qlora(command, job_recipe, f"model.name={other}"), 2, *words)

    assert_both_refused(other, f"missing {shard.name}")
    (other / WEIGHTS_INDEX).write_text("{}")
    assert_both_refused(other / WEIGHTS_INDEX, "damaged index")
    for foreign in ("../outside.safetensors", "/outside.safetensors"):
        (other / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": foreign}}))
        assert_both_refused(other / WEIGHTS_INDEX, f"{foreign} is not a file in this folder")
    assert_folder_is_usable(job_recipe)


def test_a_plan_needs_no_weights_of_an_index(
    job_recipe: Path, sharded_base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(sharded_base, tmp_path / "other")
    for shard in other.glob("model-*.safetensors"):
        shard.unlink()
    assert qlora("plan", job_recipe, f"model.name={other}", "--vram", "8GiB").code == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_by_every_command(
    job_recipe: Path, tiny_base: Path, tmp_path: Path, value: float
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(other / WEIGHTS_FILE)
    weights[name][3, 5] = value
    save_file(weights, other / WEIGHTS_FILE, metadata={"format": "pt"})
    commands: list[list[str | Path]] = [
        ["train", job_recipe, f"model.name={other}"],
        ["eval", other, "--data", "starter:held_out"],
        ["generate", other, "--prompt", "a"],
    ]
    for command in commands:
        outcome = qlora(*command)
        assert_refused(outcome, 2, other / WEIGHTS_FILE, name, "values that are not finite")
    assert_folder_is_usable(job_recipe)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"hidden_size": -64},
        {"num_hidden_layers": 0},
        {"num_key_value_heads": 3},
        {"dtype": "float8_e4m3fn"},
    ],
    ids=str,
)
def test_a_config_with_an_invalid_value_is_refused(
    job_recipe: Path, tiny_base: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    file = other / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for command in ("plan", "train"):
        assert_refused(
            qlora(command, job_recipe, f"model.name={other}"), 2, file, "describes no model"
        )


def test_an_impossible_gpu_size_and_an_unknown_gpu_are_refused(job_recipe: Path) -> None:
    outcome = qlora("plan", job_recipe, "--vram", "24B")
    assert outcome.code == 2
    assert "write it with its unit, 24GiB" in outcome.err
    outcome = qlora("plan", job_recipe, "--vram", "RTX 4091")
    assert outcome.code == 2
    assert "neither a size nor a known GPU" in outcome.err


def test_tensors_that_do_not_match_the_config_are_refused(
    job_recipe: Path, tiny_base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    for change, words in (
        ({"num_hidden_layers": 3}, ("missing: model.layers.2",)),
        ({"intermediate_size": 64}, ("(96, 64) in the checkpoint and (64, 64) by its config",)),
    ):
        (other / "config.json").write_text(json.dumps(config | change))
        assert_refused(qlora("train", job_recipe, f"model.name={other}"), 2, "model.name", *words)
    assert_folder_is_usable(job_recipe)
