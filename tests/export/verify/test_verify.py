"""`verify` passes a correct merge and names each kind of fault that merges can have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.adapters.adapted_modules import adapted_layers
from qlora_cli.errors import UsageError
from qlora_cli.events import Silent
from qlora_cli.export.compare.eval_rows import EvalRows
from qlora_cli.export.compare.logit_comparison import Comparison
from qlora_cli.export.merge.open_tensors import open_merged_tensors
from qlora_cli.export.merge.write import write_merged
from qlora_cli.export.options import MergeBase
from qlora_cli.export.verify.prediction_checks import divergence_faults
from qlora_cli.export.verify.verification import VerificationReport, verify
from qlora_cli.jobs import verify as job
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.run import Run
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import CPU, make_base, make_recipe, make_rows, make_run

torch.set_num_threads(1)
ADAPTED = "model.layers.1.self_attn.q_proj"


def test_the_fault_of_different_predictions_names_a_merge_that_helps() -> None:
    rows = EvalRows([], "3 rows", True, (), False)
    far = Comparison(1.0, 0.5, 0.5, 1.0, 1.0)
    (changed,) = divergence_faults(rows, 0.01, far, is_base_changed=True)
    assert changed.endswith("merge again with --base dequantized")
    (rounded,) = divergence_faults(rows, 0.01, far, is_base_changed=False)
    assert rounded.endswith("merge again")


@dataclass(frozen=True)
class World:
    """A base, a run on it and its merge in several shards. other: a run with other values."""

    base: Path
    run: RunFolder
    other: RunFolder
    merged: Path
    delta: Tensor


def merge(
    run: RunFolder, out: Path, kind: MergeBase = "dequantized", shard_bytes: int = 60_000
) -> Path:
    tensors = open_merged_tensors(Run(run.path), kind, torch.float16, CPU)
    base = Path(run.read()["base_folder"])
    write_merged(tensors, base, out, {}, Silent(), max_shard_bytes=shard_bytes)
    return out


def check(merged: Path, run: RunFolder) -> VerificationReport:
    return verify(merged, Run(run.path), CPU, Silent())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Use Qwen2, because its q, k and v have biases, with a tied head, which may become stale."""
    folder = tmp_path_factory.mktemp("world")
    base = make_base(folder / "base", "qwen2", tied=True)
    recipe = make_recipe(base, make_rows(folder / "rows.jsonl"))
    run, loaded = make_run(folder / "run", recipe)
    other, _ = make_run(folder / "other", recipe, seed=4)
    delta = dict(adapted_layers(loaded.model))[ADAPTED].delta()
    return World(base, run, other, merge(run, folder / "merged"), delta)


@pytest.fixture
def merged(world: World, tmp_path: Path) -> Path:
    """Return a copy of the merged folder for the test to change."""
    return Path(shutil.copytree(world.merged, tmp_path / "merged"))


def change(merged: Path, name: str, new: Callable[[Tensor], dict[str, Tensor]]) -> None:
    """Replace a tensor by the tensors that `new` returns for it, in its file and in the index."""
    index = merged / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = merged / content["weight_map"].pop(name)
    tensors = load_file(file)
    made = new(tensors.pop(name))
    content["weight_map"].update(dict.fromkeys(made, file.name))
    index.write_text(json.dumps(content))
    save_file({**tensors, **made}, file, metadata={"format": "pt"})


def edit(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def flip_lowest_bit(tensor: Tensor) -> Tensor:
    bits = tensor.clone().view(torch.int16)
    bits.view(-1)[17] ^= 1
    return bits.view(tensor.dtype)


def drop_layer(world: World, merged: Path) -> None:
    tensors = open_merged_tensors(Run(world.run.path), "dequantized", torch.float16, CPU)
    alone = replace(tensors, adapter=None).compute(f"{ADAPTED}.weight")
    change(merged, f"{ADAPTED}.weight", lambda _: {f"{ADAPTED}.weight": alone})


def transpose_b(world: World, merged: Path) -> None:
    def transposed(tensor: Tensor) -> dict[str, Tensor]:
        wrong = tensor.float() - world.delta + world.delta.t()
        return {f"{ADAPTED}.weight": wrong.to(tensor.dtype)}

    change(merged, f"{ADAPTED}.weight", transposed)


def take_shard_of_another_run(world: World, merged: Path) -> None:
    foreign = merge(world.other, merged.with_name("foreign"))
    name = sorted(path.name for path in foreign.glob("*.safetensors"))[1]
    shutil.copy(foreign / name, merged / name)


def add_stale_head(world: World, merged: Path) -> None:
    name = "model.embed_tokens.weight"
    change(merged, name, lambda table: {name: table, "lm_head.weight": table + 1})


def lose_bias(world: World, merged: Path) -> None:
    change(merged, f"{ADAPTED}.bias", lambda _: {})


def lengthen_key(world: World, merged: Path) -> None:
    change(merged, f"{ADAPTED}.weight", lambda tensor: {f"model.{ADAPTED}.weight": tensor})


def resize_vocabulary(world: World, merged: Path) -> None:
    name = "model.embed_tokens.weight"
    change(merged, name, lambda table: {name: torch.cat([table, table[:5]])})
    edit(merged / "config.json", vocab_size=264)


def change_special_token(world: World, merged: Path) -> None:
    edit(merged / "tokenizer_config.json", eos_token="<s>")


def change_end_of_generation(world: World, merged: Path) -> None:
    edit(merged / "generation_config.json", eos_token_id=1)


def change_end_in_config(world: World, merged: Path) -> None:
    edit(merged / "config.json", eos_token_id=1)


def lose_template(world: World, merged: Path) -> None:
    (merged / "chat_template.jinja").unlink()


def change_dtype_of_one(world: World, merged: Path) -> None:
    name = "model.norm.weight"
    change(merged, name, lambda tensor: {name: tensor.bfloat16()})


def claim_another_dtype(world: World, merged: Path) -> None:
    edit(merged / "config.json", dtype="bfloat16")


def flip_bit_of_sum(world: World, merged: Path) -> None:
    name = f"{ADAPTED}.weight"
    change(merged, name, lambda tensor: {name: flip_lowest_bit(tensor)})


def flip_bit_of_copy(world: World, merged: Path) -> None:
    name = "model.embed_tokens.weight"
    change(merged, name, lambda tensor: {name: flip_lowest_bit(tensor)})


def cut_shard(world: World, merged: Path) -> None:
    shard = sorted(merged.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-7])


def lose_shard(world: World, merged: Path) -> None:
    sorted(merged.glob("*.safetensors"))[0].unlink()


def leave_an_adapter(world: World, merged: Path) -> None:
    """transformers would add the adapter a second time."""
    for file in world.run.adapter.iterdir():
        shutil.copy(file, merged)


def leave_a_single_file(world: World, merged: Path) -> None:
    """transformers would load this file instead of the shards."""
    foreign = merge(world.other, merged.with_name("foreign"), shard_bytes=10**9)
    shutil.copy(foreign / "model.safetensors", merged)


def list_a_wrong_file_in_the_index(world: World, merged: Path) -> None:
    index = merged / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = content["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(content))


def lose_a_null(world: World, merged: Path) -> None:
    """The config class may have another default for this key than null."""
    config = json.loads((merged / "config.json").read_text())
    lost = next(key for key, value in config.items() if value is None)
    del config[lost]
    (merged / "config.json").write_text(json.dumps(config))


def damage(content: str) -> Callable[[World, Path], None]:
    def damaged(world: World, merged: Path) -> None:
        (merged / "merge.json").write_text(content)

    return damaged


BAD_DTYPE = '{"settings": {"base": "original", "dtype": "float17", "adapters": []}}'
FAULTS: list[tuple[Callable[[World, Path], None], str]] = [
    (drop_layer, f"{ADAPTED}.weight equals the base's tensor, the adapter's layer was not added"),
    (transpose_b, f"{ADAPTED}.weight differs from base + scaling B A in"),
    (take_shard_of_another_run, "differs from base + scaling B A in"),
    (add_stale_head, "lm_head.weight does not belong to this model"),
    (lose_bias, f"{ADAPTED}.bias is missing"),
    (lengthen_key, f"model.{ADAPTED}.weight does not belong to this model"),
    (resize_vocabulary, "model.embed_tokens.weight has shape (264, 64); it must be (259, 64)"),
    (change_special_token, 'eos_token is "<s>"; it must be "</s>"'),
    (change_end_of_generation, "generation_config.json differs from the base's: eos_token_id is 1"),
    (change_end_in_config, "config.json: eos_token_id is 1; it must be 2"),
    (lose_template, "chat_template.jinja is missing; copy it from the base"),
    (change_dtype_of_one, "model.norm.weight is bfloat16; it must be float16"),
    (claim_another_dtype, 'config.json: dtype is "bfloat16"; it must be "float16"'),
    (flip_bit_of_sum, f"{ADAPTED}.weight differs from base + scaling B A in 1 of 4,096 values"),
    (flip_bit_of_copy, "embed_tokens.weight differs from the base's tensor in 1 of 16,576 values"),
    (cut_shard, "damaged safetensors file"),
    (lose_shard, "missing model-00001-of"),
    (leave_an_adapter, "adapter_config.json does not belong to the merged model"),
    (
        leave_a_single_file,
        "model-00001-of-00003.safetensors does not belong to the merged model",
    ),
    (
        list_a_wrong_file_in_the_index,
        "model.safetensors.index.json: model.norm.weight is listed in",
    ),
    (lose_a_null, "is absent; it must be null"),
    *((damage(content), "merge.json is damaged") for content in ("", "[]", "{}", BAD_DTYPE)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"), FAULTS, ids=lambda item: getattr(item, "__name__", "")
)
def test_a_seeded_fault_is_named(
    world: World, merged: Path, spoil: Callable[[World, Path], None], message: str
) -> None:
    spoil(world, merged)
    verdict = check(merged, world.run)
    assert not verdict.passed
    assert any(message in fault for fault in verdict.faults), verdict.faults


def test_a_merge_with_a_wrong_alpha_fails(world: World, tmp_path: Path) -> None:
    rows = Path(world.run.read()["recipe"]["data"]["train"])
    recipe = make_recipe(world.base, rows, adapter={"alpha": 7.0})
    wrong, _ = make_run(tmp_path / "wrong", recipe)
    verdict = check(merge(wrong, tmp_path / "merged"), world.run)
    assert "o_proj.weight differs from base + scaling B A in" in " ".join(verdict.faults)
    changed = "the run's adapter is not the one in merge.json"
    assert any(fault.startswith(changed) for fault in verdict.faults)


def test_an_empty_adapter_fails(world: World, merged: Path, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(world.run.path, tmp_path / "run")))
    save_file({}, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    verdict = check(merged, run)
    assert "an empty adapter" in verdict.faults[0]


def test_many_faults_are_counted(world: World, tmp_path: Path) -> None:
    verdict = check(merge(world.other, tmp_path / "merged"), world.run)
    assert len(verdict.faults) == 11
    assert verdict.faults[-1] == "and 6 more"


CORRECT: list[tuple[str, int, MergeBase]] = [
    *((family, 4, "dequantized") for family in MODEL_TYPES),
    ("gpt2", 8, "dequantized"),
    ("qwen3", 8, "dequantized"),
    ("llama", 16, "original"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "bits", "kind"), CORRECT)
def test_a_correct_merge_passes(family: str, bits: int, kind: MergeBase, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    recipe = make_recipe(base, make_rows(tmp_path / "rows.jsonl"), base={"bits": bits})
    run, _ = make_run(tmp_path / "run", recipe)
    verdict = check(merge(run, tmp_path / "merged", kind), run)
    assert verdict.faults == ()
    assert verdict.comparison is not None
    # Training with int8 also rounds activations; the merged model does not.
    assert verdict.comparison.mean_kl < (1e-4 if bits != 8 else 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "gpt_nano_sort", "books-gpt2"])
@pytest.mark.parametrize("kind", ["original", "dequantized"])
def test_a_correct_merge_of_a_pretrained_model_passes(
    name: str, kind: MergeBase, shared: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(
        shared / "data" / "models" / name,
        make_rows(tmp_path / "rows.jsonl"),
        base={"compute_dtype": "bfloat16"},
    )
    run, _ = make_run(tmp_path / "run", recipe, spread=0.005)
    assert check(merge(run, tmp_path / "merged", kind), run).faults == ()


def test_the_job_returns_figures_and_passes(world: World) -> None:
    result = job.run(world.merged, against=world.run.path, observer=Silent())
    assert (result.passed, result.faults) == (True, ())
    assert result.top1_agreement > 0.95
    assert 0 < result.max_logit_difference < 0.1
    assert 0 <= result.mean_kl < 1e-4


def test_a_folder_without_a_model_or_a_run_is_a_usage_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a model's folder"):
        job.run(tmp_path, against=world.run.path, observer=Silent())
    with pytest.raises(UsageError, match="is not a run's folder"):
        job.run(world.merged, against=tmp_path, observer=Silent())
