"""Pieces of parameters, each updated by another process, equal complete ones updated by one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from qlora_cli.parallel.processes import SINGLE, Processes
from qlora_cli.recipe.schema import Train
from qlora_cli.runs.optimizer_states import joined_states, mapped_state, part_of_state
from qlora_cli.train.divided_optimizer import DividedOptimizer
from qlora_cli.train.division import Division, cuts_of
from qlora_cli.train.optimizer import OPTIMIZERS, TrainingOptimizer, make_optimizer
from tests.helpers.optimizers import gradient
from tests.helpers.resumed_runs import assert_equal
from tests.helpers.runs import CPU

SHAPES = [(64, 300), (5,), (1, 4096), (8, 1061), (3, 100)]
"""Shapes of parameters with 8-bit states that are cut, that are not, and with 32-bit states."""


class OneOf(Processes):
    """One of several processes that is alone in a test."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def trained(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    tensors = (torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES)
    return {f"blocks.{number}": nn.Parameter(tensor) for number, tensor in enumerate(tensors)}


def make_grouped(settings: Train, division: Division) -> TrainingOptimizer:
    """Return the optimizer of pieces of which every second one has a learning rate of its own."""
    factors = dict.fromkeys(division.pieces[1::2], 3.0)
    return make_optimizer(settings, division.pieces, CPU, factors)


def updated(
    name: Any, processes: Processes, unit: int, dtype: torch.dtype = torch.float32
) -> tuple[Division, TrainingOptimizer]:
    """Update the pieces of one process three times. The others' pieces stay as they are."""
    division = Division(trained(dtype), "blocks", unit, processes)
    optimizer = make_grouped(Train(optimizer=name, weight_decay=0.1), division)
    for step in range(3):
        for number, parameter in enumerate(division.parameters):
            parameter.grad = gradient(10 * step + number, parameter)
        if processes.size > 1:
            for piece, parameter, cuts in zip(
                division.pieces, division.parameters, division.cuts, strict=True
            ):
                assert parameter.grad is not None
                part = parameter.grad.view(-1)[cuts[processes.rank] : cuts[processes.rank + 1]]
                piece.grad = part if part.numel() else None
        optimizer.apply(0.5, 1e-2)
    return division, optimizer


def together(
    name: str, size: int, unit: int, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], dict[int, Any], list[dict[int, Any]]]:
    """Return the values of all parameters after the updates of all processes, and the states.

    The second is the joined states of each parameter, the third those of each process.
    """
    made = [updated(name, OneOf(rank, size), unit, dtype) for rank in range(size)]
    values = []
    for number in range(len(SHAPES)):
        pieces = [division.pieces[number].detach() for division, _ in made]
        values.append(torch.cat(pieces).view(SHAPES[number]))
    own = [optimizer.state_dict()["state"] for _, optimizer in made]
    parts = [[states[index] for states in own if index in states] for index in range(len(SHAPES))]
    return values, {index: joined_states(part) for index, part in enumerate(parts)}, own


def flat(states: dict[int, Any]) -> dict[int, Any]:
    """Return states with all tensors flat, as the files of several processes have them."""

    def flattened(_: str, value: Any) -> Any:
        has_shape = isinstance(value, torch.Tensor) and value.dim() > 0
        return value.reshape(-1) if has_shape else value

    return {index: mapped_state(flattened, state) for index, state in sorted(states.items())}


CASES = [
    ("adamw", torch.float32),
    ("adamw", torch.float16),
    ("adamw8bit", torch.float32),
]


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_updated_pieces_have_the_bits_of_complete_parameters(
    name: str, dtype: torch.dtype, size: int
) -> None:
    unit = OPTIMIZERS[name].unit
    division, optimizer = updated(name, SINGLE, unit, dtype)
    values, states, own = together(name, size, unit, dtype)
    for value, expected in zip(values, division.parameters, strict=True):
        assert torch.equal(value, expected)
    expected_states = flat(optimizer.state_dict()["state"])
    assert_equal(states, expected_states)
    order = [id(piece) for group in optimizer.param_groups for piece in group["params"]]
    numbers = {id(piece): number for number, piece in enumerate(division.pieces)}
    for rank in range(size):
        for index, state in own[rank].items():
            cuts = cuts_of(division.parameters[numbers[order[index]]].numel(), size, unit)
            part = part_of_state(expected_states[index], cuts[rank], cuts[rank + 1])
            assert_equal(part, flat({0: state})[0])


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_joined_states_are_restored_by_one_process_and_by_several(
    name: str, dtype: torch.dtype
) -> None:
    unit = OPTIMIZERS[name].unit
    _, optimizer = updated(name, SINGLE, unit, dtype)
    saved = optimizer.state_dict()
    _, joined, own = together(name, 2, unit, dtype)
    settings = Train.model_validate({"optimizer": name})
    restored = make_grouped(settings, Division(trained(dtype), "blocks", unit, SINGLE))
    restored.load_state_dict({**saved, "state": joined})
    assert_equal(restored.state_dict(), saved)
    division = Division(trained(dtype), "blocks", unit, OneOf(0, 2))
    part = DividedOptimizer(make_grouped(settings, division), division)
    part.load_state_dict({**saved, "state": joined})
    assert_equal(flat(part.state_dict()["state"]), flat(own[0]))


def test_pieces_that_divide_a_block_of_values_are_noticed() -> None:
    division, _ = updated("adamw8bit", SINGLE, 1)
    values, _, _ = together("adamw8bit", 2, 100)
    assert not all(map(torch.equal, values, division.parameters))


def test_every_value_has_one_process_and_the_first_has_at_most_a_unit_more() -> None:
    for size in (1, 2, 3, 8):
        for unit in (1, 16, 4096):
            for number in (1, 15, 16, 17, 4095, 4096, 5000, 65_536, 229_376):
                cuts = cuts_of(number, size, unit)
                assert (cuts[0], cuts[-1], len(cuts)) == (0, number, size + 1)
                lengths = [end - start for start, end in pairwise(cuts)]
                assert all(start % unit == 0 or start == number for start in cuts)
                assert all(length >= min(unit, number) for length in lengths if length)
                assert max(lengths) - min(lengths) < 2 * unit
