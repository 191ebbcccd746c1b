"""Memory of this process on the CPU: what it has made, and of mapped files what its tensors are.

    in use = anonymous + shared memory + mapped weights
    peak   = the most resident − pages of mapped files + mapped weights

A checkpoint that is loaded in its own dtype is mapped, not copied: its pages are in the resident set (VmRSS) once they
were read, and stay in it after the weights have gone, as long as one tensor of the file is left. They are clean,
and the system drops them when it likes. So pages of files are left out (RssFile), and tensors that lie in a mapped
file are counted by their bytes for as long as there are such tensors: a dense model needs its weights, wherever they
are. Pages of them that were written to are anonymous already.

The peak is exact where the pages of files are as many at the peak as when it is read, as in training. Where files are
mapped and left meanwhile, as in loading, `Watch` also looks every few milliseconds.
"""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch


SECONDS = 0.002  # between two looks; one takes some 50 µs
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+ *(.*)")


@dataclass(frozen=True)
class Resident:
    """Bytes: resident without pages of files; the most that was resident, with them; pages of files."""

    made: int
    most: int
    files: int


def resident() -> Resident:
    """As the system counts; where it does not tell pages of files apart, there are none.

    Raises:
        OSError: it does not count as Linux does.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(VmRSS|VmHWM|RssFile):\s+(\d+) kB", status, re.M)}
    files = sizes.get("RssFile", 0)
    return Resident(sizes["VmRSS"] - files, sizes["VmHWM"], files)


def mapped_weights() -> int:
    """Bytes of all tensors there are that lie in a mapped file, each once, without pages that were written to."""
    mappings = _file_mappings()
    spans = sorted(_spans()) if mappings else []  # a list of all objects is some MiB itself
    total = 0
    for start, end, written in mappings:
        inside, reached = 0, start
        for first, last in spans:
            low, high = max(first, reached), min(last, end)
            if low < high:
                inside, reached = inside + high - low, high
        total += max(inside - written, 0)
    return total


def _spans() -> Iterator[tuple[int, int]]:
    """First and last address of the tensors on the CPU."""
    for tensor in gc.get_objects():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            continue
        if tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.numel():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            yield tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


def _file_mappings() -> list[tuple[int, int, int]]:
    """Addresses of each mapping such as torch makes of a file, and its bytes that were written to; no libraries."""
    found, programs = [], set()
    with Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if mapping := _MAPPING.match(line):
                first, last, may, path = mapping.groups()
                if "x" in may:
                    programs.add(path)
            elif line.startswith("Anonymous:") and may[1:] == "w-p":
                found.append((path, int(first, 16), int(last, 16), int(line.split()[1]) * 1024))
    return [
        (start, end, written) for path, start, end, written in found if path.startswith("/") and path not in programs
    ]


class Watch:
    """Within it, the most memory in use is looked for by a thread; `peak` is it, afterwards.

    What comes and goes between two looks is missed, but where pages of files are then as many as at any look.
    """

    def __enter__(self) -> Watch:
        self.peak = 0
        self._made = self._files = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._end.wait(SECONDS):
            self._once()

    def _once(self) -> Resident:
        found = resident()
        self._made, self._files = max(self._made, found.made), max(self._files, found.files)
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        last = self._once()
        self.peak = max(self._made, last.most - self._files) + mapped_weights()
