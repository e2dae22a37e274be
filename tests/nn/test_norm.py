"""The norm equals transformers' in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_cli.device import DeviceProfile
from qlora_cli.memory.profile import MemoryModel
from qlora_cli.memory.tracker import KernelRules, StorageTracker
from qlora_cli.nn.norm import RmsNorm
from qlora_cli.plan.recording import Recording
from tests.helpers.gradients import draw, grads

HIDDEN, TOKENS = 64, 11


def norms(dtype: torch.dtype) -> tuple[nn.Module, RmsNorm]:
    """Return (transformers' norm, ours) with the same weight."""
    theirs = LlamaRMSNorm(HIDDEN, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(1 + 0.3 * draw(HIDDEN))
    theirs.requires_grad_(False)
    return theirs, RmsNorm(theirs.weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 100.0])
def test_norm_equals_transformers_bit_for_bit_and_in_gradient(
    dtype: torch.dtype, spread: float
) -> None:
    theirs, ours = norms(dtype)
    x = (spread * draw(2, TOKENS, HIDDEN)).to(dtype).requires_grad_()
    wanted, found = theirs(x), ours(x)
    assert torch.equal(wanted, found)
    (own,), (other,) = grads(found, [x]), grads(wanted, [x])
    assert own.dtype == dtype
    # Two sums of d float32 products are added in another order, then rounded to dtype once.
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(own, other, rtol=2 * eps, atol=2 * eps * other.abs().max().item())


def test_norm_passes_gradcheck() -> None:
    _, ours = norms(torch.float64)
    x = draw(3, HIDDEN, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ours, (x,))


def test_gradcheck_detects_a_wrong_norm_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = norms(torch.float64)
    x = draw(3, HIDDEN, dtype=torch.float64).requires_grad_()
    monkeypatch.setattr("qlora_cli.nn.norm.Tensor.pow", lambda self, _: self, raising=False)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(ours, (x,))


def test_a_dry_run_for_a_gpu_allocates_what_the_fused_kernel_does() -> None:
    """On a GPU the kernel returns the output and one float32 factor per row, and nothing else."""
    recording = Recording()
    profile = DeviceProfile("cuda", "a GPU", 2**34, (8, 9), 128)
    weight = nn.Parameter(torch.empty(64, dtype=torch.bfloat16, device="meta"), False)
    x = torch.empty(2, 10, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with MemoryModel.of(profile).new_tracker(recording, "meta"):
        y = RmsNorm(weight, 1e-6)(x)
    events = [event for segment in recording.segments for event in segment.events]
    assert [event.num_bytes for event in events if event.kind == "allocate"] == [2560, 80]
    assert y.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_on_a_cpu_allocates_its_output_and_a_factor_per_row(dtype: torch.dtype) -> None:
    """The squares are computed in the memory of the output."""
    recording = Recording()
    norm = RmsNorm(nn.Parameter(torch.ones(HIDDEN, dtype=dtype), False), 1e-6)
    x = draw(TOKENS, HIDDEN, dtype=dtype)
    with StorageTracker(recording, KernelRules()):
        norm(x)
    events = [event for segment in recording.segments for event in segment.events]
    wanted = [TOKENS * HIDDEN * dtype.itemsize, TOKENS * dtype.itemsize]
    assert [event.num_bytes for event in events if event.kind == "allocate"] == wanted
