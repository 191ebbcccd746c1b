"""A function that can be stopped in its middle and go on later, though what it calls knows nothing of that.

It runs in a thread of its own, and only while another waits for it in `Turn.go_on`, so that never two run at a time.
What torch keeps for each thread is as in the thread that made it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import copy_context
from threading import Semaphore, Thread

import torch


class Abandoned(BaseException):
    """Raised within the function where it is not to go on."""


class Turn:
    """Such a function.

    Args:
        function: calls `wait` where it is to be stopped, and `check` now and then.
        device_type: whose autocast it takes over.
    """

    def __init__(self, function: Callable[[], object], device_type: str) -> None:
        self.ended = False
        self._function = function
        self._started, self._abandoned = False, False
        self._mine, self._others = Semaphore(0), Semaphore(0)
        self._error: BaseException | None = None
        self._settings = (
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            (device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)),
        )
        self._thread = Thread(target=copy_context().run, args=(self._run,), daemon=True)

    def go_on(self) -> None:
        """Let the function go on to its next `wait`, or its end; what it raises is raised here."""
        if not self._started:
            self._started = True
            self._thread.start()
        self._mine.release()
        while not self._others.acquire(timeout=1):  # a signal that comes just before it waits is only seen after
            pass
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Within the function: stop, until it is to go on."""
        self._others.release()
        self._mine.acquire()
        self.check()

    def check(self) -> None:
        """Within the function: end it if it is not to go on, as after an interrupt while it ran."""
        if self._abandoned:
            raise Abandoned

    def abandon(self) -> None:
        """End the function, if it has not ended, and wait for that."""
        self._abandoned = True
        if self._started:
            self._mine.release()
            self._thread.join()

    def _run(self) -> None:
        threads, grad, (device_type, dtype, enabled) = self._settings
        self._mine.acquire()
        try:
            torch.set_num_threads(threads)
            with ExitStack() as within:
                within.enter_context(torch.set_grad_enabled(grad))
                within.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled))
                self._function()
        except Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.ended = True
            self._others.release()
