"""Checkpointing whose kept inputs wait in pinned host memory.

    forward     the layer's input is copied to the host on a stream of its own, while the layer runs
    backward    when a layer is run again, the copy back of the layer before it begins

What makes it right, without a synchronisation of the host:

* A copy to the host begins after what made the input (`wait_stream`). The input stays referenced until the computing
  stream has been told to wait for the end of the copy, `IN_FLIGHT` layers later; only then its memory may be used
  again, and all that uses it runs on that stream. So nothing is left to `record_stream`, with which memory comes free
  when the host happens to look: it runs far ahead of the device, and the peak would be that of no offloading.
* The memory of a copy back is allocated on the computing stream, and the copy waits for what that was asked before.
  The layer waits for the end of the copy.
* Pinned buffers come from torch's caching allocator, which gives none away while a copy uses it.

An input that is changed in place before its copy is done would be another one in backward. Autograd, which sees to it
that what it saved is as it was, does not see what hooks have taken: it is an error here, as it is in mode "full".

The last layers' inputs are still on the device when backward begins, and are used as they are. Copies are exact: the
gradients are those of mode "full", bit for bit.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_qlora.layers.budget import first_tensor


logger = logging.getLogger(__name__)

IN_FLIGHT = 2  # inputs whose copies may still be under way while the next layer runs


class Offload:
    """Calls layers as `torch.utils.checkpoint.checkpoint` does, their first input kept on the host.

    Attributes:
        in_flight: the last inputs that were sent, if they are still wanted.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self._start()

    def _start(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.in_flight: deque[weakref.ref[Waiting]] = deque()

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options = state["options"]
        self._start()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # streams and hooks
    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        x = first_tensor(args)
        if x is None or not torch.is_grad_enabled():
            return function(*args)
        if x.device.type != "cuda":
            _say_once(x.device.type)
            return checkpoint(function, *args, **self.options)
        address = x.data_ptr()  # and not x, which the hooks would keep

        def send(tensor: Tensor) -> Any:
            return self.send(tensor) if tensor.numel() and tensor.data_ptr() == address else tensor

        with torch.autograd.graph.saved_tensors_hooks(send, fetch):
            return checkpoint(function, *args, **self.options)

    def send(self, x: Tensor) -> Waiting:
        """Begin to copy x to the host."""
        stream = self.streams.get(x.device)
        if stream is None:
            stream = self.streams[x.device] = torch.cuda.Stream(x.device)
        before = self.in_flight[-1] if self.in_flight else None
        waiting = Waiting(x, stream, before)
        self.in_flight.append(weakref.ref(waiting))
        while len(self.in_flight) > IN_FLIGHT:
            oldest = self.in_flight.popleft()()
            if oldest is not None:
                oldest.let_go()
        return waiting


class Waiting:
    """A tensor that waits on the host.

    Attributes:
        on_device: the tensor itself, until its copy is done, or what was copied back.
        before: what was sent before it, which backward will want next.
    """

    def __init__(self, x: Tensor, stream: torch.cuda.Stream, before: weakref.ref[Waiting] | None) -> None:
        self.device, self.stream, self.before = x.device, stream, before
        self.on_device: Tensor | None = x.detach()
        self.version = x._version  # which x shares with what is detached from it
        self.host = torch.empty_like(x, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(self.on_device, non_blocking=True)
        self.done = stream.record_event()
        self.asked_by: torch.cuda.Stream | None = None  # the stream whose memory a copy back goes to

    def let_go(self) -> None:
        """Free the tensor's memory for what the current stream does after the copy."""
        self._check()
        torch.cuda.current_stream(self.device).wait_event(self.done)
        self.on_device = None

    def ask(self) -> None:
        """Begin the copy back, unless the tensor is on the device."""
        if self.on_device is not None:
            return
        self.asked_by = torch.cuda.current_stream(self.device)
        self.on_device = torch.empty_like(self.host, device=self.device)
        self.stream.wait_stream(self.asked_by)
        with torch.cuda.stream(self.stream):
            self.on_device.copy_(self.host, non_blocking=True)
        self.done = self.stream.record_event()

    def take(self) -> Tensor:
        """The tensor, for the current stream."""
        self.ask()
        assert self.on_device is not None
        if self.asked_by is None:
            self._check()
            return self.on_device
        torch.cuda.current_stream(self.device).wait_event(self.done)
        found, self.on_device, self.asked_by = self.on_device, None, None
        return found

    def _check(self) -> None:
        """Refuse the tensor itself, still on the device, if it is not what was sent.

        Raises:
            RuntimeError: it has been changed in place.
        """
        if self.on_device is not None and self.asked_by is None and self.on_device._version != self.version:
            raise RuntimeError(
                f"The input of a checkpointed layer, {tuple(self.on_device.shape)}, was changed in place after the "
                "layer, which would get another one in backward. Change a copy of it, or leave that layer out."
            )

    def __del__(self) -> None:
        if self.asked_by is not None:  # nobody took it, and its memory is that stream's as soon as it is freed
            self.asked_by.wait_event(self.done)


def fetch(kept: Any) -> Tensor:
    """The tensor that was sent, with the one before it on its way; another as it is."""
    if not isinstance(kept, Waiting):
        result: Tensor = kept
        return result
    found = kept.take()
    before = kept.before() if kept.before is not None else None
    if before is not None:
        before.ask()
    return found


@functools.cache
def _say_once(device: str) -> None:
    logger.warning("mode='offload' moves nothing where the layers run on %s: it is mode='full' there.", device)
