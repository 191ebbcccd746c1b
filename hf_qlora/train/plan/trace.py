"""What is alive, and when: every storage that a run makes, from its first tensor to its last.

The run is a real one (the same Python, autograd and checkpointing) on tensors without data, torch's `FakeTensor`s:
each operation gives its result's shape, dtype and device, and nothing is computed. `Trace` sees every operation below
autograd, notes each new storage, and by a weak reference when it goes. So nothing is known here of families of models
or of what autograd saves: what keeps a tensor in the real run keeps it in this one.

Not seen: what one operation takes and gives back within itself (packing for a matrix product, a kernel's workspace).
Where a value decides how the run goes on, it goes as with whole sequences: conditions on all tokens hold, and of the
targets of a loss all but one are there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class Block:
    """A storage.

    Attributes:
        size: bytes, as the allocator rounds them.
        kind: what it is, where that is known: "base", "gradients", ….
        stage: what ran when it was made.
    """

    size: int
    kind: str
    stage: str
    away: bool = False  # on the host for a while
    gone: bool = False


@dataclass(frozen=True)
class Peak:
    """The bytes that were alive at the highest moment, in all and by block."""

    size: int
    stage: str
    blocks: tuple[Block, ...]


class Trace(TorchDispatchMode):
    """See the module. Use it as a context within a `FakeTensorMode`.

    Attributes:
        stage: what runs now; set by whoever knows.
    """

    def __init__(self, granule: int = 1) -> None:
        super().__init__()
        self.granule, self.stage = granule, "start"
        self._known: dict[int, tuple[Block, weakref.ref[Any]]] = {}
        self._events: list[tuple[Block, int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            rows = max(args[0].numel() - 1, 0)
            result = args[0].new_empty((rows, args[0].ndim), dtype=torch.int64)
        else:
            result = func(*args, **(kwargs or {}))
        kind = "dequantized" if func is torch.ops.bitsandbytes.dequantize_4bit.default else ""
        for tensor in tree_leaves(result):
            # What is made on the meta device has no data in the real run either.
            if isinstance(tensor, FakeTensor) and tensor.device.type != "meta":
                self.note(tensor, kind)
        return result

    def note(self, tensor: Tensor, kind: str = "") -> Block:
        """The block of a tensor, which is a new one if it has not been seen."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None:
            return known[0]
        block = Block(-(-storage.nbytes() // self.granule) * self.granule, kind, self.stage)
        self._known[key] = block, weakref.ref(storage, lambda _: self._gone(key))
        self._events.append((block, block.size, self.stage))
        return block

    def note_all(self, tensors: Iterable[Tensor], kind: str) -> None:
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self.note(tensor, kind)

    def hold(self, size: int, kind: str) -> None:
        """Count bytes that are there all the time and are nobody's tensors."""
        self._events.append((Block(size, kind, self.stage), size, self.stage))

    def move(self, block: Block, away: bool) -> None:
        """Let a block be on the host, or back."""
        if block.away != away and not block.gone:
            block.away = away
            self._events.append((block, -block.size if away else block.size, self.stage))

    def alive(self) -> list[Block]:
        """What is there now, in the order in which it was made."""
        return [block for block, _ in self._known.values() if not block.away]

    def peak(self) -> Peak:
        """The highest moment."""
        now, highest, position = 0, -1, 0
        for i, (_, change, _) in enumerate(self._events):
            now += change
            if now > highest:
                highest, position = now, i
        return Peak(highest, self._events[position][2], self._alive_at(position))

    def _alive_at(self, position: int) -> tuple[Block, ...]:
        alive: dict[int, Block] = {}
        for block, change, _ in self._events[: position + 1]:
            if change >= 0:
                alive[id(block)] = block
            else:
                alive.pop(id(block), None)
        return tuple(alive.values())

    def _gone(self, key: int) -> None:
        block, _ = self._known.pop(key)
        block.gone = True
        if not block.away:
            self._events.append((block, -block.size, self.stage))
