"""Modules that mix tokens compute each row of a packed sequence on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_cli.nn.by_row import restart_positions, run_by_row
from qlora_cli.nn.spans import Spans, use_spans

LENGTHS = (4, 1, 6)
SPANS = Spans(LENGTHS, "cpu")
WIDTH = 3


class Mixer(nn.Module):
    """Adds to each token the earlier ones that the mask shows, and the position of each."""

    def forward(
        self, hidden: Tensor, attention_mask: Tensor, positions: tuple[Tensor, ...], **more: Any
    ) -> tuple[Tensor, Tensor]:
        weights = attention_mask[0, 0].float() / hidden.shape[1]
        out = weights @ hidden + positions[0]
        return out if not more else out + more["bias"].mT, weights[None]


class Reader(nn.Module):
    """Gets what is no tokens from the mixer."""

    def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:
        return weights @ hidden


def _inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(LENGTHS)
    return {
        "hidden": torch.randn(1, num_tokens, WIDTH, generator=generator),
        "attention_mask": torch.ones(1, 1, num_tokens, num_tokens).tril(),
        "positions": (torch.randn(1, num_tokens, WIDTH, generator=generator),),
    }


def _of_row(inputs: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {
        "hidden": inputs["hidden"][:, rows],
        "attention_mask": inputs["attention_mask"][:, :, rows, rows],
        "positions": (inputs["positions"][0][:, rows],),
    }


def _row_slices() -> list[slice]:
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, LENGTHS, strict=True)]


def test_a_module_gives_the_output_of_each_row_alone() -> None:
    inputs, module = _inputs(), Mixer()
    alone = torch.cat([module(**_of_row(inputs, rows))[0] for rows in _row_slices()], dim=1)
    with use_spans(SPANS):
        assert not torch.allclose(module(**inputs)[0], alone), "the test cannot fail"
    run_by_row(module)
    with use_spans(SPANS):
        assert torch.equal(module(**inputs)[0], alone)


def test_a_sequence_of_one_row_is_not_changed() -> None:
    inputs, module = _inputs(), Mixer()
    expected = module(**inputs)[0]
    run_by_row(module)
    assert torch.equal(module(**inputs)[0], expected)
    with use_spans(Spans((sum(LENGTHS),), "cpu")):
        assert torch.equal(module(**inputs)[0], expected)


def test_arguments_without_names_are_split() -> None:
    """A bias of ALiBi has its tokens in the last dimension."""
    inputs, module = _inputs(), Mixer()
    bias = torch.arange(float(WIDTH * sum(LENGTHS))).view(WIDTH, 1, -1).transpose(0, 1)
    rows = [module(**_of_row(inputs, r), bias=bias[..., r])[0] for r in _row_slices()]
    run_by_row(module)
    with use_spans(SPANS):
        assert torch.equal(module(**inputs, bias=bias)[0], torch.cat(rows, dim=1))


def test_outputs_that_are_no_tokens_reach_another_module_by_row() -> None:
    inputs, mixer, reader = _inputs(), Mixer(), Reader()
    rows = [_of_row(inputs, r) for r in _row_slices()]
    expected = torch.cat([reader(row["hidden"], mixer(**row)[1]) for row in rows], dim=1)
    run_by_row(mixer)
    run_by_row(reader)
    with use_spans(SPANS):
        assert torch.equal(reader(inputs["hidden"], mixer(**inputs)[1]), expected)


def test_the_gradient_is_that_of_the_rows() -> None:
    inputs, module = _inputs(), Mixer()
    inputs["hidden"].requires_grad_()
    alone = sum(module(**_of_row(inputs, rows))[0].square().sum() for rows in _row_slices())
    (expected,) = torch.autograd.grad(alone, inputs["hidden"])
    run_by_row(module)
    with use_spans(SPANS):
        found = module(**inputs)[0].square().sum()
    assert torch.allclose(torch.autograd.grad(found, inputs["hidden"])[0], expected)


class Table(nn.Module):
    """A position table that counts the tokens of its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.arange(7 * WIDTH).view(7, WIDTH)

    def forward(self, ids: Any, start: int = 0) -> Tensor:
        size = ids if isinstance(ids, torch.Size) else ids.shape
        return self.rows[torch.arange(start, start + size[1])]


def test_positions_start_again_in_each_row() -> None:
    """The table has fewer positions than the sequence has tokens."""
    table = Table()
    expected = torch.cat([table.rows[:length] for length in LENGTHS])
    restart_positions(table)
    ids = torch.zeros(1, sum(LENGTHS))
    with use_spans(SPANS):
        assert torch.equal(table(ids), expected)
        assert torch.equal(table(ids.shape), expected)
    assert torch.equal(table(ids[:, :3], start=2), table.rows[2:5])
