"""Rotary positions equal transformers' in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlora_cli.nn import rotary
from qlora_cli.nn.rotary import rotate, rotates_halves
from tests.helpers.gradients import draw, grads

TOKENS, SIZE = 7, 8


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return queries of 4 heads, keys of 2, cos and sin, in the layout of a projection's output."""
    q, k = (draw(1, TOKENS, heads, SIZE, dtype=dtype, seed=heads) for heads in (4, 2))
    angle = draw(1, TOKENS, SIZE, dtype=dtype, seed=9)
    return [q.transpose(1, 2), k.transpose(1, 2), angle.cos(), angle.sin()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_transformers(dtype: torch.dtype) -> None:
    q, k, cos, sin = inputs(dtype)
    q.requires_grad_()
    k.requires_grad_()
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for found, wanted in zip(
        rotate(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, **tolerance)
        source = q if found.shape == q.shape else k
        (own,), (other,) = grads(found, [source]), grads(wanted, [source])
        torch.testing.assert_close(own, other, **tolerance)
    with torch.no_grad():
        assert torch.equal(rotate(q, k, cos, sin)[0], rotate(q.detach(), k, cos, sin)[0])


def test_rotation_passes_gradcheck_and_a_wrong_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, cos, sin = inputs(torch.float64)
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: rotate(q, k, cos, sin)[0], (q,))
    right = rotary._rotated
    monkeypatch.setattr(rotary, "_rotated", lambda x, cos, sin: right(x, cos, 1.1 * sin))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda q: rotate(q, k, cos, sin)[0], (q,))


def test_only_an_equal_function_is_replaced() -> None:
    assert rotates_halves(apply_rotary_pos_emb)
    assert not rotates_halves(interleaved)
    assert not rotates_halves(None)
    assert not rotates_halves(lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, 2 * sin))
