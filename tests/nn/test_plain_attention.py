"""Attention in plain operations equals its definition, for every chunk size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_cli.nn import plain_attention as module
from qlora_cli.nn.attention import attend
from qlora_cli.nn.plain_attention import PlainSettings, plain_attention
from qlora_cli.nn.spans import Spans, use_spans

HEADS, GROUPS, SIZE, VALUE_SIZE = 4, 2, 8, 6
SCALING = 0.3


@pytest.fixture(params=[1, 3, 100], ids="queries {}".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the number of queries of a chunk."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param * HEADS * 11)


def draw(num_queries: int = 11) -> list[Tensor]:
    """Return query, key, value and sinks with gradients."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, HEADS, num_queries, SIZE), (1, GROUPS, 11, SIZE), (1, GROUPS, 11, VALUE_SIZE)]
    tensors = [torch.randn(shape, generator=generator) for shape in (*shapes, (HEADS,))]
    return [tensor.requires_grad_() for tensor in tensors]


def defined(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, settings: PlainSettings
) -> Tensor:
    """Return attention by its definition, with all scores in memory."""
    keys, values = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (key, value))
    scores = settings.scaling * query @ keys.mT
    if settings.cap is not None:
        scores = settings.cap * torch.tanh(scores / settings.cap)
    num_queries, num_keys = scores.shape[-2:]
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    visible = distance >= 0
    if settings.window is not None:
        visible &= distance < settings.window
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        return scores.softmax(dim=-1) @ values
    sink = sinks.view(1, HEADS, 1, 1).expand(1, HEADS, num_queries, 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1] @ values


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("num_queries", [11, 2])
def test_output_and_gradients_equal_the_definition(
    cap: float | None, window: int | None, has_sinks: bool, num_queries: int
) -> None:
    query, key, value, sinks = draw(num_queries)
    settings = PlainSettings(SCALING, window, cap)
    inputs = [query, key, value, *([sinks] if has_sinks else [])]
    own, wanted = (
        function(query, key, value, sinks if has_sinks else None, settings)
        for function in (plain_attention, defined)
    )
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)
    grad = torch.randn(own.shape, generator=torch.Generator().manual_seed(3))
    for found, expected in zip(
        torch.autograd.grad(own, inputs, grad),
        torch.autograd.grad(wanted, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"softcap": 1.5}, {"s_aux": torch.linspace(-1, 1, HEADS)}, {"sliding_window": 3}, {}],
    ids=str,
)
def test_rows_are_separate(settings: dict[str, Tensor | float]) -> None:
    """Values of another size than the keys need no setting to be computed in plain operations."""
    query, key, value, _ = draw()
    lengths = (4, 7)
    with use_spans(Spans(lengths, "cpu")):
        packed, _ = attend(torch.nn.Module(), query, key, value, None, SCALING, **settings)
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    alone = [attend(torch.nn.Module(), *part, None, SCALING, **settings)[0] for part in parts]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-6, atol=1e-6)
