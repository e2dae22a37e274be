"""The buffers of an exchange are freed when it has ended, also if a thread still refers to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.memory.counter import Counter
from qlora_cli.memory.tracker import KernelRules, StorageTracker
from qlora_cli.parallel.processes import Processes
from qlora_cli.train import bucket, division
from qlora_cli.train.division import Division
from tests.helpers.optimizers import gradient

NUM_BLOCKS = 4
NUM_VALUES = 3200
"""Values of the parameter of each block."""


class OneOfTwo(Processes):
    """The first of two processes, which keeps the tensors of an exchange until the next one.

    gloo's threads do so if they do not get the interpreter's lock. is_late: False to keep none.
    """

    size = 2

    def __init__(self, is_late: bool) -> None:
        self._is_late = is_late
        self._kept: tuple[Tensor, ...] = ()

    def add_parts(self, own: Tensor, complete: Tensor) -> None:
        self._keep(own, complete)
        own.copy_(complete.view(2, -1)[0])

    def gather_parts(self, complete: Tensor, own: Tensor) -> None:
        self._keep(own, complete)
        torch.cat([own, own], out=complete)

    def _keep(self, *tensors: Tensor) -> None:
        self._kept = tensors if self._is_late else ()


def peak_of_exchanges(is_late: bool) -> int:
    """Return the peak of adding up the gradients of all blocks and of exchanging their pieces."""
    counter = Counter()
    with StorageTracker(counter, KernelRules()):
        names = [f"blocks.{block}.a" for block in range(NUM_BLOCKS)]
        parameters = {name: nn.Parameter(torch.zeros(NUM_VALUES)) for name in names}
        divided = Division(parameters, "blocks", 16, OneOfTwo(is_late))
        for number, parameter in enumerate(divided.parameters):
            parameter.grad = gradient(number, parameter)
        expected = [p.grad.clone() for p in divided.parameters if p.grad is not None]
        with counter.phase("step"):
            divided.add_gradients([divided.have_gradient()] * 2)
            for piece, wanted in zip(divided.pieces, expected, strict=True):
                assert piece.grad is not None
                assert torch.equal(piece.grad, wanted[: NUM_VALUES // 2])
            with torch.no_grad():
                for piece in divided.pieces:
                    piece.add_(1.0)
            divided.exchange_pieces()
        assert all(bool((parameter == 1).all()) for parameter in divided.parameters)
    return counter.phases[-1].peak_bytes


def test_a_late_thread_does_not_change_the_peak() -> None:
    assert peak_of_exchanges(is_late=True) == peak_of_exchanges(is_late=False)


def test_buffers_that_wait_for_a_late_thread_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bucket, division):
        monkeypatch.setattr(module, "free_now", lambda _: None)
    late, expected = peak_of_exchanges(is_late=True), peak_of_exchanges(is_late=False)
    assert late - expected == 4 * NUM_VALUES // 2
