"""Work in processes of their own: one, so that nothing else is in its memory, or several side by side.

Ctrl-C reaches them all. The caller's process alone has something to say about it: the others end at once and silently,
as the signal has it by default. While one starts, Python's handler would print a traceback of its imports, so the
signal is blocked until it can be taken: a process inherits what is blocked. Where the caller's process is killed, the
others end too. Where one job fails, those beside it run to their end, and only then the error is the caller's: an hour
of work is not lost for it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from threading import Thread
from typing import Any, TypeVar

import torch


logger = logging.getLogger(__name__)

Job = TypeVar("Job")


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a module's function in a process of its own, with as many threads."""
    with _pool(1) as pool:
        with _interrupts_blocked():
            done = pool.submit(_with_threads, torch.get_num_threads(), function, *args)
        return done.result()


def side_by_side(
    function: Callable[..., Any], jobs: Iterable[tuple[Job, tuple[Any, ...]]], workers: int
) -> Iterator[tuple[Job, Any]]:
    """Each job with what the function returned for its arguments, as they end; one worker is this process.

    The function is a module's. The processor's cores are divided among the workers.

    Raises:
        Exception: the first that a job raised, when those that had begun beside it have ended and been yielded; jobs
            that had not begun are not done.
    """
    if workers == 1:
        yield from ((job, function(*args)) for job, args in jobs)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with _pool(workers) as pool:
        with _interrupts_blocked():
            waiting = {pool.submit(_with_threads, threads, function, *args): job for job, args in jobs}
        try:
            yield from _ended(waiting)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _ended(waiting: Mapping[Future[Any], Job]) -> Iterator[tuple[Job, Any]]:
    failure = None
    for done in as_completed(waiting):
        if done.cancelled():
            continue
        error = done.exception()
        if error is None:
            yield waiting[done], done.result()
        elif failure is None:
            failure = error
            beside = sum(not future.cancel() and not future.done() for future in waiting)
            logger.error("%s failed with %r; %d that had begun are waited for.", waiting[done], error, beside)
    if failure is not None:
        raise failure


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """In a new process; a signal that is ignored, as in a shell's background, stays so."""
    Thread(target=_end_with_parent, daemon=True).start()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _with_threads(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    torch.set_num_threads(threads)
    return function(*args)
