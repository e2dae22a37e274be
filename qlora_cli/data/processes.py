"""Apply a function to jobs in several processes, in order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from typing import Any, TypeVar

from qlora_cli.errors import QloraError

_J = TypeVar("_J")
_R = TypeVar("_R")
_WAITING = 2
"""Jobs per process that are submitted in advance, so that no process waits for the next one."""
_function: Callable[[Any], Any] | None = None
"""The function of a worker process."""


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def workers(
    function: Callable[[_J], _R], number: int, modules: Sequence[str] = ()
) -> Iterator[Callable[..., Iterator[_R]]]:
    """Yield a function that applies `function` to jobs in order and yields the results in order.

    function, jobs and results must be picklable if there are several processes; the function is
    sent once. number: of processes; 1 applies the function in this process. modules: that the
    function needs; the processes share them in memory. Only a few jobs and results exist at a time.
    Exceptions of the function are raised here.
    Raises QloraError if a process is killed.
    """
    if number == 1:
        yield lambda jobs: map(function, jobs)
        return
    prepare_workers(modules)
    pool = ProcessPoolExecutor(
        number,
        mp_context=multiprocessing.get_context(_method()),
        initializer=_start,
        initargs=(pickle.dumps(function),),
    )
    try:
        yield lambda jobs: _in_order(pool, jobs, number * _WAITING)
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_workers(modules: Sequence[str]) -> None:
    """Begin to import modules in the process that the workers are forked from, if there is one.

    This process does not wait for it.
    """
    if _method() == "forkserver":
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, *modules])
        _start_resource_tracker()
        forkserver.ensure_running()


def _method() -> str:
    # A fork of this process could deadlock: it has threads and possibly a CUDA context.
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _start_resource_tracker() -> None:
    """Start Python's resource tracker such that the hangup of a terminal does not end it.

    Otherwise this process starts another tracker while it ends, which prints an error for each
    semaphore that it did not register. The tracker ends with the processes that use it.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        resource_tracker.ensure_running()  # It inherits the mask.
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _in_order(pool: ProcessPoolExecutor, jobs: Iterable[Any], ahead: int) -> Iterator[Any]:
    pending: deque[Future[Any]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(_call, job))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except (BrokenProcessPool, BrokenPipeError) as error:
        # The pipe breaks if the process ends before it has read the function.
        raise QloraError(
            "a process that tokenizes rows was killed",
            hint="the system may be out of memory; set data.processes to a smaller number",
        ) from error


def _start(function: bytes) -> None:
    """Prepare a worker process."""
    global _function
    # The main process stops the workers after Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One thread per process: there are as many processes as cores.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _function = pickle.loads(function)
    # The imported modules live as long as the process, so the collector need not visit them.
    gc.freeze()


def _exit_with_parent() -> None:
    """End this process if the main process is killed; it would wait for jobs forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _call(job: Any) -> Any:
    assert _function is not None
    return _function(job)
