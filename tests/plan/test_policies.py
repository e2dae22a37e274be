"""The plan of every activation policy, the policy that is chosen, and the chunk of the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qlora_cli.data.collate import largest_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.nn.input_offload import InputOffload
from qlora_cli.plan import dry_run as planning
from qlora_cli.plan import planner as planner_module
from qlora_cli.plan.dry_run import DryRun
from qlora_cli.plan.limit import GPU_SHARE, limit_of
from qlora_cli.plan.planner import Planner
from qlora_cli.plan.policy import MIN_CHUNK
from qlora_cli.plan.search import largest_that_fits
from qlora_cli.plan.settle import Settled
from qlora_cli.plan.speeds import nominal_speed
from qlora_cli.recipe.activations import OFFLOAD_KEY
from qlora_cli.recipe.resolve import resolve
from qlora_cli.recipe.schema import Recipe
from qlora_cli.units import MIB
from tests.helpers.marks import slow_after_first

BLOCKS = 9
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
GPU = DeviceProfile("cuda", "a GPU", 2**34, (8, 9), 128)
CPU = DeviceProfile("cpu", "a CPU", 2**34)
FULL = {"base": {"bits": 16}, "adapter": {"method": "full"}}
CASES = [
    ("llama", GPU, {}),
    ("gpt2", CPU, FULL),
    ("gemma2", CPU, {}),
    ("llama", GPU, {"base": {"residency": "host"}}),
    ("llama", replace(GPU, count=4), {"base": {"residency": "shard"}}),
    ("gemma2", replace(CPU, count=2), {"base": {"residency": "shard"}}),
]


def config_of(family: str, **more: int) -> Any:
    names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }
    sizes = {names.get(key, key): value for key, value in SIZES.items()}
    return AutoConfig.for_model(family, **{**(sizes if family == "gpt2" else SIZES), **more})


def recipe_of(profile: DeviceProfile, seq_len: int = 512, **sections: Any) -> Recipe:
    content: dict[str, Any] = {
        "model": {"name": "x"},
        "base": {"residency": "device"},
        "adapter": {"targets": "all"},
        "data": {"train": "", "seq_len": seq_len},
    }
    merged = content | {key: {**content.get(key, {}), **value} for key, value in sections.items()}
    if sections.get("adapter", {}).get("method") == "full":
        merged["adapter"] = {"method": "full"}
    return resolve(Recipe.model_validate(merged), profile)[0]


def settled(capacity: int, seq_len: int = 512, **train: Any) -> Settled:
    """Settle a recipe for a GPU of this capacity."""
    profile = replace(GPU, capacity_bytes=capacity)
    return Planner(config_of("llama"), profile).settle(recipe_of(profile, seq_len, train=train))


def needed(number: int, chunk: int, seq_len: int = 512) -> int:
    """Return what the policy that recomputes `number` blocks needs."""
    train = {"activation_checkpointing": number, "loss_chunk": chunk}
    return settled(2**34, seq_len, **train).plan.needed_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", slow_after_first(CASES), ids=lambda case: f"{case[0]}-{case[1].kind}"
)
def test_a_plan_of_a_few_groups_equals_that_of_all_blocks(
    case: tuple[str, DeviceProfile, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same peaks, reserved bytes and operations, for few and many recomputed blocks."""
    family, profile, sections = case
    config, recipe = config_of(family), recipe_of(profile, 48, **sections)
    if family == "gemma2":  # Groups of two blocks.
        config = config_of(family, num_hidden_layers=14 if profile.count == 1 else 18)
    batch = largest_batch(48, 1, config.vocab_size)
    short = DryRun(recipe, config, profile, [batch] * 2, [batch])
    monkeypatch.setattr(planning, "groups_of", lambda *_: None)
    complete = DryRun(recipe, config, profile, [batch] * 2, [batch])
    assert short.policies[0] == 0
    assert short.policies[-1] == config.num_hidden_layers
    for number in (short.policies[1], short.policies[len(short.policies) // 2]):
        found, wanted = short.plan(number), complete.plan(number)
        assert short.is_recorded(number)
        assert found.phases == wanted.phases, number
        assert found.reserved_bytes == wanted.reserved_bytes
        assert found.loss == wanted.loss
        assert (found.flops.total, found.flops.recomputed) == (
            wanted.flops.total,
            wanted.flops.recomputed,
        )
        assert found.num_recomputed == number
    for number in short.policies:
        short.plan(number)
    # A recording of one sample of groups serves several policies.
    assert len(short._recorded) < len(short.policies)


def test_a_large_gpu_recomputes_nothing() -> None:
    result = settled(2**34)
    assert result.recipe.train.activation_checkpointing == 0
    assert result.plan.flops.recomputed == 0
    assert "every block keeps its activations" in result.choices[0].reason


@pytest.mark.slow
def test_the_fewest_blocks_that_fit_are_recomputed() -> None:
    none, every = settled(2**34), settled(2**34, activation_checkpointing=True)
    between = (none.plan.needed_bytes + every.plan.needed_bytes) // 2
    result = settled(int(between / GPU_SHARE))
    number, chunk = result.recipe.train.activation_checkpointing, result.recipe.train.loss_chunk
    assert isinstance(number, int)
    assert isinstance(chunk, int)
    assert 0 < number < BLOCKS
    limit = limit_of(replace(GPU, capacity_bytes=int(between / GPU_SHARE))).num_bytes
    assert needed(number, chunk) == result.plan.needed_bytes <= limit < needed(number - 1, chunk)
    share = result.plan.flops.recomputed / result.plan.flops.block
    assert share == pytest.approx(number)
    reason = result.choices[0].reason
    assert f"{number} of {BLOCKS} blocks are recomputed, the fewest that fit" in reason
    assert "One step less memory (" in reason


@pytest.mark.slow
def test_a_gpu_that_is_too_small_gets_the_policy_with_the_least_memory() -> None:
    result = settled(20 * MIB)
    plans = [needed(number, MIN_CHUNK) for number in (0, BLOCKS - 1, BLOCKS)]
    assert result.plan.needed_bytes <= min(plans)
    assert "which needs the least memory" in result.choices[0].reason


def test_explicit_settings_are_not_changed() -> None:
    train = {"activation_checkpointing": 3, "loss_chunk": 200, "micro_batch": 2}
    result = settled(2**34, **train)
    assert result.choices == ()
    assert {key: getattr(result.recipe.train, key) for key in train} == train
    assert result.plan.num_recomputed == 3


@pytest.mark.slow
@pytest.mark.parametrize("policy", [0, 4, BLOCKS])
def test_the_loss_does_not_decide_the_peak(policy: int) -> None:
    """With a chunk of all tokens it does."""
    large = settled(2**34, activation_checkpointing=policy, loss_chunk=511)
    assert large.plan.loss.decides
    chosen = settled(2**34, activation_checkpointing=policy)
    assert not chosen.plan.loss.decides
    assert chosen.plan.loss.rest_bytes == chosen.plan.peak_bytes < large.plan.peak_bytes
    chunk = chosen.recipe.train.loss_chunk
    assert isinstance(chunk, int)
    assert MIN_CHUNK <= chunk < 511


def test_micro_batch_auto_keeps_the_sequences_of_a_step() -> None:
    result = settled(2**34, 64, micro_batch="auto", grad_accum=6)
    assert (result.recipe.train.micro_batch, result.recipe.train.grad_accum) == (6, 1)


@pytest.mark.slow
def test_the_largest_micro_batch_that_fits_is_chosen() -> None:
    def plan_of(size: int) -> int:
        train = {"micro_batch": size, "grad_accum": 12 // size}
        return settled(2**34, 64, activation_checkpointing=0, **train).plan.needed_bytes

    capacity = int(((plan_of(4) + plan_of(6)) // 2) / GPU_SHARE)
    result = settled(capacity, 64, micro_batch="auto", grad_accum=12)
    train = result.recipe.train
    assert (train.micro_batch, train.grad_accum, train.activation_checkpointing) == (4, 3, 0)
    assert {choice.key for choice in result.choices} == {
        "train.micro_batch",
        "train.grad_accum",
        "train.activation_checkpointing",
        "train.loss_chunk",
    }


def test_on_a_cpu_a_share_of_the_free_memory_is_used() -> None:
    limit = limit_of(CPU)
    assert limit.num_bytes <= CPU.usable_bytes // 2
    assert "50% of the free memory" in limit.text


@pytest.mark.parametrize("best", [0, 1, 7, 19, 20])
def test_a_search_finds_the_largest_number(best: int) -> None:
    planned: list[int] = []

    def plan(number: int) -> tuple[int, bool]:
        planned.append(number)
        return 100 + 10 * number, number <= best

    assert largest_that_fits(plan, 20, 10, 105 + 10 * best) == best
    assert len(planned) <= 8


@pytest.mark.slow
def test_a_base_that_does_not_fit_is_shared_or_put_into_host_memory() -> None:
    """As many blocks as fit stay on the device with their activations; the others are streamed."""

    def chosen(capacity: int, count: int = 1, **train: Any) -> Settled:
        profile = replace(GPU, capacity_bytes=capacity, count=count)
        # Inputs of blocks in host memory would make it fit.
        recipe = recipe_of(
            profile, base={"residency": "auto"}, train={"offload_inputs": False, **train}
        )
        return Planner(config_of("llama"), profile).settle(recipe)

    device = chosen(2**34)
    assert device.recipe.base.residency == "device"
    assert "the base fits the device" in device.choices[0].reason
    least = settled(2**34, activation_checkpointing=True).plan.needed_bytes
    host = chosen(int((least - MIB) / GPU_SHARE))
    number = host.recipe.train.activation_checkpointing
    assert host.recipe.base.residency == "host"
    # Embedding and head are not on the device either, which may be enough without recomputation.
    assert 0 <= number < BLOCKS
    assert host.plan.needed_bytes <= least - MIB
    assert host.plan.copied_bytes
    text = f"the head and {number} of {BLOCKS} blocks are in host memory"
    assert text in host.choices[0].reason
    of_four = chosen(2**34, 4, activation_checkpointing=True).plan.needed_bytes
    assert of_four < least  # Each device has a quarter of the optimizer's states.
    several = chosen(int((of_four - MIB) / GPU_SHARE), 4)
    number = several.recipe.train.activation_checkpointing
    assert several.recipe.base.residency == "shard"
    assert several.plan.needed_bytes <= of_four - MIB
    assert f"Each of 4 devices has a part of {number} of {BLOCKS} blocks" in (
        several.choices[0].reason
    )
    kept = chosen(int((least - MIB) / GPU_SHARE), activation_checkpointing=False)
    # The activations of all blocks decide the peak, and this small head does not.
    assert kept.recipe.base.residency == "device"
    assert "host memory would save nothing" in kept.choices[0].reason


@pytest.mark.slow
def test_a_sharded_base_has_a_recomputed_block() -> None:
    """A base that fits each device would else share nothing, which the recipe refuses."""
    profile = replace(GPU, capacity_bytes=2**34, count=2)
    recipe = recipe_of(profile, base={"residency": "shard"})
    chosen = Planner(config_of("llama"), profile).settle(recipe)
    assert chosen.plan.num_recomputed == chosen.recipe.train.activation_checkpointing == 1
    assert chosen.plan.streamed_bytes
    assert "the fewest that fit and share weights" in chosen.choices[0].reason


@pytest.mark.slow
def test_the_copied_inputs_are_those_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of two micro-batches run, so the job's own counter has four times as much."""
    created: list[InputOffload] = []
    begin = InputOffload.__init__

    def counted(self: InputOffload) -> None:
        begin(self)
        created.append(self)

    monkeypatch.setattr(InputOffload, "__init__", counted)
    monkeypatch.setattr(planning, "groups_of", lambda *_: None)
    recipe = recipe_of(GPU, 48, train={"offload_inputs": True})
    batch = largest_batch(48, 1, SIZES["vocab_size"])
    for number in (1, 5, BLOCKS):
        plan = DryRun(recipe, config_of("llama"), GPU, [batch] * 2).plan(number)
        assert 4 * plan.moved_inputs == created[-1].copied_bytes > 0, number
    without = recipe_of(GPU, 48, train={"offload_inputs": False})
    assert DryRun(without, config_of("llama"), GPU, [batch]).plan(BLOCKS).copied_bytes == 0


@pytest.mark.slow
def test_inputs_are_copied_if_that_is_faster_than_recomputing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The policy with the fewest recomputed operations and copied bytes, by their time."""
    config = config_of("llama", hidden_size=1024, intermediate_size=1024)

    def chosen(limit: int) -> Settled:
        profile = replace(GPU, capacity_bytes=int(limit / GPU_SHARE) + 1)
        recipe = recipe_of(profile, 2048, train={"loss_chunk": 64})
        return Planner(config, profile).settle(recipe)

    batch = largest_batch(2048, 1, SIZES["vocab_size"])
    seven = DryRun(recipe_of(GPU, 2048, train={"loss_chunk": 64}), config, GPU, [batch]).plan(7)
    # Seven recomputed blocks fit only if inputs of some of them leave the device.
    limit = seven.needed_bytes - 3 * seven.input_bytes
    fast = chosen(limit)
    assert fast.recipe.train.offload_inputs == "auto"
    assert fast.plan.num_recomputed == 8
    slow_speed = replace(nominal_speed(GPU, torch.bfloat16), flops_per_second=1e6)
    slow_link = replace(slow_speed, link_bytes_per_second=1e3)
    monkeypatch.setattr(planner_module, "nominal_speed", lambda *_: slow_link)
    assert chosen(limit).plan.num_recomputed == 8
    monkeypatch.setattr(planner_module, "nominal_speed", lambda *_: slow_speed)
    slow = chosen(limit)
    assert slow.recipe.train.offload_inputs is True
    assert slow.plan.num_recomputed == 7
    assert slow.plan.needed_bytes <= limit
    assert any("7, which is faster by estimate" in choice.reason for choice in slow.choices)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [True, 6])
def test_inputs_are_copied_if_a_policy_that_is_set_does_not_fit_otherwise(policy: int) -> None:
    config = config_of("llama", hidden_size=1024, intermediate_size=1024)
    settings = {"loss_chunk": 64, "activation_checkpointing": policy}
    batch = largest_batch(2048, 1, SIZES["vocab_size"])
    number = BLOCKS if policy is True else policy
    plan = DryRun(recipe_of(GPU, 2048, train=settings), config, GPU, [batch] * 2).plan(number)

    def chosen(limit: int) -> Settled:
        profile = replace(GPU, capacity_bytes=int(limit / GPU_SHARE) + 1)
        return Planner(config, profile).settle(recipe_of(profile, 2048, train=settings))

    enough = chosen(plan.needed_bytes)
    assert enough.recipe.train.offload_inputs == "auto"
    assert not [choice for choice in enough.choices if choice.key == OFFLOAD_KEY]
    short = chosen(plan.needed_bytes - plan.input_bytes)
    assert short.recipe.train.offload_inputs is True
    assert short.recipe.train.activation_checkpointing == policy
    assert short.plan.num_recomputed == number
    assert short.plan.needed_bytes < plan.needed_bytes - plan.input_bytes
    assert "without it" in next(c.reason for c in short.choices if c.key == OFFLOAD_KEY)
