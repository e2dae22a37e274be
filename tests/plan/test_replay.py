"""A plan that runs four blocks and repeats one equals a plan that runs all blocks."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from transformers import AutoConfig

from qlora_cli.data.collate import largest_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.files.locate import read_config
from qlora_cli.plan import dry_run as planner
from qlora_cli.plan import replay
from qlora_cli.plan.block_groups import NUM_RECORDED_GROUPS
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.recording import Recording
from qlora_cli.plan.repeat import NotAlike, repeat
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.plan.step_time import micro_batches
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from tests.helpers.marks import slow_after_first
from tests.helpers.runs import make_base, make_recipe

pytestmark = pytest.mark.slow

BLOCKS = 9
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2_SIZES: dict[str, Any] = {"n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
DEVICES = {
    "cpu": DeviceProfile("cpu", "a CPU", 2**34),
    "ada": DeviceProfile("cuda", "a GPU", 2**34, (8, 9), 128),
    "turing": DeviceProfile("cuda", "an old GPU", 2**34, (7, 5), 40),
}
IN_BACKWARD = {"update_in_backward": True, "grad_accum": 1, "max_grad_norm": None}
CASES = [
    # family, device, more
    ("llama", "ada", {}),
    ("llama", "cpu", {"adapter": {"dropout": 0.1}}),
    ("llama", "turing", {"train": {"activation_checkpointing": False}}),
    ("llama", "ada", {"base": {"bits": 8}, "train": {"optimizer": "adamw8bit"}}),
    ("llama", "ada", {"base": {"bits": 16}, "adapter": {"method": "full"}}),
    (
        "llama",
        "cpu",
        {"base": {"bits": 16, "compute_dtype": "bfloat16"}, "adapter": {"method": "full"}},
    ),
    ("mistral", "ada", {"adapter": {"dtype": "float16"}, "base": {"double_quant": False}}),
    ("qwen2", "cpu", {"base": {"bits": 8}}),
    ("qwen2", "ada", {"train": {"activation_checkpointing": False, "micro_batch": 2}}),
    ("qwen3", "ada", {"adapter": {"targets": ["q", "v"]}}),
    ("llama", "ada", {"train": IN_BACKWARD}),
    ("llama", "ada", {"base": {"residency": "host"}, "train": IN_BACKWARD}),
    ("qwen2", "cpu", {"train": {**IN_BACKWARD, "optimizer": "adamw8bit"}}),
    (
        "gpt2",
        "ada",
        {"base": {"bits": 16}, "adapter": {"method": "full"}, "train": IN_BACKWARD},
    ),
    ("gpt2", "ada", {}),
    ("gpt2", "cpu", {"train": {"activation_checkpointing": False}}),
    ("gpt2", "turing", {"base": {"bits": 16}, "adapter": {"method": "full"}}),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bases")
    for family in ("llama", "mistral", "qwen2", "qwen3", "gpt2"):
        sizes = GPT2_SIZES if family == "gpt2" else SIZES
        make_base(folder / family, family, tied=family == "qwen2", **sizes)
    return folder


def recipe_of(bases: Any, family: str, more: dict[str, Any], profile: DeviceProfile) -> Recipe:
    adapter = {"rank": 4, "targets": "all", **more.get("adapter", {})}
    if adapter.get("method") == "full":
        adapter = {"method": "full"}
    recipe = make_recipe(
        bases / family,
        bases / "rows.jsonl",
        base={"bits": 4, "compute_dtype": "auto", **more.get("base", {})},
        adapter=adapter,
        data={"seq_len": 48},
        train={"micro_batch": 1, "grad_accum": 2, **more.get("train", {})},
    )
    return resolve(recipe, profile)[0]


def plan(recipe: Recipe, config: Any, profile: DeviceProfile) -> MemoryPlan:
    number = min(2, recipe.train.grad_accum)
    batches = [largest_batch(48, recipe.train.micro_batch, config.vocab_size)] * number
    return dry_run(recipe, config, profile, batches, batches[:1])


@pytest.mark.parametrize(
    "case", slow_after_first(CASES), ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}"
)
def test_repeated_blocks_equal_blocks_that_ran(
    bases: Any, case: tuple[str, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, device, more = case
    profile = DEVICES[device]
    recipe = recipe_of(bases, family, more, profile)
    config = read_config(bases / family / "config.json")
    added: list[int] = []
    monkeypatch.setattr(replay, "repeat", lambda *given: added.append(given[2]) or repeat(*given))
    short = plan(recipe, config, profile)
    assert added == [BLOCKS - NUM_RECORDED_GROUPS], "all blocks ran, none was repeated"
    monkeypatch.setattr(planner, "groups_of", lambda *_: None)
    complete = plan(recipe, config, profile)
    assert len(added) == 1
    assert short.phases == complete.phases
    assert short.reserved_bytes == complete.reserved_bytes
    assert short.floor_bytes == complete.floor_bytes
    assert short.trainable_parameters == complete.trainable_parameters
    assert short.total_parameters == complete.total_parameters
    assert short.adapter_bytes == complete.adapter_bytes
    assert micro_batches(short.segments) == micro_batches(complete.segments)


@pytest.mark.parametrize(
    ("model_type", "settings", "recorded"),
    [
        ("gemma2", {"num_hidden_layers": 14}, 8),
        ("qwen3_moe", {"num_hidden_layers": 9, "mlp_only_layers": [0], **EXPERTS}, 5),
        ("qwen3_5_text", {"num_hidden_layers": 20}, 16),
    ],
)
def test_repeated_groups_equal_blocks_that_ran(
    model_type: str, settings: dict[str, Any], recorded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model(model_type, **{**sizes, **heads, **settings})
    profile = DEVICES["cpu"]
    content = {"model": {"name": "x"}, "data": {"train": "", "seq_len": 48}}
    content |= {"train": {"activation_checkpointing": True}}
    recipe = resolve(Recipe.model_validate(content), profile)[0]
    groups = planner.groups_of(recipe, config)
    assert groups is not None
    assert groups.num_recorded_blocks == recorded
    short = plan(recipe, config, profile)
    monkeypatch.setattr(planner, "groups_of", lambda *_: None)
    complete = plan(recipe, config, profile)
    assert short.phases == complete.phases
    assert short.trainable_parameters == complete.trainable_parameters
    assert short.total_parameters == complete.total_parameters
    assert short.adapter_bytes == complete.adapter_bytes
    assert short.floor_bytes <= complete.floor_bytes


@pytest.mark.slow
def test_blocks_that_differ_all_run(bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a target in one block only, no block may be repeated."""
    profile = DEVICES["ada"]
    recipe = recipe_of(bases, "llama", {}, profile)
    adapter = recipe.adapter.model_copy(update={"targets": ["model.layers.7.mlp.down_proj"]})
    recipe = recipe.model_copy(update={"adapter": adapter})
    monkeypatch.setattr(replay, "repeat", lambda *_: pytest.fail("repeated"))
    config = read_config(bases / "llama" / "config.json")
    assert plan(recipe, config, profile).trainable_parameters == 4 * (160 + 64)


def record(sizes: tuple[int, ...]) -> Recording:
    """Record one segment per block, each with one storage that the next block frees."""
    recording = Recording()
    recording.blocks = "blocks"
    recording.begin_phase()
    for block, size in enumerate(sizes):
        recording.enter_module(f"blocks.{block}.linear")
        recording.allocate(block, size, "activations")
        if block:
            recording.free(block - 1)
    recording.end_phase("step")
    return recording


def test_a_recording_is_extended_event_by_event() -> None:
    extended = repeat(record((8,) * NUM_RECORDED_GROUPS).segments, 1, 3)
    complete = record((8,) * 7).segments
    assert [(v.block, v.events) for v in extended] == [(v.block, v.events) for v in complete]


@pytest.mark.parametrize("sizes", [(8, 8, 16, 8), (8, 16, 16, 8), (4, 8, 8, 8)])
def test_blocks_with_different_events_are_not_repeated(sizes: tuple[int, ...]) -> None:
    with pytest.raises(NotAlike):
        repeat(record(sizes).segments, 1, 3)


def test_the_config_is_not_modified(bases: Any) -> None:
    config = read_config(bases / "llama" / "config.json")
    before = deepcopy(config).to_dict()
    plan(recipe_of(bases, "llama", {}, DEVICES["ada"]), config, DEVICES["ada"])
    assert config.to_dict() == before
