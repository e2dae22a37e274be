"""What a step may not hold: the token table on a card, float32 copies, anything after eval."""

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
from qlora_cli.nn.embedding import FrozenEmbedding, HostEmbedding
from qlora_cli.nn.quant import scale_codebook
from qlora_cli.plan.dry_run import dry_run
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks import causal
from qlora_cli.tasks.causal import CAUSAL
from qlora_cli.train.state import State, build_state, tag_living
from qlora_cli.train.step import train_step
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import CPU, build_base, make_base, make_recipe, make_rows, open_source

CARD = DeviceProfile("cuda", "a card", 24 * 2**30, (8, 9), 128)
HOST = DeviceProfile("cpu", "a host", 24 * 2**30)
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
        ModelRequest(recipe, config, lambda _, found: open_source(folder, found), CPU, HOST)
    )


# The token table.


def planned(recipe: Recipe, facts: DeviceProfile) -> dict[str, Phase]:
    config = read_config(Path(recipe.model.name) / "config.json")
    window = [BATCH, BATCH]
    return {p.name: p for p in dry_run(recipe, config, facts, window, window[:1]).phases}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_an_untied_table_is_not_on_the_card(bases: Path, name: str) -> None:
    recipe = recipe_of(bases, name)
    on_card, finite_cpu_copy = planned(recipe, CARD), planned(recipe, HOST)
    positions = 64 * 64 * 2 if name == "gpt2" else 0
    table = read_config(bases / name / "config.json").vocab_size * 64 * 2
    for phase in ("first_step", "step", "eval"):
        assert on_card[phase].at_peak.get("embeddings", 0) == positions
        assert finite_cpu_copy[phase].at_peak["embeddings"] == positions + table


def test_a_tied_table_and_a_trained_one_stay_on_the_card(bases: Path) -> None:
    for recipe in (
        recipe_of(bases, "tied"),
        recipe_of(bases, "llama", adapter={"method": "full"}, base={"bits": 16}),
    ):
        weight_format = planned(recipe, CARD)["step"].at_peak
        assert weight_format.get("embeddings", 0) + weight_format.get("adapter", 0) >= 259 * 64 * 2


def finite_cpu_copy(loaded: LoadedModel) -> HostEmbedding:
    """As on a card, but with the host itself for the device."""
    convert.move_embedding_to_host(loaded.model, loaded.family.token_embedding, CPU)
    table = loaded.model.get_submodule(loaded.family.token_embedding)
    assert isinstance(table, HostEmbedding)
    return table


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_table_on_the_host_gives_the_same_loss_and_gradients(bases: Path, name: str) -> None:
    found = []
    for moved in (False, True):
        loaded = build_base(recipe_of(bases, name))
        if moved:
            finite_cpu_copy(loaded)
        loss = CAUSAL.loss(loaded, BATCH, CPU, 1.0)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in loaded.trainable().values())])
    assert all(torch.equal(own, other) for own, other in zip(*found, strict=True))


def test_a_table_on_the_host_is_no_parameter_and_gives_rows_in_compute_dtype() -> None:
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


def test_the_record_says_where_a_table_lies_and_why(bases: Path) -> None:
    loaded = build_base(recipe_of(bases, "llama"))
    finite_cpu_copy(loaded)
    told = {one["tensors"]: one for one in describe_tensors(loaded)}["model.embed_tokens"]
    assert told["held"] == "bfloat16 in CPU memory"
    assert "only the rows looked up move" in told["reason"]


# Nothing after eval.


def after_eval(state: State) -> tuple[int, int]:
    """Bytes that live (before, after)."""
    instrument = Instrument(CPU, DeviceProfile("cpu", "a CPU", 2**34))
    with instrument.phase("load"):
        tag_living(state, instrument.tracker)
    with instrument.phase("eval"):
        CAUSAL.evaluate(state.loaded, (largest_batch(32, 2, 250) for _ in range(2)), CPU)
    before, after = (phase.live_bytes for phase in instrument.phases)
    return before, after


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_nothing_outlives_eval(bases: Path, family: str) -> None:
    scale_codebook(CPU)
    before, after = after_eval(load(recipe_of(bases, family)))
    assert after == before > 0


def test_a_batch_that_is_kept_would_be_seen(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    own = causal.hidden_states

    def keeping(loaded: LoadedModel, batch: Batch, device: torch.device) -> Tensor:
        kept.append(own(loaded, batch, device))
        return kept[-1]

    monkeypatch.setattr(causal, "hidden_states", keeping)
    before, after = after_eval(load(recipe_of(bases, "llama")))
    assert after - before == 2 * 64 * 64 * 2


# No float32 copies.


class Float32Seen(TorchDispatchMode):
    """The largest float32 tensor that an operation makes, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return output


FEW = largest_batch(5, 1, 250)
"""Tokens: few enough that no activation and no chunk of logits is as large as a weight."""


def largest_float32(recipe: Recipe) -> int:
    state = load(recipe)
    train_step(state, [FEW], 1e-4)
    with Float32Seen() as seen:
        train_step(state, [FEW], 1e-4)
        CAUSAL.evaluate(state.loaded, [FEW], CPU)
    return seen.largest


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_no_weight_is_ever_copied_to_float32(bases: Path, family: str, bits: int) -> None:
    recipe = recipe_of(bases, family, base={"bits": bits, "compute_dtype": "bfloat16"})
    # The smallest linear is k's, 32 x 64; logits of 4 targets are 4 x 259, A is 3 x 96.
    assert largest_float32(recipe) < 32 * 64


def test_a_float32_copy_of_a_weight_would_be_seen(
    bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_cli.nn.quant import QuantLinear

    monkeypatch.setattr(
        QuantLinear,
        "grad_input",
        lambda self, grad: (grad.float() @ self.dequantize().float()).to(grad.dtype),
    )
    assert largest_float32(recipe_of(bases, "llama")) >= 32 * 64
