"""On one GPU a resumed run equals an uninterrupted one bit for bit, and what limits that.

The backward pass of FlashAttention sums the gradient of the queries tile by tile (128 keys), in the
order in which the tiles finish. Rows within one tile are reproducible bit for bit. Longer rows are
reproducible only with torch's deterministic algorithms. No other operation of a step may depend on
an order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.data.collate import largest_batch
from qlora_cli.errors import Interrupted
from qlora_cli.nn.loss import chunked_cross_entropy
from qlora_cli.recipe.schema import Recipe
from qlora_cli.tasks.backbone import hidden_states
from tests.helpers.interrupted import train_run
from tests.helpers.resumed_runs import CASES, assert_same_run, losses, make_bases, recipe_of
from tests.helpers.runs import build_base, make_base, make_recipe, make_rows

pytestmark = pytest.mark.gpu
LONG = 300


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"), "llama", "gpt2")


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    make_rows(folder / "rows.jsonl", num=9, length=LONG)
    make_base(folder / "llama", "llama", spread=0.1, max_position_embeddings=1024)
    return folder


def long_recipe(long_rows: Path, output: Path) -> Recipe:
    sections: dict[str, Any] = {"base": {"compute_dtype": "bfloat16"}, "data": {"seq_len": 700}}
    return recipe_of(long_rows, output, **sections)


def resumed(recipe: Recipe) -> Any:
    with pytest.raises(Interrupted):
        train_run(recipe, stop_after=2)
    torch.manual_seed(999)
    return train_run(recipe, resume=True)


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", ["adamw", "adamw8bit", "gpt2, without packing"])
def test_a_resumed_run_with_rows_within_a_tile_is_equal(
    gpu: torch.device, tmp_path: Path, bases: Path, case: str, compute: str
) -> None:
    settings = CASES[case] | {"base": {"compute_dtype": compute}}
    uninterrupted = train_run(recipe_of(bases, tmp_path / "uninterrupted", **settings))
    assert_same_run(uninterrupted, resumed(recipe_of(bases, tmp_path / "broken", **settings)))


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_a_resumed_run_with_long_rows_is_equal_with_deterministic_algorithms(
    gpu: torch.device, tmp_path: Path, long_rows: Path
) -> None:
    uninterrupted = train_run(long_recipe(long_rows, tmp_path / "uninterrupted"))
    assert_same_run(uninterrupted, resumed(long_recipe(long_rows, tmp_path / "broken")))


def test_the_first_loss_of_long_rows_is_always_equal(
    gpu: torch.device,
    tmp_path: Path,
    long_rows: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The forward pass depends on no order. The test records whether the backward pass did."""
    first, second = (losses(train_run(long_recipe(long_rows, tmp_path / name))) for name in "ab")
    record_property("long_rows_bit_for_bit", first == second)
    assert first[0][:2] == second[0][:2]
    for line, other_line in zip(first, second, strict=True):
        assert line[1] == pytest.approx(other_line[1], rel=1e-2)


@contextmanager
def nondeterminism_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield a list that receives torch's warnings of nondeterministic operations."""
    messages: list[str] = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield messages
        texts = [str(warning.message) for warning in caught]
        messages += [text for text in texts if "determin" in text]
    finally:
        torch.set_warn_always(False)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_attention_is_nondeterministic(
    counting_gpu: torch.device,
    bases: Path,
    family: str,
    bits: int,
    compute: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Fails if a nondeterministic operation is added to the step; it must then be listed here."""
    base = {"bits": bits, "compute_dtype": compute}
    if bits == 8:
        # Finding outlier columns reads values from the GPU; a fake GPU has none.
        base["outlier_threshold"] = 0.0
    recipe = make_recipe(bases / family, bases / "rows.jsonl", base=base)
    loaded = build_base(recipe, counting_gpu)
    loaded.model.train()
    with nondeterminism_warnings(monkeypatch) as messages:
        hidden = hidden_states(loaded, largest_batch(32, 2, 250), counting_gpu)
        hidden.backward(torch.ones_like(hidden))
    record_property("not_deterministic", sorted(set(messages)))
    assert all("ttention" in text for text in messages), messages


def test_the_loss_is_deterministic(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = torch.randn(40, 64, device=gpu), torch.randn(300, 64, device=gpu)
    at = torch.arange(40, device=gpu)
    with nondeterminism_warnings(monkeypatch) as messages:
        chunked_cross_entropy(hidden.requires_grad_(), head, at, 7 * at, 1.0).backward()
    assert not messages


def test_another_nondeterministic_operation_is_detected(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nondeterminism_warnings(monkeypatch) as messages:
        places = torch.ones(9, dtype=torch.int32, device=gpu)
        torch.bincount(places, torch.ones(9, device=gpu))
    assert messages
    assert not all("ttention" in text for text in messages)
