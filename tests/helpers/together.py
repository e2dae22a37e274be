"""Train a recipe in several forks of the test that have joined one gloo group."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState

from qlora_cli.errors import QloraError
from qlora_cli.events import Silent
from qlora_cli.jobs import follow, train
from qlora_cli.recipe.schema import Recipe
from qlora_cli.train.runtime import join_processes


def train_together(
    recipe: Recipe, size: int = 2, *, prepare: Callable[[int], object] = lambda _: None
) -> list[int]:
    """Begin or resume the run of a recipe in `size` processes and return their exit codes.

    prepare: called with the rank in each process before it trains.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = [_fork(recipe, rank, size, port, prepare) for rank in range(size)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


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
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _train(recipe: Recipe) -> None:
    processes = join_processes()
    if processes.is_main:
        resume = (Path(recipe.output) / "run.json").is_file()
        given = {"recipe_path": None, "resume": resume, "observer": Silent()}
        train.run(recipe, processes=processes, **given)
    else:
        follow.run(processes)
