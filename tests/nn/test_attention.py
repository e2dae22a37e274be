"""Rows in one sequence do not attend to each other, and the result equals transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_cli.data.collate import collate
from qlora_cli.data.encode import Example
from qlora_cli.errors import ModelError
from qlora_cli.models.model import LoadedModel
from qlora_cli.nn import attention, attention_arguments
from qlora_cli.nn.spans import Spans, use_spans
from qlora_cli.tasks.backbone import hidden_states
from qlora_cli.tasks.causal import CAUSAL
from tests.helpers.families import MODEL_TYPES
from tests.helpers.runs import (
    CPU,
    build_base,
    logits,
    make_base,
    make_recipe,
    make_rows,
    randomize_b,
)

WINDOW = 5


def row(start: int, length: int) -> Example:
    ids = [3 + (start + 11 * i + i * i) % 250 for i in range(length)]
    return Example(ids=ids, labels=[-100, *ids[1:]], origin=f"row {start}")


def make(folder: Path, family: str, **settings: Any) -> tuple[Path, LoadedModel]:
    """Return (folder, model in training mode) of a base in 16 bit, which transformers can load."""
    if family == "mistral":
        settings = {"sliding_window": WINDOW, **settings}
    base = make_base(folder / "base", family, spread=0.15, **settings)
    rows = make_rows(folder / "rows.jsonl")
    loaded = build_base(make_recipe(base, rows, base={"bits": 16}))
    loaded.model.train()
    return base, loaded


def loss_and_gradients(loaded: LoadedModel, rows: list[Example]) -> tuple[float, dict[str, Tensor]]:
    batch = collate(rows)
    loss = CAUSAL.loss(loaded, batch, CPU, 1.0)
    loss.backward()
    found = {name: p.grad.clone() for name, p in loaded.trainable().items() if p.grad is not None}
    loaded.model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_packed_rows_equal_separate_rows(tmp_path: Path, family: str) -> None:
    """Loss and gradients of rows in one sequence are the sums over the separate rows."""
    _, loaded = make(tmp_path, family)
    randomize_b(loaded)
    rows = [row(1, 9), row(90, 4), row(40, 17)]
    together, found = loss_and_gradients(loaded, rows)
    alone = [loss_and_gradients(loaded, [single]) for single in rows]
    assert together == pytest.approx(sum(loss for loss, _ in alone), rel=1e-6)
    for name, gradient in found.items():
        wanted = torch.stack([gradients[name] for _, gradients in alone]).sum(dim=0)
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
        )


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_row_does_not_depend_on_its_neighbours(tmp_path: Path, family: str) -> None:
    """Different neighbours of the same length give equal bits, because the shapes are equal."""
    _, loaded = make(tmp_path, family)
    randomize_b(loaded)
    mine = row(40, 13)
    with torch.no_grad():
        one = hidden_states(loaded, collate([row(1, 9), mine, row(2, 6)]), CPU)[9:22]
        other = hidden_states(loaded, collate([row(77, 9), mine, row(99, 6)]), CPU)[9:22]
    assert torch.equal(one, other)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_row_gives_its_neighbours_no_gradient(tmp_path: Path, family: str) -> None:
    _, loaded = make(tmp_path, family)
    table = loaded.model.get_submodule(loaded.family.token_embedding).weight
    table.requires_grad_()
    neighbour = Example(ids=[200] * 6, labels=[-100] * 6, origin="neighbour")
    mine = row(40, 13)
    mine = Example(
        ids=[i if i != 200 else 201 for i in mine.ids], labels=mine.labels, origin="mine"
    )
    CAUSAL.loss(loaded, collate([neighbour, mine, neighbour]), CPU, 1.0).backward()
    assert not table.grad[200].any()
    assert table.grad[mine.ids[3]].any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_these_tests_detect_a_leak(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without spans every row attends to all rows before it."""
    _, loaded = make(tmp_path, family)
    mine = row(40, 13)

    def leaking(lengths: tuple[int, ...], device: torch.device, flash: bool) -> None:
        return None

    monkeypatch.setattr(Spans, "on", leaking)
    with torch.no_grad():
        one = hidden_states(loaded, collate([row(1, 9), mine]), CPU)[9:]
        other = hidden_states(loaded, collate([row(77, 9), mine]), CPU)[9:]
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_logits_equal_transformers(tmp_path: Path, family: str) -> None:
    """Compare with eager attention: grouped heads, and a sliding window in Mistral."""
    base, loaded = make(tmp_path, family)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([row(3, 24).ids])
    with torch.no_grad():
        wanted = theirs(ids).logits[0]
    torch.testing.assert_close(logits(loaded, ids), wanted, rtol=1e-4, atol=1e-4)
    if family == "mistral":
        assert theirs.config.sliding_window == WINDOW


def test_the_sliding_window_has_an_effect(tmp_path: Path) -> None:
    _, narrow = make(tmp_path / "narrow", "mistral")
    _, wide = make(tmp_path / "wide", "mistral", sliding_window=None)
    ids = torch.tensor([row(3, 24).ids])
    difference = (logits(narrow, ids) - logits(wide, ids)).abs().amax(dim=1)
    assert not difference[:WINDOW].any()
    assert difference[WINDOW:].min() > 1e-3


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_generation_with_a_cache_equals_the_forward_pass(tmp_path: Path, family: str) -> None:
    """Tokens generated one by one with a cache equal the predictions of complete forward passes."""
    _, loaded = make(tmp_path, family)
    randomize_b(loaded)
    loaded.model.eval()
    loaded.model.config.use_cache = True
    prompt = torch.tensor([row(3, 7).ids])
    made = loaded.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0]
    assert made.numel() == 17
    predicted = logits(loaded, made[None])[6:-1].argmax(dim=1)
    assert torch.equal(made[7:], predicted)


def test_a_cache_and_several_new_tokens_at_once() -> None:
    """With T queries and S keys, query i attends to the first S - T + i + 1 keys."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, 3, 8, generator=generator)
    key, value = (torch.randn(1, 2, 10, 8, generator=generator) for _ in range(2))
    out, _ = attention.attend(torch.nn.Module(), query, key, value, None, scaling=0.3)
    keys, values = (t.repeat_interleave(2, dim=1) for t in (key, value))
    scores = 0.3 * query @ keys.transpose(2, 3)
    seen = torch.ones(3, 10, dtype=torch.bool).tril(diagonal=7)
    wanted = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ values
    torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_bias", torch.zeros(1, 4, 3, 3)),
        ("attention_mask", torch.ones(1, 1, 3, 3)),
        ("dropout", 0.1),
        ("an_argument_of_the_future", 1),
    ],
)
def test_an_argument_that_is_not_handled_is_refused(name: str, value: Any) -> None:
    query = torch.zeros(1, 4, 3, 8)
    arguments = {"attention_mask": None, name: value}
    with pytest.raises(ModelError, match=f"Module calls the attention with {name}"):
        attention.attend(torch.nn.Module(), query, query, query, **arguments)


@pytest.mark.parametrize(
    "name", ["softcap", "s_aux", "is_causal", *attention_arguments.UNUSED_ARGUMENTS]
)
def test_none_and_harmless_arguments_are_accepted(name: str) -> None:
    query = torch.randn(1, 4, 3, 8)
    value = torch.arange(3) if name in attention_arguments.UNUSED_ARGUMENTS else None
    out, _ = attention.attend(torch.nn.Module(), query, query, query, None, **{name: value})
    assert torch.equal(out, attention.attend(torch.nn.Module(), query, query, query, None)[0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [(10,), (6, 4)])
def test_attention_that_is_not_causal_sees_both_sides(
    window: int | None, lengths: tuple[int, ...]
) -> None:
    """A window of w reaches w - 1 keys to each side, and no key of another row."""
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(1, 4, 10, 8, generator=generator)
    key, value = (torch.randn(1, 2, 10, 8, generator=generator) for _ in range(2))
    with use_spans(Spans.on(lengths, torch.device("cpu"), "cpu")):
        out, _ = attention.attend(
            module, query, key, value, None, scaling=0.3, sliding_window=window
        )
    keys, values = (t.repeat_interleave(2, dim=1) for t in (key, value))
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = rows[:, None] == rows
    if window is not None:
        places = torch.arange(10)
        seen &= (places[:, None] - places).abs() < window
    scores = (0.3 * query @ keys.transpose(2, 3)).masked_fill(~seen, float("-inf"))
    wanted = scores.softmax(dim=-1) @ values
    torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_plain_operations_refuse_attention_that_is_not_causal() -> None:
    query = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ModelError, match="is_causal=False"):
        attention.attend(torch.nn.Module(), query, query, query, None, softcap=2.0, is_causal=False)


def test_no_mask_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers builds no mask for an attention that is registered without a mask function."""
    _, loaded = make(tmp_path, "llama")
    masks = []
    real = attention.attend

    def watched(*args: Any, **kwargs: Any) -> Any:
        masks.append(args[4])
        return real(*args, **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, watched)
    loss_and_gradients(loaded, [row(1, 9), row(2, 5)])
    assert masks
    assert all(mask is None for mask in masks)
