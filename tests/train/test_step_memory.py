"""Memory that a step must not use: the token table on a GPU, float32 copies, leftovers of eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_cli.data.collate import Batch, largest_batch
from qlora_cli.device import DeviceProfile
from qlora_cli.files.locate import read_config
from qlora_cli.jobs.record import describe_tensors
from qlora_cli.memory.instrument import Instrument
from qlora_cli.memory.ledger import Phase
from qlora_cli.models import convert
from qlora_cli.models.build import ModelRequest
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn.codebook import scale_codebook
from qlora_cli.nn.embedding import FrozenEmbedding, HostEmbedding
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks import causal
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.train.state import State, build_state, tag_living
from qlora_cli.train.step import train_step
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import CPU, build_base, make_base, make_recipe, make_rows, open_source

GPU_PROFILE = DeviceProfile("cuda", "a GPU", 24 * 2**30, (8, 9), 128)
CPU_PROFILE = DeviceProfile("cpu", "a CPU", 24 * 2**30)
BATCH = largest_batch(32, 2, 250)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_rows(folder / "rows.jsonl")
    for family in MODEL_TYPES:
        make_base(folder / family, family, spread=0.1)
    make_base(folder / "tied", "llama", tied=True)
    return folder


def recipe_of(bases: Path, name: str, **sections: Any) -> Recipe:
    sections = {"base": {"compute_dtype": "bfloat16"}, **sections}
    return make_recipe(bases / name, bases / "rows.jsonl", **sections)


def load(recipe: Recipe) -> State:
    folder = Path(recipe.model.name)
    config = read_config(folder / "config.json")
    return build_state(
        ModelRequest(recipe, config, lambda _, found: open_source(folder, found), CPU, CPU_PROFILE)
    )


# The token embedding table.


def planned(recipe: Recipe, profile: DeviceProfile) -> dict[str, Phase]:
    config = read_config(Path(recipe.model.name) / "config.json")
    plan = dry_run(recipe, config, profile, [BATCH, BATCH], [BATCH])
    return {phase.name: phase for phase in plan.phases}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_an_untied_table_is_not_in_gpu_memory(bases: Path, name: str) -> None:
    recipe = recipe_of(bases, name)
    on_gpu, on_cpu = planned(recipe, GPU_PROFILE), planned(recipe, CPU_PROFILE)
    positions = 64 * 64 * 2 if name == "gpt2" else 0
    table = read_config(bases / name / "config.json").vocab_size * 64 * 2
    for phase in ("first_step", "step", "eval"):
        assert on_gpu[phase].at_peak.get("embeddings", 0) == positions
        assert on_cpu[phase].at_peak["embeddings"] == positions + table


@pytest.mark.slow
def test_a_tied_table_and_a_trained_one_stay_in_gpu_memory(bases: Path) -> None:
    for recipe in (
        recipe_of(bases, "tied"),
        recipe_of(bases, "llama", adapter={"method": "full"}, base={"bits": 16}),
    ):
        at_peak = planned(recipe, GPU_PROFILE)["step"].at_peak
        assert at_peak.get("embeddings", 0) + at_peak.get("adapter", 0) >= 259 * 64 * 2


def move_table_to_cpu(loaded: LoadedModel) -> HostEmbedding:
    """Move the table as training on a GPU does, with the CPU as the device."""
    convert.move_embedding_to_host(loaded.model, loaded.family.token_embedding, CPU)
    table = loaded.model.get_submodule(loaded.family.token_embedding)
    assert isinstance(table, HostEmbedding)
    return table


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_table_in_cpu_memory_gives_the_same_loss_and_gradients(bases: Path, name: str) -> None:
    found = []
    for moved in (False, True):
        loaded = build_base(recipe_of(bases, name))
        if moved:
            move_table_to_cpu(loaded)
        loss = CAUSAL.loss(loaded, BATCH, CPU, 1.0)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in loaded.trainable().values())])
    assert all(torch.equal(own, other) for own, other in zip(*found, strict=True))


def test_a_table_in_cpu_memory_is_no_parameter_and_returns_rows_in_compute_dtype() -> None:
    weight = torch.randn(10, 4).half()
    table = HostEmbedding(FrozenEmbedding(weight, torch.float32), CPU)
    assert not list(table.parameters())
    assert not list(table.buffers())
    ids = torch.tensor([[3, 3, 9]])
    rows = table(ids)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, weight[ids].float())
    with pytest.raises(IndexError):
        table(torch.tensor([10]))


def test_the_record_states_where_a_table_is_stored_and_why(bases: Path) -> None:
    loaded = build_base(recipe_of(bases, "llama"))
    move_table_to_cpu(loaded)
    kinds = {kind["tensors"]: kind for kind in describe_tensors(loaded)}
    table = kinds["model.embed_tokens"]
    assert table["held"] == "bfloat16 in CPU memory"
    assert "only the needed rows are copied" in table["reason"]


# Nothing after eval.


def live_bytes_around_eval(state: State) -> tuple[int, int]:
    """Return the allocated bytes (before, after) an evaluation."""
    instrument = Instrument(CPU, CPU_PROFILE)
    with instrument.phase("load"):
        tag_living(state, instrument.tracker)
    with instrument.phase("eval"):
        CAUSAL.evaluate(state.loaded, (largest_batch(32, 2, 250) for _ in range(2)), CPU)
    before, after = (phase.live_bytes for phase in instrument.phases)
    return before, after


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_eval_frees_everything_that_it_allocates(bases: Path, family: str) -> None:
    scale_codebook(CPU)
    before, after = live_bytes_around_eval(load(recipe_of(bases, family)))
    assert after == before > 0


def test_a_batch_that_is_kept_is_detected(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    original = causal.hidden_states

    def keeping(loaded: LoadedModel, batch: Batch, device: torch.device) -> Tensor:
        kept.append(original(loaded, batch, device))
        return kept[-1]

    monkeypatch.setattr(causal, "hidden_states", keeping)
    before, after = live_bytes_around_eval(load(recipe_of(bases, "llama")))
    assert after - before == 2 * 64 * 64 * 2


# No float32 copies.


class LargestFloat32(TorchDispatchMode):
    """Records the size of the largest float32 tensor that an operation returns, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return output


SMALL_BATCH = largest_batch(5, 1, 250)
"""So few tokens that no activation and no chunk of logits is as large as a weight."""


def largest_float32(recipe: Recipe) -> int:
    state = load(recipe)
    train_step(state, [SMALL_BATCH], 1e-4)
    with LargestFloat32() as recorded:
        train_step(state, [SMALL_BATCH], 1e-4)
        CAUSAL.evaluate(state.loaded, [SMALL_BATCH], CPU)
    return recorded.largest


@pytest.mark.slow
@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_no_weight_is_ever_copied_to_float32(bases: Path, family: str, bits: int) -> None:
    recipe = recipe_of(bases, family, base={"bits": bits, "compute_dtype": "bfloat16"})
    # The smallest linear is k's, 32 x 64; logits of 4 targets are 4 x 259, A is 3 x 96.
    assert largest_float32(recipe) < 32 * 64


def test_a_float32_copy_of_a_weight_is_detected(
    bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.nn.quant import QuantLinear

    monkeypatch.setattr(
        QuantLinear,
        "grad_input",
        lambda self, grad, total=None: (grad.float() @ self.dequantize().float()).to(grad.dtype),
    )
    assert largest_float32(recipe_of(bases, "llama")) >= 32 * 64
