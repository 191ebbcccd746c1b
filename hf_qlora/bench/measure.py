"""What the measurements share: on what they ran, how much memory was used, and a clock."""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

import hf_qlora
from hf_qlora.bench.resident import Watch, mapped_weights, resident


Arm = TypeVar("Arm")
_M_MMAP_THRESHOLD = -3  # malloc.h
MAPPED = 2**16  # bytes from which glibc maps, if that is fixed
PACKAGES = ("hf-qlora", "torch", "transformers", "peft", "bitsandbytes")


def environment(device: str | None = None) -> dict[str, Any]:
    """What a number depends on beside the code."""
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}",
        "capability": "" if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        **{name: version(name) for name in PACKAGES},
        "code": code(),
    }


@functools.cache
def code() -> str:
    """A short hash of this package's source: results of one code can be compared."""
    found = hashlib.sha256()
    for path in sorted(Path(hf_qlora.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


@dataclass(frozen=True)
class Memory:
    """Bytes in use and their peak: on the CPU as `bench/resident.py` counts, on CUDA allocated (reserved: `held`)."""

    now: int
    peak: int
    held: int = 0


def memory(device: str) -> Memory:
    """Of this process, since the last `reset_peak`.

    Raises:
        OSError: on the CPU, where the system does not count as Linux does.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        return Memory(
            torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        )
    found, mapped = resident(), mapped_weights()
    return Memory(found.made + mapped, max(found.made, found.most - found.files) + mapped)


def map_large_blocks() -> None:
    """Let what is resident be what is in use, in this process, on Linux.

    glibc keeps what a process frees, unless it was a mapping of its own, and lets the size that gets one grow to 32
    MiB; here that size is fixed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED)


@contextmanager
def peak_of(device: str) -> Iterator[Callable[[], int]]:
    """What is given says, afterwards, how much was in use at most within; also where files are mapped meanwhile."""
    reset_peak(device)
    found = 0
    if torch.device(device).type == "cuda":
        yield lambda: found
        found = memory(device).peak
        return
    with Watch() as watch:
        yield lambda: watch.peak


def reset_peak(device: str) -> None:
    """Let the peak be what is in use now, free memory given back."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
    try:
        os.write(descriptor, b"5")
    finally:
        os.close(descriptor)


def in_turn(arms: Iterable[Arm], number: int) -> list[Arm]:
    """The arms of a round, each round another first: none always follows on the same disturbance."""
    order = list(arms)
    first = number % len(order)
    return order[first:] + order[:first]


def clock(device: str) -> float:
    """Seconds, with all that was asked of the device done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
