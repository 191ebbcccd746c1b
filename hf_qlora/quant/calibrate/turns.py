"""A function that can be stopped in its middle and go on later, though what it calls knows nothing of that.

It is a greenlet: a stack of its own in the same thread. In threads of their own, oneDNN and MKL keep buffers for each,
which takes more than the activations that are saved. What torch keeps for a thread, and a function may have changed
where it stops, is put back on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial

import torch
from greenlet import GreenletExit, getcurrent, greenlet


class Turn:
    """Such a function.

    Args:
        function: calls `wait` where it is to be stopped.
        device_type: whose autocast is put back.
    """

    def __init__(self, function: Callable[[], object], device_type: str) -> None:
        self._device_type = device_type
        self._greenlet = greenlet(function)
        self._greenlet.gr_context = copy_context()
        self._state = self._now()

    @property
    def ended(self) -> bool:
        """Whether the function has returned, raised, or was abandoned."""
        return bool(self._greenlet.dead)

    def go_on(self) -> None:
        """Let the function go on to its next `wait`, or its end; what it raises is raised here."""
        self._greenlet.parent = getcurrent()
        self._in_its_state(self._greenlet.switch)

    def wait(self) -> None:
        """Within the function: stop, until it is to go on."""
        self._greenlet.parent.switch()

    def abandon(self) -> None:
        """End the function where it waits, if it does."""
        if self._greenlet:
            self._in_its_state(partial(self._greenlet.throw, GreenletExit))

    def _in_its_state(self, switch: Callable[[], object]) -> None:
        before = self._now()
        self._set(self._state)
        try:
            switch()
        finally:
            self._state = self._now()
            self._set(before)

    def _now(self) -> tuple[bool, bool, torch.dtype]:
        kind = self._device_type
        return torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def _set(self, state: tuple[bool, bool, torch.dtype]) -> None:
        grad, enabled, dtype = state
        torch.set_grad_enabled(grad)
        torch.set_autocast_enabled(self._device_type, enabled)
        torch.set_autocast_dtype(self._device_type, dtype)
