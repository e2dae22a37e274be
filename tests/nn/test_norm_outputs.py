"""Kept blocks save no output of a norm: equal gradients, fewer bytes, an error after a write."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.memory.counter import Counter
from qlora_cli.memory.tracker import KernelRules, StorageTracker
from qlora_cli.nn.norm import RmsNorm
from qlora_cli.nn.norm_outputs import NormOutputs

WIDTH, TOKENS = 8, 5


class Block(nn.Module):
    """A norm whose output two linears with trained weights read, once through a view."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH // 2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        halves: Tensor = self.second(y.view(-1, 2, WIDTH // 2)[:, 1])
        return halves + torch.tanh(self.first(y))[:, :WIDTH] + x


class WritesToOutput(Block):
    """Changes the output of the norm before a linear reads it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(self.norm(x).mul_(2)))


class WritesToInput(Block):
    """Changes the input of the norm after a linear has read the output."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.first(self.norm(x))
        x.mul_(2)
        return torch.tanh(y)


def rms_norm() -> nn.Module:
    return RmsNorm(nn.Parameter(torch.linspace(0.5, 1.5, WIDTH), requires_grad=False), 1e-6)


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH).requires_grad_(False)


def gradients(block: nn.Module, *, recomputes: bool) -> list[Tensor]:
    """Return the gradients of the input and of the trained weights."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(3), requires_grad=True)
    outputs = NormOutputs(block)
    if recomputes:
        with outputs.recomputed():
            y = block(x)
    else:
        y = block(x)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(y.square().sum(), [x, *trained], allow_unused=True))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("kind", [Block, WritesToOutput])
def test_gradients_are_equal_to_the_last_bit(
    norm: Callable[[], nn.Module], kind: type[Block]
) -> None:
    torch.manual_seed(1)
    block = kind(norm())
    wanted, found = gradients(block, recomputes=False), gradients(block, recomputes=True)
    for own, other in zip(found, wanted, strict=True):
        assert (own is None and other is None) or torch.equal(own, other)


def test_the_output_of_a_norm_is_freed_after_the_forward_pass() -> None:
    torch.manual_seed(1)
    saved = []
    for recomputes in (False, True):
        block, counter = Block(rms_norm()), Counter()
        x, outputs = torch.randn(TOKENS, WIDTH, requires_grad=True), NormOutputs(block)
        with StorageTracker(counter, KernelRules()) as tracker:
            tracker.tag([x, *block.parameters()], "base")
            if recomputes:
                with outputs.recomputed():
                    y = block(x)
            else:
                y = block(x)
            saved.append(counter.live_bytes)
        del y
    assert saved[0] - saved[1] == TOKENS * WIDTH * 4


def test_a_changed_input_is_an_error_and_not_a_wrong_gradient() -> None:
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(WritesToInput(rms_norm()), recomputes=True)


def test_a_saved_tensor_that_is_changed_later_is_an_error() -> None:
    block = Block(rms_norm())
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with NormOutputs(block).recomputed():
        kept = x * 1
        y = kept.square()
    kept.data.mul_(2)  # Invisible to the version counter, as for torch itself.
    kept.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_trained_norm_keeps_its_output() -> None:
    block = Block(layer_norm().requires_grad_(True))
    NormOutputs(block)
    assert not block.norm._forward_hooks


def test_nothing_is_left_after_the_backward_pass() -> None:
    """A saved tensor that refers to its own node would live for ever."""
    block = Block(rms_norm())
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with NormOutputs(block).recomputed():
            y = torch.exp(block(x))  # exp saves its own output.
        reference = weakref.ref(y.untyped_storage())
        y.sum().backward()
        del y
        assert reference() is None
    finally:
        gc.enable()
