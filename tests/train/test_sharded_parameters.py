"""Parameters of a block are complete while it runs, and gradients are those of all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qlora_cli.parallel.processes import Processes
from qlora_cli.train.division import Division
from qlora_cli.train.sharded_parameters import ShardedParameters
from tests.helpers.optimizers import gradient

SHAPES = [[(64, 30), (5,), (8, 101)], [(3, 100), (33, 16)], [(1, 4096)]]
"""Shapes of the parameters of each block. The last one is not sharded."""
NUM_SHARDED = 2


class Together(Processes):
    """One of several processes in this one. tensors: returns what each of them exchanges."""

    def __init__(self, rank: int, size: int, tensors: Callable[[Tensor], Sequence[Tensor]]) -> None:
        self.rank = rank
        self.size = size
        self.tensors = tensors

    def add_parts(self, own: Tensor, complete: Tensor) -> None:
        """The gradients of all processes are equal in this test."""
        own.copy_(self.size * complete.view(self.size, -1)[self.rank])

    def gather_parts(self, complete: Tensor, own: Tensor) -> None:
        torch.cat(list(self.tensors(own)), out=complete)


def trained(unit: int) -> dict[str, nn.Parameter]:
    """Return parameters of two dtypes."""
    generator = torch.Generator().manual_seed(unit)
    found = {}
    for block, shapes in enumerate(SHAPES):
        for number, shape in enumerate(shapes):
            dtype = torch.bfloat16 if number == 1 else torch.float32
            value = torch.randn(shape, generator=generator).to(dtype)
            found[f"blocks.{block}.{number}"] = nn.Parameter(value)
    return found


def divided(size: int, unit: int) -> list[Division]:
    """Return the division of each process, after it has freed the complete parameters."""
    divisions: list[Division] = []

    def tensors(own: Tensor) -> list[Tensor]:
        """Return the tensors of all processes at the place of `own`."""
        shares = [[share for block in _sharded(d)._shares for share in block] for d in divisions]
        place = next(
            place for own_shares in shares for place, s in enumerate(own_shares) if s is own
        )
        return [own_shares[place] for own_shares in shares]

    for rank in range(size):
        processes = Together(rank, size, tensors)
        divisions.append(Division(trained(unit), "blocks", unit, processes, NUM_SHARDED))
    for division in divisions:
        division.divide()
    return divisions


def _sharded(division: Division) -> ShardedParameters:
    assert division.sharded is not None
    return division.sharded


def of_block(parameters: Sequence[nn.Parameter], block: int) -> Sequence[nn.Parameter]:
    first = sum(map(len, SHAPES[:block]))
    return parameters[first : first + len(SHAPES[block])]


def block_of(division: Division, block: int) -> Sequence[nn.Parameter]:
    return of_block(division.parameters, block)


@pytest.mark.parametrize("unit", [16, 4096])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_only_the_block_that_runs_is_complete(size: int, unit: int) -> None:
    expected = partial(of_block, list(trained(unit).values()))
    for division in divided(size, unit):
        sharded = _sharded(division)
        for block, following in ((0, 1), (1, 2), (1, 0), (0, -1), (1, 0)):
            sharded.enter(block, following)
            for own, wanted in zip(block_of(division, block), expected(block), strict=True):
                assert torch.equal(own, wanted)
            assert all(p.isnan().all() for p in block_of(division, 1 - block))
        sharded.release()
        for block in (0, 1):
            assert all(p.isnan().all() for p in block_of(division, block))
        assert all(map(torch.equal, block_of(division, 2), expected(2)))


@pytest.mark.parametrize("size", [2, 3])
def test_pieces_of_the_memory_are_kept(size: int) -> None:
    """Each process keeps a share of the values of sharded blocks, and none of the others'."""
    sizes = [
        sum(share.numel() for block in _sharded(d)._shares for share in block)
        for d in divided(size, 16)
    ]
    total = sum(p.numel() for name, p in trained(16).items() if not name.startswith("blocks.2"))
    assert max(sizes) == min(sizes)
    assert total <= sum(sizes) < total + size * 16 * len(SHAPES[0] + SHAPES[1])


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_micro_batches_are_added_to_the_pieces(size: int) -> None:
    """A parameter without a gradient in any process gets none. Each process adds two gradients."""
    without = 1
    for division in divided(size, 16):
        sharded = _sharded(division)
        expected = [torch.zeros_like(p).view(-1) for p in division.parameters]
        for batch in (10, 20):
            sharded.enter(1, 0)
            for block in (1, 0):
                sharded.leave(block)
                sharded.enter(block, block - 1)
                for number, parameter in enumerate(division.parameters):
                    if number != without and any(parameter is p for p in block_of(division, block)):
                        parameter.grad = gradient(batch + number, parameter).to(parameter.dtype)
                        expected[number] += size * parameter.grad.view(-1)
            division.end_backward()
        has_gradient = division.have_gradient()
        number_of_last = len(division.parameters) - 1
        assert [n for n, has in enumerate(has_gradient) if not has] == [without, number_of_last]
        division.add_gradients([has_gradient] * size)
        rank = division.processes.rank
        for number, (piece, cuts) in enumerate(zip(division.pieces, division.cuts, strict=True)):
            if number in (without, number_of_last) or not piece.numel():
                assert piece.grad is None
                continue
            wanted = expected[number][cuts[rank] : cuts[rank + 1]]
            assert piece.grad is not None
            torch.testing.assert_close(piece.grad, wanted, rtol=1e-6, atol=0)
        division.zero_grad()
        assert not any(division.have_gradient())


def test_a_block_may_have_nothing_that_is_trained() -> None:
    """Only the second of three sharded blocks has an adapter."""
    parameter = nn.Parameter(torch.arange(40.0))
    wanted = parameter.detach().clone()
    processes = Together(0, 2, lambda own: [own, wanted.chunk(2)[1].new_zeros(own.numel())])
    division = Division({"blocks.1.a": parameter}, "blocks", 16, processes, 3)
    division.divide()
    sharded = _sharded(division)
    for block, following in ((0, 1), (1, 2), (2, 1), (1, 0), (0, 1)):
        sharded.leave(block)
        sharded.enter(block, following)
        assert torch.equal(parameter[:16], wanted[:16]) == (block == 1)
        if block == 1:
            parameter.grad = torch.ones(40)
    sharded.leave()
    assert division.have_gradient() == (True,)
    assert division.pieces[0].grad is not None
    assert division.pieces[0].grad.tolist() == [4.0] * division.pieces[0].numel()


def test_the_main_process_has_everything_for_a_checkpoint() -> None:
    divisions = divided(3, 16)
    for division in divisions:
        with division.completed():
            pairs = list(zip(division.parameters, trained(16).values(), strict=True))
            is_equal = [torch.equal(own, wanted) for own, wanted in pairs]
            num_sharded = len(SHAPES[0] + SHAPES[1])
            assert all(is_equal[num_sharded:])
            assert all(is_equal[:num_sharded]) == division.processes.is_main
            assert not division.processes.is_main or all(is_equal)
        assert all(p.isnan().all() for p in block_of(division, 0) + block_of(division, 1))
