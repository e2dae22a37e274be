"""The chunked loss on the GPU equals torch's cross entropy in float32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.nn import loss
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.nn.loss import chunked_cross_entropy, score
from tests.helpers.quantized import draw
from tests.helpers.reference_loss import reference_cross_entropy, targets_of
from tests.helpers.runs import CPU

pytestmark = pytest.mark.gpu
TOKENS, HIDDEN, VOCAB = 300, 256, 5000


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return (hidden, head, labels); a third of the labels is ignored."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[::3] = IGNORE_INDEX
    hidden, head = draw(TOKENS, HIDDEN, dtype=dtype), draw(VOCAB, HIDDEN, seed=1, dtype=dtype)
    return hidden, head * HIDDEN**-0.5, labels


@pytest.mark.parametrize("targets_per_chunk", [7, 200, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_and_gradient_equal_the_reference(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, targets_per_chunk: int
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", targets_per_chunk * VOCAB)
    hidden, head, labels = inputs(dtype)
    there = hidden.to(gpu).detach().requires_grad_()
    where = [t.to(gpu) for t in targets_of(labels)]
    ours = chunked_cross_entropy(there, head.to(gpu), *where, 1 / 200)
    ours.backward()
    reference = hidden.float().detach().requires_grad_()
    wanted = reference_cross_entropy(reference, head.float(), labels, 1 / 200)
    wanted.backward()
    eps = torch.finfo(dtype).eps
    # As on the CPU: logits and their gradients are rounded; float32 sums in another order.
    allowed = 4 * eps if dtype != torch.float32 else HIDDEN**0.5 * eps
    torch.testing.assert_close(ours.to(CPU), wanted, rtol=allowed, atol=0)
    assert there.grad is not None
    assert reference.grad is not None
    own = there.grad.to(CPU).float()
    assert (own - reference.grad).norm() / reference.grad.norm() < allowed
    assert not own[labels == IGNORE_INDEX].any()


def test_a_trained_head_gets_its_gradient(gpu: torch.device) -> None:
    hidden, head, labels = inputs(torch.float32)
    there, on_cpu = head.to(gpu).detach().requires_grad_(), head.clone().requires_grad_()
    where = [t.to(gpu) for t in targets_of(labels)]
    chunked_cross_entropy(hidden.to(gpu), there, *where, 1.0).backward()
    reference_cross_entropy(hidden, on_cpu, labels, 1.0).backward()
    assert there.grad is not None
    torch.testing.assert_close(there.grad.to(CPU), on_cpu.grad, rtol=1e-4, atol=1e-5)


def test_the_score_equals_the_score_on_the_cpu(gpu: torch.device) -> None:
    hidden, head, labels = inputs(torch.float32)
    where = targets_of(labels)
    total, right = score(hidden.to(gpu), head.to(gpu), *(t.to(gpu) for t in where))
    wanted, hits = score(hidden, head, *where)
    torch.testing.assert_close(total.to(CPU), wanted, rtol=1e-5, atol=0)
    assert right.item() == hits.item()
