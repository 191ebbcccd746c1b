"""Work in processes of their own: one, so that nothing else is in its memory, or several side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

import torch


Job = TypeVar("Job")


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a module's function in a process of its own, with as many threads."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), function, *args).result()


def side_by_side(
    function: Callable[..., Any], jobs: Iterable[tuple[Job, tuple[Any, ...]]], workers: int
) -> Iterator[tuple[Job, Any]]:
    """Each job with what the function returned for its arguments, as they end; one worker is this process.

    The function is a module's. The processor's cores are divided among the workers.
    """
    if workers == 1:
        yield from ((job, function(*args)) for job, args in jobs)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_with_threads, threads, function, *args): job for job, args in jobs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _with_threads(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    torch.set_num_threads(threads)
    return function(*args)
