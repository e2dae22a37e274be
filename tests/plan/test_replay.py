"""A plan that imagines four blocks and repeats one says what a plan of all blocks says."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from qlora_cli.data.collate import largest_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.files.locate import read_config
from qlora_cli.plan import dry_run as planner
from qlora_cli.plan import replay
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.plan.recording import NUM_RECORDED_BLOCKS, NotAlike, Recording, repeat
from qlora_cli.plan.replay import MemoryPlan
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from tests.helpers.runs import make_base, make_recipe

BLOCKS = 9
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GPT2_SIZES: dict[str, Any] = {"n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
DEVICES = {
    "cpu": DeviceProfile("cpu", "a processor", 2**34),
    "ada": DeviceProfile("cuda", "a card", 2**34, (8, 9), 128),
    "turing": DeviceProfile("cuda", "an old card", 2**34, (7, 5), 40),
}
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


def recipe_of(bases: Any, family: str, more: dict[str, Any], facts: DeviceProfile) -> Recipe:
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
    return resolve(recipe, facts)[0]


def plan(recipe: Recipe, config: Any, facts: DeviceProfile) -> MemoryPlan:
    window = [largest_batch(48, recipe.train.micro_batch, config.vocab_size)] * 2
    return dry_run(recipe, config, facts, window, window[:1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_repeated_blocks_are_imagined_blocks(
    bases: Any, case: tuple[str, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, device, more = case
    facts = DEVICES[device]
    recipe = recipe_of(bases, family, more, facts)
    config = read_config(bases / family / "config.json")
    asked: list[int] = []
    monkeypatch.setattr(
        replay, "repeat", lambda segments, blocks: asked.append(blocks) or repeat(segments, blocks)
    )
    short = plan(recipe, config, facts)
    assert asked == [BLOCKS], "blocks were imagined, not repeated"
    monkeypatch.setattr(planner, "_blocks_may_be_alike", lambda *_: False)
    whole = plan(recipe, config, facts)
    assert asked == [BLOCKS]
    assert short.phases == whole.phases
    assert short.reserved_bytes == whole.reserved_bytes
    assert short.floor_bytes == whole.floor_bytes
    assert short.trainable_parameters == whole.trainable_parameters
    assert short.total_parameters == whole.total_parameters
    assert short.adapter_bytes == whole.adapter_bytes


def test_blocks_that_differ_are_all_imagined(bases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target in one block only: nothing may be repeated, and the plan knows it."""
    facts = DEVICES["ada"]
    recipe = recipe_of(bases, "llama", {}, facts)
    adapter = recipe.adapter.model_copy(update={"targets": ["model.layers.7.mlp.down_proj"]})
    recipe = recipe.model_copy(update={"adapter": adapter})
    monkeypatch.setattr(replay, "repeat", lambda *_: pytest.fail("repeated"))
    config = read_config(bases / "llama" / "config.json")
    assert plan(recipe, config, facts).trainable_parameters == 4 * (160 + 64)


def record(sizes: tuple[int, ...]) -> Recording:
    """One visit to each block, each with one storage that the next block frees."""
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


def test_a_recording_is_drawn_out_event_by_event() -> None:
    drawn_out = repeat(record((8,) * NUM_RECORDED_BLOCKS).segments, 7)
    whole = record((8,) * 7).segments
    assert [(v.block, v.events) for v in drawn_out] == [(v.block, v.events) for v in whole]


@pytest.mark.parametrize("sizes", [(8, 8, 16, 8), (8, 16, 16, 8), (4, 8, 8, 8)])
def test_a_recording_of_other_blocks_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(NotAlike):
        repeat(record(sizes).segments, 7)


def test_the_config_that_was_given_is_left_alone(bases: Any) -> None:
    config = read_config(bases / "llama" / "config.json")
    before = deepcopy(config).to_dict()
    plan(recipe_of(bases, "llama", {}, DEVICES["ada"]), config, DEVICES["ada"])
    assert config.to_dict() == before
