"""What the measurements share: on what they ran, how much memory was used, and a clock."""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import hf_qlora


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
    """Bytes in use and their peak: resident on the CPU, allocated (and reserved, `held`) on CUDA."""

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
    status = Path("/proc/self/status").read_text(encoding="ascii")
    sizes = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.MULTILINE))
    return Memory(int(sizes["VmRSS"]) * 1024, int(sizes["VmHWM"]) * 1024)


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


def clock(device: str) -> float:
    """Seconds, with all that was asked of the device done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
