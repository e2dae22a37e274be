"""The chunked loss and its gradients equal torch's cross entropy for every chunk size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_cli.nn import loss
from qlora_cli.nn.labels import IGNORE_INDEX
from qlora_cli.nn.logits import LogitTransform
from qlora_cli.nn.loss import chunked_cross_entropy, score, score_targets
from tests.helpers.reference_loss import reference_cross_entropy, targets_of

TOKENS, HIDDEN, WORDS = 23, 16, 50


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return (hidden (n, d), head (V, d), labels (n,)); a third of the labels is ignored."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    head = torch.randn(WORDS, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    labels[::3] = IGNORE_INDEX
    return hidden, head, labels


@pytest.fixture(params=[1, 2, 5, 7, 15, 16, 1000])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of targets per chunk; of 15 targets the last chunk is full or partial."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", request.param * WORDS)
    return int(request.param)


@pytest.mark.parametrize("trained", [True, False], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("scale", [1.0, 1 / 15, 300.0])
def test_loss_and_gradients_equal_torch(chunk: int, trained: bool, scale: float) -> None:
    hidden, head, labels = draw()
    hidden.requires_grad_()
    head.requires_grad_(trained)
    inputs = (hidden, head) if trained else (hidden,)
    ours = chunked_cross_entropy(hidden, head, *targets_of(labels), scale)
    wanted = reference_cross_entropy(hidden, head, labels, scale)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    found, other = (torch.autograd.grad(one, inputs) for one in (ours, wanted))
    for own, reference in zip(found, other, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-6 * max(1.0, scale))


def test_the_scores_of_single_targets_equal_torch(chunk: int) -> None:
    hidden, head, labels = draw()
    positions, targets = targets_of(labels)
    log_probabilities, is_top1 = score_targets(hidden, head, positions, targets)
    logits = (hidden @ head.t())[positions]
    wanted = logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(log_probabilities, wanted, rtol=1e-6, atol=1e-5)
    assert is_top1.tolist() == (logits.argmax(dim=1) == targets).tolist()


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("has_bias", [True, False])
def test_scale_soft_cap_and_bias_equal_torch(
    chunk: int, cap: float | None, factor: float, has_bias: bool
) -> None:
    hidden, head, labels = draw()
    bias = torch.linspace(-1, 1, WORDS) if has_bias else None
    inputs = [tensor.requires_grad_() for tensor in (hidden, head, bias) if tensor is not None]
    transform = LogitTransform(factor, cap)
    targets = targets_of(labels)
    ours = chunked_cross_entropy(hidden, head, *targets, 0.5, bias, transform)
    output = factor * torch.nn.functional.linear(hidden, head, bias)
    capped = output if cap is None else cap * torch.tanh(output / cap)
    wanted = 0.5 * torch.nn.functional.cross_entropy(
        capped, labels, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(ours, wanted)
    for own, reference in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-6)
    total, right = score(hidden, head, *targets, bias, transform)
    torch.testing.assert_close(total, 2 * wanted.detach())
    kept = labels != IGNORE_INDEX
    assert right == (capped.argmax(dim=1) == labels)[kept].sum()


def test_a_later_factor_scales_the_gradients() -> None:
    """A factor that is multiplied with the loss must also scale the gradients."""
    hidden, head, labels = draw()
    hidden.requires_grad_()
    ours = 3 * chunked_cross_entropy(hidden, head, *targets_of(labels), 0.5)
    wanted = reference_cross_entropy(hidden, head, labels, 1.5)
    torch.testing.assert_close(
        *(torch.autograd.grad(one, hidden)[0] for one in (ours, wanted)), rtol=1e-5, atol=1e-6
    )


def test_ignored_positions_have_exactly_no_gradient(chunk: int) -> None:
    hidden, head, labels = draw()
    hidden.requires_grad_()
    chunked_cross_entropy(hidden, head, *targets_of(labels), 1.0).backward()
    assert hidden.grad is not None
    assert not hidden.grad[labels == IGNORE_INDEX].any()
    assert hidden.grad[labels != IGNORE_INDEX].any(dim=1).all()


def test_no_target_at_all_is_zero_loss_and_zero_gradient() -> None:
    hidden, head, labels = draw()
    hidden.requires_grad_()
    total = chunked_cross_entropy(
        hidden, head, *targets_of(torch.full_like(labels, IGNORE_INDEX)), 1.0
    )
    total.backward()
    assert total.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_hidden_states_lose_only_their_own_rounding(dtype: torch.dtype) -> None:
    hidden, head, labels = draw(dtype)
    hidden.requires_grad_()
    ours = chunked_cross_entropy(hidden, head, *targets_of(labels), 1.0)
    wanted = reference_cross_entropy(hidden.float(), head.float(), labels, 1.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, wanted, rtol=4 * eps, atol=0)
    own, reference = (torch.autograd.grad(one, hidden)[0].float() for one in (ours, wanted))
    assert (own - reference).norm() / reference.norm() < 4 * eps


def test_huge_logits_stay_finite() -> None:
    """softmax of 1e4 overflows unless the largest logit is subtracted first."""
    hidden, head, labels = draw()
    hidden = (1e4 * hidden).requires_grad_()
    ours = chunked_cross_entropy(hidden, head, *targets_of(labels), 1.0)
    ours.backward()
    torch.testing.assert_close(
        ours, reference_cross_entropy(hidden, head, labels, 1.0), rtol=1e-5, atol=0
    )
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_a_nan_reaches_the_loss() -> None:
    hidden, head, labels = draw()
    hidden[1] = float("nan")
    assert chunked_cross_entropy(hidden, head, *targets_of(labels), 1.0).isnan()


def test_score_counts_top_1_predictions(chunk: int) -> None:
    hidden, head, labels = draw()
    best = (hidden @ head.t()).argmax(dim=1)
    labels[[1, 4, 22]] = best[[1, 4, 22]]
    total, right = score(hidden, head, *targets_of(labels))
    kept = labels != IGNORE_INDEX
    assert right.item() == (best[kept] == labels[kept]).sum().item() >= 3
    torch.testing.assert_close(
        total, reference_cross_entropy(hidden, head, labels, 1.0), rtol=1e-6, atol=1e-5
    )


def test_no_tensor_of_tokens_by_vocabulary_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak memory is that of one chunk and not that of all targets."""
    from qlora_cli.memory.counter import Counter
    from qlora_cli.memory.tracker import KernelRules, StorageTracker

    peaks = {}
    for num in (2, 1000):
        monkeypatch.setattr(loss, "CHUNK_ELEMENTS", num * WORDS)
        hidden, head, labels = draw()
        counter = Counter()
        with StorageTracker(counter, KernelRules()):
            chunked_cross_entropy(
                hidden.requires_grad_(), head, *targets_of(labels), 1.0
            ).backward()
        peaks[num] = counter.high_bytes
    # 13 fewer targets at once, each with its float32 logits and their temporaries.
    assert peaks[1000] - peaks[2] >= 13 * WORDS * 4
