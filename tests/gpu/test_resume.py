"""On one card a resumed run is the unbroken one, bit for bit; and which operation could break that.

FlashAttention's backward adds up the gradient of the queries tile by tile (128 keys), in the order
in which tiles are done. Rows within one tile are the same bits each time. Longer ones are the same
only where torch is told to be deterministic; nothing else in a step may depend on an order.
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
from tests.helpers.resumed_runs import CASES, assert_same_run, losses, recipe_of
from tests.helpers.runs import build_base, make_base, make_recipe, make_rows

pytestmark = pytest.mark.gpu
LONG = 300


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_rows(folder / "rows.jsonl", num=17, length=12)
    for family in ("llama", "gpt2"):
        make_base(folder / family, family, spread=0.1)
    return folder


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
def test_rows_within_a_tile_are_bit_for_bit(
    card: torch.device, tmp_path: Path, bases: Path, case: str, compute: str
) -> None:
    settings = CASES[case] | {"base": {"compute_dtype": compute}}
    unbroken = train_run(recipe_of(bases, tmp_path / "unbroken", **settings))
    assert_same_run(unbroken, resumed(recipe_of(bases, tmp_path / "broken", **settings)))


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_long_rows_are_bit_for_bit_where_torch_is_told_to_be(
    card: torch.device, tmp_path: Path, long_rows: Path
) -> None:
    unbroken = train_run(long_recipe(long_rows, tmp_path / "unbroken"))
    assert_same_run(unbroken, resumed(long_recipe(long_rows, tmp_path / "broken")))


def test_the_first_loss_of_long_rows_is_the_same_bits_always(
    card: torch.device,
    tmp_path: Path,
    long_rows: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Forward depends on no order. Whether this card's backward did is in the record."""
    one, other = (losses(train_run(long_recipe(long_rows, tmp_path / name))) for name in "ab")
    record_property("long_rows_bit_for_bit", one == other)
    assert one[0][:2] == other[0][:2]
    for mine, theirs in zip(one, other, strict=True):
        assert mine[1] == pytest.approx(theirs[1], rel=1e-2)


@contextmanager
def confessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What torch says of operations whose result depends on an order, as they are called."""
    told: list[str] = []
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield told
        told += [str(one.message) for one in caught if "determin" in str(one.message)]
    finally:
        torch.set_warn_always(False)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_alone_depends_on_an_order(
    counting_card: torch.device,
    bases: Path,
    family: str,
    bits: int,
    compute: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """A guard: an operation put into the step that is not deterministic has to be named here."""
    base = {"bits": bits, "compute_dtype": compute}
    if bits == 8:
        # Finding outlier columns reads from the card, which a stand-in cannot.
        base["outlier_threshold"] = 0.0
    recipe = make_recipe(bases / family, bases / "rows.jsonl", base=base)
    loaded = build_base(recipe, counting_card)
    loaded.model.train()
    with confessions(monkeypatch) as told:
        hidden = hidden_states(loaded, largest_batch(32, 2, 250), counting_card)
        hidden.backward(torch.ones_like(hidden))
    record_property("not_deterministic", sorted(set(told)))
    assert all("ttention" in one for one in told), told


def test_the_loss_depends_on_no_order(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = torch.randn(40, 64, device=card), torch.randn(300, 64, device=card)
    at = torch.arange(40, device=card)
    with confessions(monkeypatch) as told:
        chunked_cross_entropy(hidden.requires_grad_(), head, at, 7 * at, 1.0).backward()
    assert not told


def test_the_guard_would_see_another_operation(
    card: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with confessions(monkeypatch) as told:
        places = torch.ones(9, dtype=torch.int32, device=card)
        torch.bincount(places, torch.ones(9, device=card))
    assert told
    assert not all("ttention" in one for one in told)
