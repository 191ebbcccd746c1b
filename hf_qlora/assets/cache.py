"""Where what was read out of the wheels is kept.

A result is built in a scratch folder inside the cache and renamed into place: a folder that exists is whole, whoever
was interrupted. A lock keeps a second process waiting instead of downloading the same again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


# Counts up when a builder writes something else, so that what an older version cached is left unread.
LAYOUT = "assets-1"


def cache_dir() -> Path:
    """`$HF_QLORA_CACHE` if set, else `hf_qlora` in the user's cache folder."""
    chosen = os.environ.get("HF_QLORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_qlora"


def cached(name: str, build: Callable[[Path, Path], None]) -> Path:
    """The cache's folder `name`; if absent, `build(folder, scratch)` fills it, and `scratch` is thrown away."""
    root = cache_dir() / LAYOUT
    folder = root / name
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        if folder.is_dir():
            return folder
        for abandoned in root.glob(f".{name}.partial-*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.partial-") as scratch:
            built = Path(scratch) / name
            built.mkdir()
            build(built, Path(scratch))
            built.rename(folder)
    return folder
