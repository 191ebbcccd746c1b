"""Whether the frozen base is still what it was: checksums of its bytes, some in each step, and all of them at last.

A checksum is the sum of the bytes as 64-bit integers, exact and modulo 2^64: any one changed value changes it, and it
is read as fast as memory is. Packed codes, their scales and nested scales are summed as they are stored, and so is
whatever else is frozen: embeddings, head, norms. Large tensors are summed in pieces, so that a step has a bound.

bitsandbytes' own layers are repacked in place in an eval forward on a CPU with AVX512-BF16, and unpacked again when
they are saved, with scales that were rounded: such layers are told apart, and not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from hf_qlora.quant.names import is_of_adapter, plain_name


# In one step: bytes, by the device's kind, and pieces. On one core of a CPU 4 MiB take about a millisecond.
BYTES = {"cpu": 2**22}
BYTES_ELSEWHERE = 2**26
PIECES = 8


@dataclass(frozen=True)
class Piece:
    """Some of the bytes of a frozen tensor, which is asked for anew each time: a model can be moved."""

    name: str
    tensor: Callable[[], Tensor | None]
    start: int
    stop: int
    layer: bnb.nn.Linear4bit | None = None  # whose codes or scales they are

    def checksum(self, device: torch.device) -> Tensor:
        """As a number of 64 bits, (); of a tensor that is gone or has become shorter, that of nothing."""
        tensor = self.tensor()
        if tensor is None:
            return torch.zeros((), dtype=torch.long, device=device)
        data = as_bytes(tensor)[self.start : self.stop]
        whole = len(data) // 8 * 8 if data.data_ptr() % 8 == 0 else 0
        total = data[whole:].sum(dtype=torch.long)
        return (total + data[:whole].view(torch.long).sum() if whole else total).to(device)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class FrozenBase:
    """Checksums of what is frozen in a model, adapters left out."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {
            plain_name(path): module for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)
        }
        self.pieces = [
            piece
            for name, tensor in frozen_tensors(model)
            for piece in _cut(name, tensor, self.layers.get(name.removesuffix(".weight").partition(" (")[0]))
        ]
        self.device = next(
            (t.device for piece in self.pieces[:1] if (t := piece.tensor()) is not None), torch.device("cpu")
        )
        self.expected = self._checksums(self.pieces)
        self._next = 0
        self._compared: list[tuple[list[Piece], Tensor]] = []
        self._said: set[str] = set()

    def take(self) -> None:
        """Compare the next few pieces, without waiting for the result."""
        budget = BYTES.get(self.device.type, BYTES_ELSEWHERE)
        stop = self._next
        while stop < len(self.pieces) and stop - self._next < PIECES and budget > 0:
            budget -= self.pieces[stop].stop - self.pieces[stop].start
            stop += 1
        self._compare(slice(self._next, stop))
        self._next = stop % max(len(self.pieces), 1)

    def take_all(self) -> None:
        self._compare(slice(0, len(self.pieces)))

    def read(self) -> list[str]:
        """The names of the tensors that were found changed since the last reading; each is said once."""
        compared, self._compared = self._compared, []
        found = {
            piece.name: None
            for pieces, flags in compared
            for piece, flag in zip(pieces, flags.tolist(), strict=True)
            if flag
        }
        return list(found)

    def repacked(self) -> list[str]:
        """The names of the layers that bitsandbytes has repacked; each is said once."""
        names = [name for name, layer in self.layers.items() if name not in self._said and _was_repacked(layer)]
        self._said.update(names)
        return names

    def _compare(self, part: slice) -> None:
        pieces = self.pieces[part]
        if pieces:
            sums = self._checksums(pieces)
            changed = sums != self.expected[part]
            for i, piece in enumerate(pieces):
                if piece.layer is not None and _was_repacked(piece.layer):
                    changed[i] = False
            self._compared.append((pieces, changed))
            self.expected[part] = sums

    def _checksums(self, pieces: list[Piece]) -> Tensor:
        sums = [piece.checksum(self.device) for piece in pieces]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.long)


def _was_repacked(layer: bnb.nn.Linear4bit) -> bool:
    """Now or before: unpacked again, the state still has the mark, as False."""
    return hasattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu")


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor | None]]]:
    """What is frozen in a model's base, each tensor once; not what is sharded or on the meta device."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if is_of_adapter(path):
            continue
        name = plain_name(path)
        if isinstance(module, bnb.nn.Linear4bit):
            yield from _packed(name, module)
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or is_of_adapter(kind) or id(parameter) in seen or not is_whole(parameter):
                continue
            seen.add(id(parameter))
            yield f"{name}.{kind}" if name else kind, _getter(module, kind)


def _packed(name: str, layer: bnb.nn.Linear4bit) -> Iterator[tuple[str, Callable[[], Tensor | None]]]:
    """The scales of a packed layer; its codes are its parameter."""

    def part(path: str) -> Callable[[], Tensor | None]:
        def get() -> Tensor | None:
            found: Any = layer.weight.quant_state
            for attribute in path.split("."):
                found = getattr(found, attribute, None)
            return found if isinstance(found, Tensor) else None

        return get

    for path in ("absmax", "offset", "state2.absmax"):
        tensor = part(path)()
        if tensor is not None and is_whole(tensor):
            yield f"{name} ({path})", part(path)


def _getter(module: nn.Module, kind: str) -> Callable[[], Tensor | None]:
    return lambda: module._parameters.get(kind)


def is_whole(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and not hasattr(tensor, "device_mesh") and tensor.numel() > 0


def _cut(name: str, get: Callable[[], Tensor | None], layer: bnb.nn.Linear4bit | None) -> Iterator[Piece]:
    tensor = get()
    assert tensor is not None
    size = tensor.numel() * tensor.element_size()
    step = BYTES.get(tensor.device.type, BYTES_ELSEWHERE) if tensor.is_contiguous() else size
    for start in range(0, size, step):
        yield Piece(name, get, start, min(start + step, size), layer)
