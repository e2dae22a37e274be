"""Train a recipe in several forks of the test that have joined one gloo group."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from qlora_cli.errors import QloraError
from qlora_cli.events import Silent
from qlora_cli.files.safetensors_io import read_header, read_tensor
from qlora_cli.jobs import follow, train
from qlora_cli.recipe.schema import Recipe
from qlora_cli.runs.layout import RunFolder
from qlora_cli.runs.metrics import read_evaluations
from qlora_cli.train import loop
from qlora_cli.train.launcher import reserved_port
from qlora_cli.train.runtime import join_processes
from qlora_cli.train.step import train_step
from tests.helpers.resumed_runs import STEPS, losses


def train_together(
    recipe: Recipe, size: int = 2, *, prepare: Callable[[int], object] = lambda _: None
) -> list[int]:
    """Begin or resume the run of a recipe in `size` processes and return their exit codes.

    prepare: called with the rank in each process before it trains.
    """
    with reserved_port() as port:
        children = [_fork(recipe, rank, size, port, prepare) for rank in range(size)]
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def signal_in_step(step: int, number: int) -> None:
    """Send this process a signal in a step."""

    def interrupted(state: Any, *rest: Any) -> Any:
        if state.step == step:
            os.kill(os.getpid(), number)
        return train_step(state, *rest)

    loop.train_step = interrupted


def adapter_of(run: RunFolder) -> dict[str, torch.Tensor]:
    """Return the tensors of the run's adapter."""
    entries, _ = read_header(run.adapter / "adapter_model.safetensors")
    return {name: read_tensor(entry) for name, entry in entries.items()}


def difference(run: RunFolder, reference: RunFolder) -> float:
    """Return the largest difference of the adapters' values, and of losses and norms."""
    weights, expected = adapter_of(run), adapter_of(reference)
    assert weights.keys() == expected.keys()
    values = [float((weights[name] - expected[name]).abs().max()) for name in weights]
    assert len(losses(run)) == len(losses(reference)) == STEPS
    for line, other in zip(losses(run), losses(reference), strict=True):
        assert line[0] == other[0]
        values += [abs(a - b) / b for a, b in zip(line[1:], other[1:], strict=True)]
    evaluated, wanted = read_evaluations(run.metrics), read_evaluations(reference.metrics)
    assert [item.step for item in evaluated] == [item.step for item in wanted]
    values += [abs(a.loss - b.loss) for a, b in zip(evaluated, wanted, strict=True)]
    return max(values)


def _fork(recipe: Recipe, rank: int, size: int, port: int, prepare: Callable[[int], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        PartialState._reset_state()
        prepare(rank)
        _train(recipe)
        code = 0
    except QloraError as error:
        traceback.print_exc()
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _train(recipe: Recipe) -> None:
    processes = join_processes()
    if processes.is_main:
        resume = (Path(recipe.output) / "run.json").is_file()
        given = {"recipe_path": None, "resume": resume, "observer": Silent()}
        train.run(recipe, processes=processes, **given)
    else:
        follow.run(processes)
