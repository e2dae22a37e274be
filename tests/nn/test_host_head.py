"""A head in host memory: the loss over its pieces equals that of a head on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_cli.nn import host_head, piecewise_loss
from qlora_cli.nn.host_head import HostHead
from qlora_cli.nn.logits import IDENTITY, LogitTransform
from qlora_cli.nn.loss import chunked_cross_entropy, score, score_targets
from qlora_cli.nn.packing import WeightFormat
from qlora_cli.nn.quant import QuantLinear

TOKENS, HIDDEN, WORDS = 23, 16, 50
CPU = torch.device("cpu")
TOLERANCE = 1e-6
"""Largest difference relative to the largest value, as in all laws in float32."""


def head_with(
    weight: Tensor, bias: Tensor | None = None, compute: torch.dtype = torch.float32
) -> HostHead:
    linear = QuantLinear(
        weight.shape[1],
        weight.shape[0],
        bias is not None,
        WeightFormat(16, compute, weight.dtype),
    )
    head = HostHead(linear, CPU)
    head.put(weight)
    if bias is not None:
        head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return head


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (hidden states, head, positions, targets)."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(WORDS, HIDDEN, generator=generator).to(dtype)
    positions = torch.arange(0, TOKENS, 2)
    targets = torch.randint(0, WORDS, positions.shape, generator=generator)
    return hidden, weight, positions, targets


@pytest.fixture(params=[1, 16, 49])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of rows of a piece; the last piece may have fewer."""
    monkeypatch.setattr(HostHead, "piece_rows", request.param)
    return int(request.param)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    difference = (found.double() - wanted.double()).abs().max()
    assert difference <= tolerance * wanted.double().abs().max(), float(difference)


def both(
    hidden: Tensor, weight: Tensor, head: HostHead, *given: Any, **more: Any
) -> list[tuple[Tensor, Tensor]]:
    """Return (loss, gradient of the hidden states) with the weight, and with the head."""
    found = []
    for one in (weight, head):
        states = hidden.clone().requires_grad_()
        value = chunked_cross_entropy(states, one, *given, **more)
        value.backward()
        assert states.grad is not None
        found.append((value.detach(), states.grad))
    return found


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("chunk", [None, 4])
def test_pieces_give_the_same_loss_and_gradient(
    rows: int, chunk: int | None, has_bias: bool, cap: float | None
) -> None:
    hidden, weight, positions, targets = draw()
    bias = torch.linspace(-1, 1, WORDS) if has_bias else None
    more: dict[str, Any] = {"bias": bias, "transform": LogitTransform(0.5, cap), "chunk": chunk}
    head = head_with(weight, bias)
    for scale in (0.25, torch.linspace(-1, 2, len(targets))):
        wanted, found = both(hidden, weight, head, positions, targets, scale, **more)
        for own, other in zip(found, wanted, strict=True):
            assert_near(own, other)
    total, correct = score(hidden, head, positions, targets, **more)
    wanted_total, wanted_correct = score(hidden, weight, positions, targets, **more)
    assert_near(total, wanted_total)
    assert correct == wanted_correct
    values, is_top1 = score_targets(hidden, head, positions, targets, **more)
    wanted_values, wanted_top1 = score_targets(hidden, weight, positions, targets, **more)
    assert_near(values, wanted_values)
    assert torch.equal(is_top1, wanted_top1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_certain_target_is_not_lost_in_16_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """softmax - 1 is close to 0 there, and a softmax in 16 bit would be 1."""
    monkeypatch.setattr(HostHead, "piece_rows", 7)
    hidden, weight, positions, _ = draw(dtype)
    rows = 3 * hidden[positions]
    logits = (rows @ weight.t()).float()
    targets = logits.argmax(dim=1)
    slope = logits.softmax(dim=1) - torch.nn.functional.one_hot(targets, WORDS)
    wanted = 64 * slope @ weight.float()
    head = head_with(weight, compute=dtype)
    _, (_, found) = both(rows, weight, head, torch.arange(len(rows)), targets, 64.0)
    smallest = wanted.abs().amax(dim=1)
    assert smallest.min() < 1e-3 * smallest.max()
    error = (found.float() - wanted).abs().amax(dim=1)
    assert (error <= 2 * torch.finfo(dtype).eps * smallest).all()


def test_a_head_of_one_piece_gives_equal_bits() -> None:
    hidden, weight, positions, targets = draw()
    head = head_with(weight)
    assert head.num_pieces == 1
    wanted, found = both(hidden, weight, head, positions, targets, 0.5, transform=IDENTITY)
    assert all(torch.equal(own, other) for own, other in zip(found, wanted, strict=True))


def test_no_target_at_all_is_zero_loss_and_zero_gradient(rows: int) -> None:
    hidden, weight, positions, targets = draw()
    hidden.requires_grad_()
    value = chunked_cross_entropy(hidden, head_with(weight), positions[:0], targets[:0], 1.0)
    value.backward()
    assert hidden.grad is not None
    assert (value.item(), bool(hidden.grad.any())) == (0.0, False)


def test_the_output_equals_that_of_a_head_on_the_device(rows: int) -> None:
    hidden, weight, _, _ = draw()
    bias = torch.linspace(-1, 1, WORDS)
    with torch.no_grad():
        output = head_with(weight, bias)(hidden[None])
    assert_near(output, torch.nn.functional.linear(hidden, weight, bias)[None])


def test_the_forward_method_refuses_to_compute_gradients() -> None:
    hidden, weight, _, _ = draw()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        head_with(weight)(hidden.requires_grad_())


def test_pieces_have_two_buffers_and_cover_the_vocabulary(rows: int) -> None:
    _, weight, _, _ = draw()
    head = head_with(weight.half())
    places, found = set(), []
    for at, piece in head.pieces():
        assert piece.shape[0] == at.stop - at.start <= rows
        found.append(piece.clone())
    assert torch.equal(torch.cat(found), weight.half().float())
    for _, piece in head_with(weight).pieces():
        places.add(piece.data_ptr())
    assert len(places) == min(2, head.num_pieces)


def test_a_buffer_that_is_used_too_early_would_be_noticed(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the next piece is copied to the buffer of the one that computes, results differ."""
    hidden, weight, positions, targets = draw()
    head = head_with(weight)
    copy, last = HostHead._copy, []

    def copy_to_one_buffer(self: HostHead, index: int, buffer: Tensor, copies: Any) -> Any:
        last.append(buffer)
        return copy(self, index, last[0], copies)

    monkeypatch.setattr(HostHead, "_copy", copy_to_one_buffer)
    wanted, found = both(hidden, weight, head, positions, targets, 1.0)
    assert not torch.allclose(found[0], wanted[0], rtol=1e-3)


def test_a_wrong_correction_of_earlier_pieces_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HostHead, "piece_rows", 16)
    update = piecewise_loss._OnlineSoftmax.update

    def without_correction(self: Any, *given: Any) -> Any:
        _, column, is_inside = update(self, *given)
        return torch.ones_like(self.norm[given[0]]), column, is_inside

    monkeypatch.setattr(piecewise_loss._OnlineSoftmax, "update", without_correction)
    hidden, weight, positions, targets = draw()
    wanted, found = both(hidden, weight, head_with(weight), positions, targets, 1.0)
    with pytest.raises(AssertionError):
        assert_near(found[1], wanted[1])


def test_pieces_of_a_real_head_are_32_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_with(torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta"))
    assert (head.piece_rows, head.num_pieces) == (4096, 32)
    monkeypatch.setattr(host_head, "PIECE_BYTES", 1)
    assert head.piece_rows == 1
